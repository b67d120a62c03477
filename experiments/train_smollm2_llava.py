"""Tunes SmolLM2 and a small vision tower into a LLaVA of 135 million parameters.

    python experiments/train_smollm2_llava.py --out checkpoints/smollm2_llava

The tower is mini_llava's. A new linear projector maps its features to SmolLM2's width, tower and
projector are trained whole, and the language model by LoRA (arXiv 2106.09685) of rank 16 on every
linear of its decoder layers. The loss is that of the answer's tokens, as in the miniatures.

Every draw depends on the seed and the step only, and the progress is written every `--save-every`
steps, so a killed run goes on where it stopped. `--out` then holds `adapter.safetensors`, which is
what has been trained, in half precision, and `model/`, a checkpoint in our own format with LoRA
merged, for `model.path`. A CPU trains about 69 tokens a second, so this wants a GPU; `--steps 2`
shows on a CPU that everything fits.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from qvlm.command import folder, run_command
from qvlm.data.miniature import generate
from qvlm.data.prompts import Prompting
from qvlm.data.scienceqa import COLUMNS, MINIATURE_SIZES
from qvlm.models import Llava, LlavaArchitecture, LoadedModel, load_model
from qvlm.quantization.targets import decoder_layers, quantizable
from qvlm.records.files import write_file, write_folder

RANK, ALPHA = 16, 32
IMAGE_TOKEN_ID = 16  # one of SmolLM2's special tokens that no text has
IGNORED = -100
PROMPTING = Prompting("QCM-LEA", "smollm2")
PROGRESS = "progress.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on."""

    steps: int = 6000
    batch_size: int = 16
    rate: float = 3e-4
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
        """Returns one linear that computes the same."""
        with torch.no_grad():
            self.linear.weight += self.b @ self.a * (ALPHA / RANK)
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
    source = vision.model.config
    architecture = LlavaArchitecture(
        vision_config=source.vision_config,
        text_config=text.model.config,
        image_token_index=min(IMAGE_TOKEN_ID, text.model.config.vocab_size - 1),
        image_seq_length=source.image_seq_length,
        vision_feature_layer=source.vision_feature_layer,
        vision_feature_select_strategy=source.vision_feature_select_strategy,
        projector_type="linear",
        tie_word_embeddings=bool(text.model.config.tie_word_embeddings),
    )
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
        begins_with_bos=False,
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


def batches(
    loaded: LoadedModel, problems: Any, recipe: Recipe, start: int
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of the steps from `start` on, each drawn by seed and step alone."""
    for step in range(start, recipe.steps):
        draw = random.Random(f"{recipe.seed}/{step}")
        rows = [draw.randrange(len(problems)) for _ in range(recipe.batch_size)]
        yield batch_of(loaded, [problems[row] for row in rows])


def train(
    loaded: LoadedModel,
    problems: Any,
    recipe: Recipe,
    out: Path,
    save_every: int = 200,
    until: int | None = None,
) -> list[float]:
    """Trains from the last progress in `out`, and returns the losses of these steps.

    Args:
        loaded: Model from `build`, which is trained in place.
        problems: Problems to draw from.
        recipe: What the training depends on.
        out: Folder of the progress.
        save_every: Number of steps between two writes of the progress.
        until: Step to stop before; None is the end of the recipe.
    """
    model, file = loaded.model.train(), out / PROGRESS
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.rate, weight_decay=0.0)
    start = 0
    if file.is_file():
        progress = torch.load(file, map_location=model.device, weights_only=True)
        start = progress["step"]
        optimizer.load_state_dict(progress["optimizer"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(progress["weights"][name])
    losses = []
    end = recipe.steps if until is None else until
    steps = tqdm(range(start, end), initial=start, total=recipe.steps, disable=None)
    for step, batch in zip(steps, batches(loaded, problems, recipe, start), strict=False):
        share = min(1, (step + 1) / recipe.warmup) * (1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * share
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        steps.set_postfix_str(f"loss {losses[-1]:.3f}")
        if (step + 1) % save_every == 0 or step + 1 == end:
            progress = {
                "step": step + 1,
                "optimizer": optimizer.state_dict(),
                "weights": {name: p.detach() for name, p in parameters.items()},
            }
            write_file(file, partial(torch.save, progress))
    return losses


def save(loaded: LoadedModel, out: Path) -> int:
    """Writes what was trained, and the merged checkpoint; returns the bytes of the first."""
    kept = {name: p.detach().half().cpu() for name, p in trained(loaded.model).items()}
    write_file(out / "adapter.safetensors", lambda path: save_file(kept, path))
    model = loaded.model.eval()
    for layer in decoder_layers(model).values():
        for name, module in list(layer.named_modules()):
            if isinstance(module, LoRA):
                layer.set_submodule(name, module.merged())

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        assert loaded.image_processor is not None
        loaded.image_processor.save_pretrained(partial)

    write_folder(out / "model", fill)
    return (out / "adapter.safetensors").stat().st_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description="Tunes SmolLM2 into a small LLaVA.")
    parser.add_argument("--out", type=folder, required=True, help="folder of progress and result")
    parser.add_argument("--language", type=folder, default=Path("~/.cache/qvlm/smollm2"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--problems", type=int, default=MINIATURE_SIZES["train"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    def work(options: argparse.Namespace) -> None:
        recipe = Recipe(options.steps, options.batch_size, seed=options.seed)
        loaded = build(options.language.expanduser(), seed=options.seed)
        loaded.model.to(options.device)
        problems = generate("train", options.problems, seed=0)
        assert {*COLUMNS} <= {*problems[0]}
        losses = train(loaded, problems, recipe, options.out, options.save_every)
        size = save(loaded, options.out)
        print(f"{len(losses)} steps, last loss {losses[-1] if losses else float('nan'):.3f}")
        print(f"{options.out}/adapter.safetensors has {size / 2**20:.1f} MiB.")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
