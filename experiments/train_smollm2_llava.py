"""Tunes SmolLM2 and a small vision tower into a LLaVA of 135 million parameters.

    python experiments/train_smollm2_llava.py --out checkpoints/smollm2_llava

The tower is mini_llava's. A new linear projector maps its features to SmolLM2's width, tower and
projector are trained whole, and the language model by LoRA (arXiv 2106.09685) of rank 16 on every
linear of its decoder layers. The loss is that of the answer's tokens, as in the miniatures.

Every draw depends on the seed and the step only, and the progress is written every `--save-every`
steps, so a killed run goes on where it stopped. Problems are drawn and encoded by processes of
their own, and products run in bfloat16. `--out` then holds `adapter.safetensors`, which is what has
been trained, in half precision, `training.yaml`, which says how, and `model/`, a checkpoint in our
own format with LoRA merged, for `model.path`. This wants a GPU; `--steps 2` shows on a CPU that
everything fits.

    python experiments/train_smollm2_llava.py --out FOLDER --adapter FILE

trains nothing and writes `model/` from an adapter that another machine has trained.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from experiments.train_miniature import mixed_precision
from experiments.validation import accuracy_by_skill
from qvlm.command import folder, run_command
from qvlm.data.miniature import generate, stream
from qvlm.data.prompts import Prompting
from qvlm.models import Llava, LoadedModel, load_model
from qvlm.models.architectures import with_tower
from qvlm.quantization.targets import decoder_layers, quantizable
from qvlm.records.environment import hardware
from qvlm.records.files import write_file, write_folder

RANK, ALPHA = 16, 32
IGNORED = -100
PROMPTING = Prompting("QCM-LEA", "smollm2")
PROGRESS, ADAPTER = "progress.pt", "adapter.safetensors"
VALIDATION_PROBLEMS = 500


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on. The defaults are those of the shipped adapter."""

    steps: int = 1500
    batch_size: int = 256
    rate: float = 8e-4
    warmup: int = 100
    seed: int = 0


class LoRA(nn.Module):
    """A frozen linear plus a trainable product of two thin matrices: y = W x + B A x alpha / r."""

    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.a = nn.Parameter(torch.randn(rank, linear.in_features, device=device) / rank)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        return self.linear(x) + (x @ self.a.T) @ self.b.T * (ALPHA / RANK)

    def merged(self) -> nn.Linear:
        """Returns one linear that computes the same, summed in float64."""
        with torch.no_grad():
            product = self.b.double() @ self.a.double() * (ALPHA / RANK)
            self.linear.weight.copy_(self.linear.weight.double() + product)
        return self.linear


def build(language: str | Path, tower: str | Path = "mini_llava", seed: int = 0) -> LoadedModel:
    """Puts a language model and the tower of a LLaVA together, with a new projector and LoRA.

    Args:
        language: Folder of a LLaMA alone.
        tower: Folder or name of a LLaVA.
        seed: Seed of the new weights.
    """
    torch.manual_seed(seed)
    text, vision = load_model(language, "language", PROMPTING), load_model(tower, "tower")
    config = vision.model.config
    architecture = with_tower(text.model.config, config, text.begins_with_bos)
    model = Llava(architecture)
    model.model.language_model.load_state_dict(text.model.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.model.model.vision_tower.state_dict())
    model.tie_weights()
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    for layer in decoder_layers(model).values():
        for name, linear in quantizable(layer).items():
            layer.set_submodule(name, LoRA(linear))
    return LoadedModel(
        model,
        text.tokenizer,
        vision.image_processor,
        PROMPTING,
        "smollm2_llava",
        vision.image_fit,
        begins_with_bos=text.begins_with_bos,
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch_of(loaded: LoadedModel, problems: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Encodes problems with their answers, and labels that leave out everything else."""
    batch = loaded.encode(problems, with_target=True)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, problem in enumerate(problems):
        target = loaded.prompting.target(problem)
        count = len(loaded.tokenizer(target, add_special_tokens=False)["input_ids"])
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels}


class Batches(Dataset):
    """The batches of a training run, each drawn by seed and step alone.

    Args:
        loaded: Model from `build`. Its encoding is copied, on the CPU, for processes that encode.
        recipe: What the training depends on.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe) -> None:
        self.encoding = replace(loaded, model=copy.deepcopy(loaded.model).cpu())
        self.recipe = recipe

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        seed = self.recipe.seed * 1_000_003 + step
        return batch_of(self.encoding, list(islice(stream("train", seed), self.recipe.batch_size)))

    def __len__(self) -> int:
        return self.recipe.steps


def answer_loss(model: Llava, batch: dict[str, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of the labeled tokens; logits are made for these only."""
    labels = batch.pop("labels")[:, 1:]
    learned = labels != IGNORED
    with mixed_precision(labels.device):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learned])
    return nn.functional.cross_entropy(logits.float(), labels[learned])


def resumed(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts the progress in `file` into model and optimizer, and returns the next step."""
    if not file.is_file():
        return 0
    progress = torch.load(file, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(progress["optimizer"])
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(progress["weights"][name])
    return int(progress["step"])


def train(
    loaded: LoadedModel,
    recipe: Recipe,
    out: Path,
    save_every: int = 200,
    until: int | None = None,
    workers: int = 0,
) -> list[float]:
    """Trains from the last progress in `out`, and returns the losses of these steps.

    Args:
        loaded: Model from `build`, which is trained in place.
        recipe: What the training depends on.
        out: Folder of the progress and of the adapter.
        save_every: Number of steps between two writes of the progress.
        until: Step to stop before; None is the end of the recipe.
        workers: Number of processes that draw and encode problems; 0 is this one.
    """
    model = loaded.model.train()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.rate, weight_decay=0.0)
    start, end = resumed(out / PROGRESS, model, optimizer), recipe.steps if until is None else until
    loader = DataLoader(
        Batches(loaded, recipe), batch_size=None, sampler=range(start, end), num_workers=workers
    )
    losses: list[Tensor] = []
    for step, batch in enumerate(tqdm(loader, mininterval=5), start):
        share = min(1, (step + 1) / recipe.warmup) * (1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * share
        loss = answer_loss(model, {key: tensor.to(model.device) for key, tensor in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % save_every == 0 or step + 1 == end:
            progress = {
                "step": step + 1,
                "optimizer": optimizer.state_dict(),
                "weights": {name: p.detach() for name, p in parameters.items()},
            }
            write_file(out / PROGRESS, partial(torch.save, progress))
            save_adapter(model, out / ADAPTER)
            print(f"step {step + 1}: loss {torch.stack(losses[-save_every:]).mean():.4f}")
    return [float(loss) for loss in losses]


def save_adapter(model: nn.Module, file: Path) -> None:
    """Writes what has been trained, in half precision."""
    kept = {name: p.detach().half().cpu() for name, p in trained(model).items()}
    write_file(file, lambda path: save_file(kept, path))


def load_adapter(model: nn.Module, file: Path) -> None:
    """Puts an adapter into a model from `build`, in place.

    Raises:
        ValueError: If the adapter does not hold what is trained, name by name.
    """
    kept, parameters = load_file(file), trained(model)
    if {*kept} != {*parameters}:
        raise ValueError(f"{file} is not an adapter of this model: the tensors have other names")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Merges LoRA in place, and writes a checkpoint in our own format, whole or not at all."""
    model = loaded.model.eval()
    for layer in decoder_layers(model).values():
        for name, module in list(layer.named_modules()):
            if isinstance(module, LoRA):
                layer.set_submodule(name, module.merged())

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        loaded.save_encoding(partial)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, fill)


def assemble(adapter: Path, language: Path, folder: Path) -> None:
    """Writes the checkpoint that an adapter and the weights it was trained on make.

    Args:
        adapter: File from `train`.
        language: Folder of SmolLM2.
        folder: Folder to write. One that exists is replaced.
    """
    loaded = build(language)
    load_adapter(loaded.model, adapter)
    save_model(loaded, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description="Tunes SmolLM2 into a small LLaVA.")
    parser.add_argument("--out", type=folder, required=True, help="folder of progress and result")
    parser.add_argument("--language", type=folder, default=Path("~/.cache/qvlm/smollm2"))
    parser.add_argument("--adapter", type=Path, help="train nothing, and merge this one")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--problems", type=int, default=VALIDATION_PROBLEMS, help="to validate on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    def work(options: argparse.Namespace) -> None:
        language, out = options.language.expanduser(), options.out
        if options.adapter:
            assemble(options.adapter, language, out / "model")
            print(f"The model is in {out}/model.")
            return
        begin = time.monotonic()
        recipe = Recipe(options.steps, options.batch_size, seed=options.seed)
        loaded = build(language, seed=options.seed)
        loaded.model.to(options.device)
        losses = train(loaded, recipe, out, options.save_every, workers=options.workers)
        minutes = (time.monotonic() - begin) / 60
        about = {
            "recipe": asdict(recipe),
            "device": options.device,
            "minutes": round(minutes, 1),
            "last_losses": sum(losses[-100:]) / max(1, len(losses[-100:])),
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
            "hardware": hardware(),
        }
        problems = generate("validation", options.problems, seed=0)
        skills = accuracy_by_skill(loaded, problems)
        right, asked = (sum(column) for column in zip(*skills.values(), strict=True))
        about["validation"] = {"right": right, "asked": asked}
        write_file(out / "training.yaml", yaml.safe_dump(about, sort_keys=False))
        save_model(loaded, out / "model")
        print(f"{len(losses)} steps in {minutes:.1f} minutes; {right} of {asked} right.")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
