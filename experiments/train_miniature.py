"""Trains a miniature from scratch: `python -m experiments.train_miniature --model NAME [--seed N]`.

Without a seed the result is the embedded miniature; with one it is a sister of it, by the same
recipe from other random numbers, in `experiments/trainings/`. `qvlm claims` measures how much
trainings differ.

Training has three phases, because a small model that learns everything at once stays at chance for
long. To write "The answer is B." it must find the letter before a text. The circuit for this
look-up forms late and suddenly, and an untrained tower passes hardly any gradient to it.

1. Vision trains the tower alone. A head that is discarded later predicts the words of the solution
   from the features that the language model will see and the words of the question.
2. Look-up trains on rows of options with many queries ("red . The answer is B ."), over a dozen
   words at first. Whenever four in five letters are right, the word set doubles, until it is the
   whole vocabulary.
3. Joint trains on fresh problems of the training split in the format of evaluation, with a few
   look-up rows. The loss is taken on the answer (lecture, solution, letter). The learning rate
   decays to zero, for the mixture of experts twice.

Muon trains the hidden matrices, AdamW everything else. Every random draw depends on the seed and
the step only, and a checkpoint holds weights, optimizers and phase, so a killed run continues where
it stopped. A GPU is used where there is one. A training that is finished leaves `training.yaml`
beside its weights, with its recipe and the weights' hash.
"""

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from experiments.muon import Muon
from experiments.validation import accuracy_by_skill
from qvlm.cell.identity import CHECKPOINT_FILES
from qvlm.data.miniature import SKILLS, generate, stream, vocabulary
from qvlm.data.prompts import IMAGE_TOKEN, Prompting
from qvlm.data.prompts import OFFICIAL_LETTERS as LETTERS
from qvlm.models import Llava, LlavaArchitecture, LoadedModel, MoeStableLmConfig
from qvlm.models.load import MINIATURES
from qvlm.models.mixture import MixtureOfExperts
from qvlm.records.environment import hardware, versions
from qvlm.records.files import write_file
from qvlm.records.provenance import content_hash
from qvlm.tables.claims.plan import FOLDER, TRAINED

IGNORED = -100
VALIDATION_PROBLEMS = 500
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]
# One token each: phrases of the prompt format that never vary.
PHRASES = [
    Prompting()
    .prompt({"image": None, "question": "", "choices": [], "hint": ""})
    .split(" USER")[0],
    "USER:",
    "ASSISTANT:",
    "Context:",
    "Options:",
    "N/A",
    "The answer is",
    *(f"({letter})" for letter in LETTERS),
]


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on.

    At the joint step `restart` the learning rates rise again, to the share `restart_rate` of their
    first values.
    """

    joint_steps: int
    restart: int | None = None
    restart_rate: float = 0.3
    batch_size: int = 64
    lookup_batch_size: int = 48
    vision_steps: int = 700
    vision_batch_size: int = 128
    matrix_lr: float = 0.02
    joint_matrix_lr: float = 0.008
    other_lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.8
    lookup_share: float = 0.08
    lookup_target: float = 0.8
    letter_weight: float = 3.0
    seed: int = 0


RECIPES = {
    "mini_llava": Recipe(joint_steps=2600, decay_share=0.7),
    "mini_moe_llava": Recipe(joint_steps=6100, restart=4600, decay_share=0.8),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a word-level tokenizer of the generator's vocabulary and the fixed phrases."""
    words = sorted({*vocabulary(), *LETTERS, "."})
    entries = [*SPECIAL, *PHRASES, *words]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(entries))}, unk_token="<unk>")
    )
    pattern = Regex(r"[A-Za-z']+|[0-9]|[^\sA-Za-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Llava:
    """Builds a miniature with initial weights. The caller seeds torch."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    rotary = {} if name == "mini_llava" else {"partial_rotary_factor": 0.5}
    language: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, **rotary},
        initializer_range=0.09,  # about 1/sqrt(width): smaller delays the look-up circuit
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: LlamaConfig | MoeStableLmConfig
    if name == "mini_llava":
        text = LlamaConfig(intermediate_size=384, num_hidden_layers=4, **language)
    else:
        text = MoeStableLmConfig(
            intermediate_size=256,
            num_hidden_layers=4,
            use_qkv_bias=True,
            **language,
        )
    architecture = LlavaArchitecture(
        vision_config=vision,
        text_config=text,
        projector_type="linear" if name == "mini_llava" else "mlp2x_gelu",
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(48 // 8) ** 2,
    )
    return Llava(architecture)


@dataclass
class Batch:
    """Right-padded rows. `labels` [rows, tokens] is IGNORED where no loss is taken."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None


def pad(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Pads (ids, labels) rows on the right, where a causal model needs no mask."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


class Lookups:
    """Rows of the look-up phase, over a word set that grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        encode = tokenizer.convert_tokens_to_ids
        self.words = [encode(w) for w in vocabulary() if w.isalpha() and len(w) > 1]
        random.Random(seed).shuffle(self.words)
        self.brackets = [encode(f"({letter})") for letter in LETTERS]
        self.letters = [encode(letter) for letter in LETTERS]
        self.options, self.turn, self.answer, self.stop = (
            encode(t) for t in ("Options:", "ASSISTANT:", "The answer is", ".")
        )
        self.bos = tokenizer.bos_token_id
        self.seed = seed
        self.size = 12

    def row(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Writes two rounds of options, all different, with one look-up of each option.

        No text is looked up twice, because the second answer could be copied from the first.
        """
        ids, labels = [self.bos], [IGNORED]

        def write(tokens: list[int], learn: bool) -> None:
            ids.extend(tokens)
            labels.extend(tokens if learn else [IGNORED] * len(tokens))

        words = self.words[: self.size]
        longest = 1 if self.size <= 48 else 3
        heads = rng.sample(words, 10)
        for _ in range(2):
            texts = []
            for _ in range(rng.randint(3, 5)):
                texts.append([heads.pop(), *rng.choices(words, k=rng.randint(0, longest - 1))])
            write([self.options], False)
            for bracket, text in zip(self.brackets, texts, strict=False):
                write([bracket, *text], False)
            write([self.turn], False)
            for pick in rng.sample(range(len(texts)), len(texts)):
                if longest > 1:
                    write(rng.choices(words, k=rng.randint(0, 3)), False)
                write(texts[pick][:1], False)
                write(texts[pick][1:], True)
                write([self.stop, self.answer], False)
                write([self.letters[pick]], True)
                write([self.stop], False)
        return ids, labels

    def batch(self, step: int, size: int) -> Batch:
        rng = random.Random(f"lookup-{self.seed}-{step}")
        return Batch(*pad([self.row(rng) for _ in range(size)]), None)


def pixels(images: list[Any], processor: CLIPImageProcessorPil) -> Tensor:
    """Normalizes images that already have the tower's size, as the processor does.

    Returns:
        Pixels [images, 3, side, side].
    """
    raw = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((raw - mean) / std).permute(0, 3, 1, 2).contiguous()


def joint_batches(loaded: LoadedModel, seed: int, size: int, first: int) -> Iterator[Batch]:
    """Yields batches of the training split from batch `first` on, sorted by length."""
    per_pool = 8
    pool_index = first // per_pool
    tokenizer, prompting = loaded.tokenizer, loaded.prompting
    while True:
        rng = random.Random(f"joint-{seed}-{pool_index}")
        problems = stream("train", seed=rng.randrange(2**31))
        rows = []
        for _, problem in zip(range(per_pool * size), problems, strict=False):
            prompt = f"{tokenizer.bos_token}{prompting.prompt(problem)}".replace(
                IMAGE_TOKEN, IMAGE_TOKEN * loaded.image_tokens
            )
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            tail = tokenizer(prompting.target(problem), add_special_tokens=False)["input_ids"]
            rows.append((head + tail, [IGNORED] * len(head) + tail, problem["image"]))
        rows.sort(key=lambda row: len(row[0]))
        cuts = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(cuts)
        for index, cut in enumerate(cuts):
            if pool_index * per_pool + index < first:
                continue
            images = [image for _, _, image in cut if image is not None]
            pixel_values = pixels(images, loaded.image_processor) if images else None
            yield Batch(*pad([(ids, labels) for ids, labels, _ in cut]), pixel_values)
        pool_index += 1


class JointBatches(IterableDataset):
    """The batches of `joint_batches`, made in a process of their own where a GPU would wait.

    Args:
        loaded: Model whose tokenizer and image processor write the batches.
        recipe: Recipe that says their size and seed.
        first: Number of the first batch.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe, first: int) -> None:
        self.loaded, self.recipe, self.first = loaded, recipe, first

    def __iter__(self) -> Iterator[Batch]:
        return joint_batches(self.loaded, self.recipe.seed, self.recipe.batch_size, self.first)

    def ahead(self, workers: int) -> Iterator[Batch]:
        """Yields the batches in order.

        Args:
            workers: Number of processes that make them ahead, 0 or 1.
        """
        context = "fork" if workers else None
        return iter(
            DataLoader(self, batch_size=None, num_workers=workers, multiprocessing_context=context)
        )


def mixed_precision(device: torch.device) -> torch.autocast:
    """Returns a context in which products are in bfloat16 where that is fast.

    That is on a GPU, and on a CPU with AVX-512. On one with AVX2 alone a step in bfloat16 takes
    eight times as long as one in float32, which is used there.
    """
    fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def loss_and_accuracy(
    model: Llava, batch: Batch, letters: Tensor, letter_weight: float
) -> tuple[Tensor, float, float]:
    """Returns the weighted loss on labeled tokens, and the accuracy of letters and of all."""
    device = model.device
    inputs = {"input_ids": batch.input_ids[:, :-1].to(device)}
    if batch.pixel_values is not None:
        inputs["pixel_values"] = batch.pixel_values.to(device)
    labels = batch.labels[:, 1:].to(device)
    learned = labels != IGNORED
    targets = labels[learned]
    with mixed_precision(device):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[learned]).float()
    is_letter = torch.isin(targets, letters)
    weights = 1 + (letter_weight - 1) * is_letter
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == targets).float()
    balance = [
        m.balance_loss
        for m in model.modules()
        if isinstance(m, MixtureOfExperts) and m.balance_loss is not None
    ]
    if balance:
        loss = loss + 0.01 * torch.stack(balance).mean()
    return loss, right[is_letter].mean().item(), right.mean().item()


def optimizers(model: Llava, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Makes Muon for matrices inside layers, AdamW for embeddings, head, router and vectors."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and ".layers." in name and "router" not in name
        (matrices if hidden else others).append(parameter)
    return [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def set_rates(optims: list[torch.optim.Optimizer], rates: tuple[float, float]) -> None:
    """Sets the learning rates of Muon and AdamW."""
    for optim, rate in zip(optims, rates, strict=True):
        for group in optim.param_groups:
            group["lr"] = rate


class SolutionWords(nn.Module):
    """Predicts which words the solution holds, from patch features and the question's words."""

    def __init__(self, features: int, vocabulary_size: int, hidden: int = 256) -> None:
        super().__init__()
        self.seen = nn.Linear(features, hidden)
        self.asked = nn.EmbeddingBag(vocabulary_size, hidden, mode="mean", padding_idx=0)
        self.words = nn.Linear(hidden, vocabulary_size)

    def forward(self, patches: Tensor, question: Tensor) -> Tensor:
        """Logits [images, vocabulary] from patches [images, n, width] and ids [images, words]."""
        mixed = self.seen(patches.flatten(1)) + self.asked(question)
        return self.words(nn.functional.gelu(mixed))


def train_tower(loaded: LoadedModel, recipe: Recipe, log: Callable[..., None]) -> None:
    """Trains the tower of `loaded` in place, which is the vision phase."""
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config
    width = config.vision_config.hidden_size * loaded.image_tokens
    torch.manual_seed(recipe.seed)
    head = SolutionWords(width, len(tokenizer)).to(model.device)
    tower = model.model.vision_tower
    parameters = [*tower.parameters(), *head.parameters()]
    optim = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    pictured = [name for name, skill in SKILLS.items() if skill.make(random.Random(0)).image]
    problems = stream("train", recipe.seed, pictured)
    for step in range(recipe.vision_steps):
        drawn = list(islice(problems, recipe.vision_batch_size))
        images = pixels([problem["image"] for problem in drawn], loaded.image_processor)

        def encode(texts: list[str]) -> Tensor:
            rows = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            return rows["input_ids"].to(model.device)

        solution = encode([problem["solution"] for problem in drawn])
        present = torch.zeros(len(drawn), len(tokenizer), device=model.device)
        present.scatter_(1, solution, 1.0)
        present[:, tokenizer.pad_token_id] = 0
        with mixed_precision(model.device):
            states = tower(images.to(model.device), output_hidden_states=True).hidden_states
            patches = states[config.vision_feature_layer][:, 1:]
            question = encode([f"{problem['question']} {problem['hint']}" for problem in drawn])
            logits = head(patches, question).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, present, reduction="none")
        loss = loss.sum(1).mean()
        factor = min(1.0, (step + 1) / recipe.warmup_steps, 2 * (1 - step / recipe.vision_steps))
        optim.param_groups[0]["lr"] = 1e-3 * factor
        optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
        if (step + 1) % 50 == 0:
            exact = ((logits > 0) == (present > 0)).all(1).float().mean().item()
            log(phase="vision", step=step + 1, loss=loss.item(), exact=exact)


def joint_factor(step: int, recipe: Recipe) -> float:
    """Returns the learning-rate factor: constant, then a cosine to zero for `decay_share`.

    After a restart the same schedule runs again from `restart_rate`.
    """
    begin, end, peak = 0, recipe.joint_steps, 1.0
    if recipe.restart is not None:
        if step < recipe.restart:
            end = recipe.restart
        else:
            begin, peak = recipe.restart, recipe.restart_rate
    start = end - (end - begin) * recipe.decay_share
    if step < start:
        return peak
    progress = (step - start) / (end - start)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def save(loaded: LoadedModel, folder: Path) -> None:
    """Writes a checkpoint folder for `load_model`, with weights in bfloat16."""
    # The model is copied, because rounding would also change its rotary frequencies for good.
    copy.deepcopy(loaded.model).to(torch.bfloat16).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    assert loaded.image_processor is not None
    loaded.image_processor.save_pretrained(folder)


def describe(name: str, recipe: Recipe, folder: Path, device: str, minutes: float) -> None:
    """Writes `training.yaml`, which says that a training is finished and how it was made."""
    about = {
        "model": name,
        "recipe": asdict(recipe),
        "weights": content_hash(folder, CHECKPOINT_FILES),
        "device": device,
        "minutes": round(minutes, 1),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_file(folder / TRAINED, yaml.safe_dump(about, sort_keys=False))


def train(name: str, recipe: Recipe, work: Path, out: Path, device: str, every: int) -> None:
    """Runs all phases and writes to `out`. A checkpoint in `work` is resumed."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(name, tokenizer).to(device).train()
    model.set_attn_implementation("eager")  # faster on short rows than the fused backward
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    loaded = LoadedModel(model, tokenizer, processor, Prompting(), name)
    lookups = Lookups(tokenizer, recipe.seed)
    letters = torch.tensor(lookups.letters, device=device)
    optims = optimizers(model, recipe)
    lookup_step, joint_step, smooth, spent = 0, 0, 0.0, 0.0
    phase = "vision"

    checkpoint = work / "checkpoint.pt"
    work.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, kept in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(kept)
        lookup_step, joint_step, lookups.size = (
            state["lookup_step"],
            state["joint_step"],
            state["size"],
        )
        phase, smooth, spent = state["phase"], state["smooth"], state["seconds"]
    started = time.monotonic() - spent

    def keep() -> None:
        state = {
            "model": model.state_dict(),
            "optims": [optim.state_dict() for optim in optims],
            "lookup_step": lookup_step,
            "joint_step": joint_step,
            "size": lookups.size,
            "phase": phase,
            "smooth": smooth,
            "seconds": time.monotonic() - started,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)

    def step_on(batch: Batch, matrix_lr: float, factor: float) -> tuple[float, float, float]:
        set_rates(optims, (matrix_lr * factor, recipe.other_lr * factor))
        loss, letter, token = loss_and_accuracy(model, batch, letters, recipe.letter_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        return loss.item(), letter, token

    def log(**values: Any) -> None:
        line = {"minutes": round((time.monotonic() - started) / 60, 1), **values}
        print(json.dumps(line), flush=True)
        with open(work / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    if phase == "vision":
        train_tower(loaded, recipe, log)
        phase = "lookup"
        keep()
    while phase == "lookup":
        batch = lookups.batch(lookup_step, recipe.lookup_batch_size)
        factor = min(1.0, (lookup_step + 1) / recipe.warmup_steps)
        loss, letter, _ = step_on(batch, recipe.matrix_lr, factor)
        smooth = 0.95 * smooth + 0.05 * letter
        lookup_step += 1
        if lookup_step % 50 == 0:
            log(phase=phase, step=lookup_step, loss=loss, letters=smooth, words=lookups.size)
        if smooth > recipe.lookup_target:
            if lookups.size == len(lookups.words):
                phase = "joint"
                log(phase="lookup solved", step=lookup_step, words=lookups.size)
            lookups.size, smooth = min(2 * lookups.size, len(lookups.words)), 0.5
        if lookup_step % 200 == 0 or phase == "joint":
            keep()

    lookups.size = len(lookups.words)
    validation = generate("validation", VALIDATION_PROBLEMS, seed=recipe.seed)
    batches = JointBatches(loaded, recipe, joint_step).ahead(workers=int(device != "cpu"))
    while joint_step < recipe.joint_steps:
        rng = random.Random(f"mix-{recipe.seed}-{joint_step}")
        factor = joint_factor(joint_step, recipe)
        if rng.random() < recipe.lookup_share * factor:
            extra = lookups.batch(10**6 + joint_step, recipe.lookup_batch_size // 2)
            step_on(extra, recipe.joint_matrix_lr, factor)
        loss, letter, token = step_on(next(batches), recipe.joint_matrix_lr, factor)
        joint_step += 1
        if joint_step % 50 == 0:
            log(phase=phase, step=joint_step, loss=loss, letters=letter, tokens=token)
        if joint_step % every == 0 or joint_step == recipe.joint_steps:
            keep()
            skills = accuracy_by_skill(loaded, validation)
            right, asked = (sum(column) for column in zip(*skills.values(), strict=True))
            by_skill = {s: f"{r}/{n}" for s, (r, n) in sorted(skills.items())}
            log(phase="validation", step=joint_step, accuracy=100 * right / asked, skills=by_skill)
            save(loaded, out)
    minutes = (time.monotonic() - started) / 60
    describe(name, recipe, out, device, minutes)
    log(phase="done", lookup_steps=lookup_step, joint_steps=joint_step, minutes=minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--seed", type=int, help="seed (default: the embedded miniature's)")
    parser.add_argument("--work", type=Path, help="checkpoint and log (default: checkpoints/NAME)")
    parser.add_argument(
        "--out",
        type=Path,
        help="the model (default: the embedded miniature, or experiments/trainings/NAME)",
    )
    parser.add_argument("--steps", type=int, help="joint steps instead of the recipe's")
    parser.add_argument("--every", type=int, default=500, help="steps between validations")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe, name, out = RECIPES[args.model], args.model, MINIATURES / args.model
    if args.seed is not None:
        recipe, name = replace(recipe, seed=args.seed), f"{args.model}-seed{args.seed}"
        out = Path(FOLDER) / name
    if args.steps:
        recipe = replace(recipe, joint_steps=args.steps, restart=None)
    train(
        args.model,
        recipe,
        args.work or Path("checkpoints") / name,
        args.out or out,
        "cuda" if torch.cuda.is_available() else "cpu",
        args.every,
    )


if __name__ == "__main__":
    main()
