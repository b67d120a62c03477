"""Table 4 at full scale without the weights: time and memory do not depend on their values.

`python experiments/table4_scale.py` builds the true architectures with random weights. Blocks
(layers of the vision tower, projector, decoder layers) are made one after the other: the first of
a shape is drawn, quantized and packed, the others are copies of its bytes. Two things are measured.

- Side by side, in one process: a model of a layer of each shape, in bf16, in each packed form and
  with bitsandbytes' NF4, takes the same prompt in turn, `--repeats` times. The ratios are of these.
- Whole, in a fresh process per form: all layers, for the peak of memory and the time.

A question is an image and text of 600 tokens together, and 64 tokens of answer, of which a few are
timed (fewer where they are slow). What a layer takes is timed apart, so that a model whose layers
did not all run is what ran plus, for each missing layer, what one of its shape took; it is marked
as extrapolated. So are a whole model that would take longer than 20 seconds, and one that does not
fit, whose memory is what `qvlm.fit` predicts.

It writes `table4_scale.csv`, the columns of Table 4, and `table4_scale.md`. Left out: accuracy.
"""

import argparse
import copy
import ctypes
import gc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from qvlm.cell import inputs as prepare
from qvlm.config.schema import RunConfig
from qvlm.data.scienceqa import PUBLISHED_QUESTIONS
from qvlm.errors import RunError, UserError
from qvlm.models.architectures import architecture
from qvlm.models.llava import Llava, LlavaArchitecture, image_tokens
from qvlm.models.meta import meta_model
from qvlm.packing import PackedLinear, weight_bytes
from qvlm.packing.plan import blind
from qvlm.planning import footprint as fit
from qvlm.planning.footprint import FULL, GIB, VARIANTS, Variant
from qvlm.quantization.targets import block_layers, decoder_layers, quantizable
from qvlm.records.provenance import revision_in_words, surroundings
from qvlm.runtime.stages import MIB, Stages
from qvlm.tables.command import write_files
from qvlm.tables.cost import COLUMNS, in_fresh_process, spread
from qvlm.tables.markdown import bullets, table
from qvlm.tables.published import label, published

MODELS = ("llava_13b", "llava_7b", "moe_llava")
PEER = Variant("w4a16", "bitsandbytes NF4")
# The scales of single channels, as in Q-VLM's released code, are folded into the weights.
PER_CHANNEL = tuple(
    Variant(bits, "uniform, per channel", "per_channel") for bits in ("w8a8", "w6a6", "w4a4")
)
SIMULATED = Variant("w4a4", "simulated")
OURS = (*VARIANTS, *PER_CHANNEL)
# What a search tries: five settings of each linear, or all settings of three linears jointly.
GRID, DEPTH = 5, 3
SEARCH_TOKENS = 4096
PROMPT, ANSWER, TIMED = fit.SCALE_PROMPT, fit.ANSWER_TOKENS, fit.SCALE_ANSWER
SIDE_BY_SIDE = 32  # tokens that are timed where one layer of a shape stands for all
PATIENCE = 20.0  # seconds that a whole model may take, for two questions
PACE = 5.0  # seconds of decoding after which no further token is timed


@dataclass(frozen=True)
class Seconds:
    """What a question takes.

    Attributes:
        vision: the tower and the projector.
        prefill: the language model on the prompt.
        token: each token of the answer.
    """

    vision: float
    prefill: float
    token: float

    @property
    def question(self) -> float:
        """All of it."""
        return self.vision + self.prefill + ANSWER * self.token

    def over(self, other: "Seconds") -> "Seconds":
        """How many times faster the other is, part by part."""
        return Seconds(*(a / b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Whole:
    """A whole model in a process of its own.

    Attributes:
        seconds: of a question.
        weights: in bytes.
        peak: of memory, in bytes, while it answers.
        complete: all layers ran.
    """

    seconds: Seconds
    weights: int
    peak: float
    complete: bool


@dataclass(frozen=True)
class Search:
    """What a search takes: each linear's ranges alone, or those of three at a time.

    Attributes:
        alone, jointly: in seconds.
        alone_flops, jointly_flops: operations in the products of linears.
    """

    alone: float
    jointly: float
    alone_flops: float
    jointly_flops: float


def shortened(built: LlavaArchitecture, decoder: int, vision: int) -> LlavaArchitecture:
    """The architecture with its first layers only."""
    built = copy.deepcopy(built)
    text = built.text_config
    text.num_hidden_layers = min(decoder, text.num_hidden_layers)
    built.vision_config.num_hidden_layers = min(vision, built.vision_config.num_hidden_layers)
    if getattr(text, "moe_layers", None) is not None:
        text.moe_layers = [index for index in text.moe_layers if index < text.num_hidden_layers]
    return built


def place(built: LlavaArchitecture, change: Callable[[str, nn.Module], None], device: str) -> Llava:
    """A model with random weights in bf16, whose blocks are made and changed one at a time.

    Args:
        change: is given a block's kind and the block, and quantizes it in place.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Llava(shortened(built, 0, 0)).to(device).eval()
    finally:
        torch.set_default_dtype(before)
    for part in ("text_config", "vision_config"):
        count = getattr(built, part).num_hidden_layers
        getattr(model.config, part).num_hidden_layers = count
    made: dict[str, nn.Module] = {}
    for name, (kind, block) in block_layers(meta_model(built, torch.bfloat16), True).items():
        shape = str(block)
        if shape in made:
            block = copy.deepcopy(made[shape])
        else:
            made[shape] = block = _drawn(block, device)
            change(kind, block)
        parent, _, index = name.rpartition(".")
        if kind == "projector":
            model.set_submodule(name, block)
            continue
        attention: Any = block.self_attn
        attention.layer_idx = int(index)  # its place in the cache
        model.get_submodule(parent).append(block)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _drawn(block: nn.Module, device: str) -> nn.Module:
    block = block.to_empty(device=device).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return block


def changer(model: str, variant: Variant) -> Callable[[str, nn.Module], None]:
    """What a variant makes of a block."""
    if variant == FULL:
        return lambda kind, block: None
    if variant == PEER:
        return _bitsandbytes
    quantization = prepare.quantization_config(configuration(model, variant))

    def quantized(kind: str, block: nn.Module) -> None:
        for name, linear in quantizable(block).items():
            inputs = quantization.activation(kind)
            layer = blind(linear, quantization.weight, inputs, variant.normal_float)
            packs = variant != SIMULATED
            block.set_submodule(name, PackedLinear.from_quantized(layer) if packs else layer)

    return quantized


def configuration(model: str, variant: Variant) -> RunConfig:
    """A cell's configuration."""
    return fit.configuration(model, variant.bits, variant.granularity)


def _bitsandbytes(kind: str, block: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in quantizable(block).items():
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        block.set_submodule(name, layer.to(linear.weight.device))


@dataclass
class Clock:
    """Times a model, and its blocks where that is wanted.

    Attributes:
        shapes: of the blocks of the full model, by name.
        whole: all of them are in the model, so that none needs to be timed alone.
    """

    model: Llava
    shapes: Mapping[str, str]
    whole: bool

    def __call__(self, kinds: tuple[str, ...], call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call returns, and the seconds that it takes in the full model.

        Args:
            kinds: the parts of the model, whose blocks the call runs.
        """
        spent: dict[str, float] = {}
        with self._timed(spent):
            begun = self._now()
            result = call()
            seconds = self._now() - begun
        for name, shape in self.shapes.items():
            if spent and name not in spent and any(kind in name for kind in kinds):
                alike = [spent[other] for other in spent if self.shapes[other] == shape]
                seconds += statistics.mean(alike)
        return result, seconds

    @contextmanager
    def _timed(self, spent: dict[str, float]) -> Iterator[None]:
        def begin(name: str, *_: object) -> None:
            spent[name] = -self._now()

        def end(name: str, *_: object) -> None:
            spent[name] += self._now()

        present = {} if self.whole else dict(self.model.named_modules())
        blocks = {name: present[name] for name in self.shapes if name in present}
        hooks = [
            hook
            for name, block in blocks.items()
            for hook in (
                block.register_forward_pre_hook(partial(begin, name)),
                block.register_forward_hook(partial(end, name)),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@torch.no_grad()
def ask(clock: Clock, prompt: int, tokens: int) -> Seconds:
    """Times one question: an image and text of `prompt` tokens, `tokens` of the answer."""
    model = clock.model
    text, side = model.config.text_config, model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side).to(model.device, torch.bfloat16)
    ids = torch.randint(text.vocab_size, (1, prompt), device=model.device)

    def features() -> Tensor:
        return torch.cat(tuple(model.model.get_image_features(pixels).pooler_output))

    image, vision = clock(("vision_tower",), features)
    embedded = model.get_input_embeddings()(ids)
    embedded[0, : len(image)] = image
    cache = DynamicCache()
    read = partial(model.__call__, inputs_embeds=embedded, past_key_values=cache, logits_to_keep=1)
    _, prefill = clock(("language_model",), read)

    def answer(token: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache).logits.argmax(2)

    each: list[float] = []
    begun, token = time.perf_counter(), ids[:, -1:]
    while len(each) < 2 or (len(each) <= tokens and time.perf_counter() - begun < PACE):
        token, seconds = clock(("language_model",), partial(answer, token))
        each.append(seconds)
    # The first one brings weights into another layout.
    return Seconds(vision, prefill, statistics.median(each[1:]))


def shapes_of(built: LlavaArchitecture) -> dict[str, str]:
    """What each block of a model looks like, by name."""
    blocks = block_layers(meta_model(built, torch.bfloat16), True)
    return {name: str(block) for name, (_, block) in blocks.items()}


def side_by_side(
    model: str, variants: Sequence[Variant], repeats: int, prompt: int, device: str
) -> dict[Variant, list[Seconds]]:
    """Seconds of a question to the full model, extrapolated, one per variant in each repeat."""
    built = architecture(model)
    shapes = shapes_of(built)
    decoder = [shape for name, shape in shapes.items() if "language_model" in name]
    enough = 1 + max(decoder.index(shape) for shape in set(decoder))
    small = shortened(built, enough, 2)
    clocks: dict[Variant, Clock] = {}
    for variant in variants:
        placed = place(small, changer(model, variant), device)
        if clocks:  # what no variant changes needs to be there once
            first = next(iter(clocks.values())).model
            placed.set_input_embeddings(first.get_input_embeddings())
            placed.lm_head = first.lm_head
        clocks[variant] = Clock(placed, shapes, whole=False)
    found: dict[Variant, list[Seconds]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 1):
        for variant, clock in clocks.items():
            seconds = ask(clock, prompt, SIDE_BY_SIDE)
            if repeat:  # not the first, which warms up
                found[variant].append(seconds)
    return found


def whole(model: str, variant: Variant, layers: int, prompt: int, device: str) -> Whole:
    """Places all of a model and runs it through its first `layers` decoder layers."""
    if device == "cpu":
        prepare.keep_few_primitives()
    built = architecture(model)
    placed = place(built, changer(model, variant), device)
    weights = weight_bytes(placed)
    decoder = list(decoder_layers(placed).values())
    complete = layers >= len(decoder)
    if not complete:
        placed.model.language_model.layers = nn.ModuleList(decoder[:layers])
        placed.config.text_config.num_hidden_layers = layers
    clock = Clock(placed, shapes_of(built), complete)
    _give_back()
    with Stages(model, 1) as stages, stages.stage("ask"):
        ask(clock, prompt, TIMED)  # warms up, and may bring weights into another layout
        seconds = ask(clock, prompt, TIMED)
    peak = stages.costs["ask"]["peak_mib" if device == "cpu" else "gpu_peak_mib"] * MIB
    cached = fit.predict(
        built, configuration(model, FULL), FULL, prompt - image_tokens(built), TIMED
    ).cache
    peak += cached * (1 - min(layers, len(decoder)) / len(decoder))
    return Whole(seconds, weights, peak, complete)


def _give_back() -> None:
    """Returns to the system what the allocator keeps of freed memory, where it is glibc's.

    Making the layers leaves some behind; a process that loads packed shards has none of it.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(model: str, given: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """A model's rows: those of the CSV, and under other names what only the page shows."""
    built = architecture(model)
    count = built.text_config.num_hidden_layers
    text_tokens = given.prompt - image_tokens(built)
    if text_tokens < 1:
        raise UserError(f"--prompt: {model} needs more than its {image_tokens(built)} image tokens")
    peers = [PEER] if find_spec("bitsandbytes") else []
    sides = side_by_side(model, [*OURS, *peers, SIMULATED], given.repeats, given.prompt, device)
    simulated = sides.pop(SIMULATED)
    before = fit.without_model() if device == "cpu" else 0  # bytes of a process, none on a GPU
    rows: list[dict[str, Any]] = []
    for variant, repeats in sides.items():
        seconds = Seconds(*map(statistics.median, zip(*map(astuple, repeats), strict=True)))
        row: dict[str, Any] = {"model": model, "bits": variant.label, "method": variant.method}
        missing = "time"
        if variant != PEER:
            config = configuration(model, variant)
            need = fit.predict(built, config, variant, text_tokens, TIMED)
            predicted = before + need.total
            weights, peak, missing = need.weights, float(predicted), "time, memory"
            if predicted < _memory(given, device):
                expected = seconds.vision + seconds.prefill + (TIMED + 1) * seconds.token
                allowed = max(1, min(given.layers, int(count * PATIENCE / (2 * expected))))
                done = in_fresh_process(whole, model, variant, allowed, given.prompt, device)
                weights, peak = done.weights, done.peak
                seconds, missing = done.seconds, "" if done.complete else "time"
            row |= {
                "peak_memory_gib": peak / GIB,
                "weight_gib": weights / GIB,
                "predicted": predicted / GIB,
            }
        ratios = [full.over(own) for full, own in zip(sides[FULL], repeats, strict=True)]
        whole_ratios = [
            full.question / own.question for full, own in zip(sides[FULL], repeats, strict=True)
        ]
        row |= {
            "device": device,
            "threads": torch.get_num_threads(),
            "seconds_per_question": seconds.question,
            "vision_s": seconds.vision,
            "prefill_s": seconds.prefill,
            "decode_s": ANSWER * seconds.token,
            "tokens_per_s": 1 / seconds.token,
            "speed_ratio": statistics.median(whole_ratios),
            "speed_ratio_low": min(whole_ratios),
            "speed_ratio_high": max(whole_ratios),
            "extrapolated": missing,
            "prefill ratios": [ratio.prefill for ratio in ratios],
            "decoding ratios": [ratio.token for ratio in ratios],
            **_paper(model, variant),
        }
        rows.append(row)
    rows[0]["search"] = search_seconds(model, simulated, given.prompt)
    for row in rows:
        if "peak_memory_gib" in row:
            row["memory_ratio"] = rows[0]["peak_memory_gib"] / row["peak_memory_gib"]
    return rows


def search_seconds(model: str, simulated: Sequence[Seconds], prompt: int) -> Search:
    """What a search of every block's ranges takes, from what simulated layers took here.

    Each setting runs a layer on `SEARCH_TOKENS` tokens. Layer-wise search tries each percentile for
    each linear; joint search at most all settings of three linears together.
    """
    built = architecture(model)
    blocks = block_layers(meta_model(built, torch.bfloat16), True).values()
    once = {"language": 0.0, "vision": 0.0}
    once["language"] = statistics.median(s.prefill for s in simulated) * SEARCH_TOKENS / prompt
    once["vision"] = statistics.median(s.vision for s in simulated) * SEARCH_TOKENS
    once["vision"] /= image_tokens(built)
    flops = dict.fromkeys(once, 0.0)
    settings = {kind: [0, 0] for kind in once}
    for kind, block in blocks:
        part = "language" if kind == "language" else "vision"
        linears = quantizable(block).values()
        flops[part] += 2 * SEARCH_TOKENS * sum(linear.weight.numel() for linear in linears)
        runs, rest = divmod(len(linears), DEPTH)
        joint = runs * GRID**DEPTH + (GRID**rest if rest else 0)
        for index, count in enumerate((GRID * len(linears), joint)):
            settings[part][index] = max(settings[part][index], count)
    return Search(
        *(sum(once[part] * settings[part][index] for part in once) for index in (0, 1)),
        *(sum(flops[part] * settings[part][index] for part in once) for index in (0, 1)),
    )


def _memory(given: argparse.Namespace, device: str) -> float:
    """Bytes that a process may take."""
    if given.memory is not None:
        return given.memory * GIB
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _paper(model: str, variant: Variant) -> dict[str, Any]:
    """The paper's row; it has one for each method, and the form of Q-VLM's weights is uniform."""
    method = {"uniform": "Q-VLM"}.get(variant.method, variant.method)
    printed = published("table4")
    same = (printed["model"] == model) & (printed["bits"] == variant.label)
    names = {"time_hours": "hours", "memory_gib": "memory_gib", "accuracy": "accuracy"}
    return {
        f"paper_{name}": row[column]
        for row in printed[same & (printed["method"] == method)].to_dict("records")
        for column, name in names.items()
    } | ({"paper_model": label(model)} if (same & (printed["method"] == method)).any() else {})


def targets(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What W4A4 and W8A8 of LLaVA-13B should reach against bf16, and what they do."""
    own = {(row["bits"], row["method"]): row for row in rows if row["model"] == "llava_13b"}
    if not own:
        return []
    full, peer = own["FP", "FP"], own.get((PEER.label, PEER.method))
    found: list[list[str]] = []
    for method in ("uniform", PER_CHANNEL[0].method):
        four, eight = own["W4A4", method], own["W8A8", method]
        aims = [
            ("weights smaller, W4A4", 3.4, [full["weight_gib"] / four["weight_gib"]]),
            ("peak memory smaller, W4A4", 3.0, [four["memory_ratio"]]),
            ("decoding faster, W4A4", 3.5, four["decoding ratios"]),
            ("prefill faster, W4A4", 1.3, four["prefill ratios"]),
            ("decoding faster, W8A8", 1.7, eight["decoding ratios"]),
        ]
        if peer:
            both = zip(four["decoding ratios"], peer["decoding ratios"], strict=True)
            aims.append(("decoding against bitsandbytes NF4, W4A4", 1.0, [a / b for a, b in both]))
        found += [
            [
                *(name, method, f"{wanted:g}", spread(ratios)),
                "yes" if statistics.median(ratios) >= wanted else "no",
            ]
            for name, wanted, ratios in aims
        ]
    return found


def page(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace, device: str) -> str:
    """The page."""

    def number(row: Mapping[str, Any], key: str) -> str:
        return f"{row[key]:.2f}" if key in row else ""

    names = ("model", "bits", "method")
    measured = [
        [
            *(row[name] for name in names),
            *(number(row, key) for key in ("weight_gib", "peak_memory_gib")),
            *(number(row, key) for key in ("predicted", "memory_ratio", "vision_s", "prefill_s")),
            *(number(row, key) for key in ("tokens_per_s", "seconds_per_question")),
            row["extrapolated"],
            *(number(row, key) for key in ("paper_memory_gib", "paper_hours")),
        ]
        for row in rows
    ]
    faster = [
        [
            *(row[name] for name in names),
            *(spread(row[f"{part} ratios"]) for part in ("prefill", "decoding")),
            f"{row['speed_ratio']:.2f} ({row['speed_ratio_low']:.2f} to "
            f"{row['speed_ratio_high']:.2f})",
        ]
        for row in rows
    ]
    about = surroundings()
    hardware = about["hardware"]
    notes = [
        f"Command: `{shlex.join(['python', *sys.argv])}`",
        f"Revision: {revision_in_words(about['git'])}",
        f"{hardware['cpu']}, {hardware['memory_gib']} GiB, {rows[0]['threads']} threads; device "
        f"{device}{'; on a GPU: not measured' if device == 'cpu' else ''}.",
        f"A question is {given.prompt} tokens of image and text and {ANSWER} tokens of answer, of "
        f"which at most {SIDE_BY_SIDE} were timed for ratios and {TIMED} in whole models. "
        "Weights are random; there is no accuracy.",
        "FP is bf16. *uniform* is the form of every method but QLoRA's NormalFloat; beside it "
        "stands the paper's row of Q-VLM. Its activations are the default's: clusters of 128 "
        "sorted channels share a scale, and weights are grouped cluster by cluster. *per channel*: "
        "each has its scale, folded into the weights, as in the released code "
        "(`quantizer.language.granularity=per_channel`).",
        f"*paper* columns are what the paper prints, hours for {PUBLISHED_QUESTIONS:,} questions "
        "on its own hardware.",
        "Peak is the resident set of a fresh process while it answers, Python and its libraries "
        "included; *predicted* is the sum of `make fit` and what such a process takes without a "
        "model.",
        "*extrapolated*: time is what ran plus, for each layer that did not, what one of its shape "
        "took; memory is the prediction.",
        f"Ratios to bf16 are of {given.repeats} repeats side by side on a layer of each shape, "
        "extrapolated to all layers: median (lowest to highest). Above 1 is faster than bf16.",
    ]
    if not find_spec("bitsandbytes"):
        notes.append("bitsandbytes is not installed: its NF4 was not measured.")
    elif device == "cpu" and not find_spec("kernels"):
        notes.append("bitsandbytes ran without the kernel for CPUs that it looks for on a hub.")
    parts = [
        "# Table 4 at full scale, with random weights",
        bullets(notes),
        table(
            [
                *(*names, "weights GiB", "peak GiB", "predicted", "ratio", "vision s", "prefill s"),
                *("tokens/s", "s/question", "extrapolated", "paper GiB", "paper h"),
            ],
            measured,
            left=3,
        ),
        table([*names, "prefill", "decoding", "question"], faster, left=3),
    ]
    searches = {row["model"]: row["search"] for row in rows if "search" in row}
    parts += [
        "What a search of ranges would take, estimated: the number of settings times what a "
        f"simulated layer took here for {given.prompt} tokens, scaled to {SEARCH_TOKENS}. "
        "*jointly*: every setting of three linears at a time, the most that Q-VLM tries; it tries "
        "fewer where layers do not depend on each other, and what linears before the first change "
        "give is not computed again. Visual encoder optimisation is not in it. "
        + ("On a GPU: not measured; " if device == "cpu" else "")
        + "the products alone are so many operations (PFLOP), in float32.",
        table(
            ["model", "alone, h", "jointly, h", "alone, PFLOP", "jointly, PFLOP"],
            [
                [
                    model,
                    *(f"{seconds / 3600:.1f}" for seconds in (cost.alone, cost.jointly)),
                    *(f"{flops / 1e15:.1f}" for flops in (cost.alone_flops, cost.jointly_flops)),
                ]
                for model, cost in searches.items()
            ],
        ),
    ]
    reached = targets(rows)
    if reached:
        parts += [
            "Targets, LLaVA-13B:",
            table(["times", "activations", "target", "measured", "met"], reached, 2),
        ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=fit.MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=5, help="side by side")
    parser.add_argument("--layers", type=int, default=1000, help="decoder layers to run at most")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens, the image's included")
    parser.add_argument("--memory", type=float, help="GiB a whole model may take; default all free")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--out", type=Path, default=Path("results"))
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    try:
        if min(given.repeats, given.layers) < 1:
            raise UserError("--repeats and --layers: accepted are numbers from 1")
        device = prepare.find_device(given.device)
        for model in tqdm(given.models, desc="models", disable=None):
            rows += measure(model, given, device)
        frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
        csv = frame.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        text = page(rows, given, device)
        write_files({given.out / "table4_scale.csv": csv, given.out / "table4_scale.md": text})
        print(text, end="")
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
