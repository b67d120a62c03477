"""What packed models take on a GPU: `make gpu`, prepared so that a few minutes of one suffice.

Random weights: time and memory do not depend on their values. In this order, the most important
first:

1. limits: how fast this card copies, and multiplies in bf16 and int8;
2. kernels: the products of every packed form against float64, on the shapes of LLaVA-13B, as a
   share of `accumulation_bound`; and the tiles that are fastest here;
3. models: whole LLaVA-13B and 7B, in bf16 and packed, with one and with 16 sequences. The decoder
   is `packing.llama` for all forms, bf16 included, replayed as CUDA graphs;
4. miniatures: whether the embedded models answer on the GPU as on the CPU;
5. methods: how long calibration and search of a 13B take, extrapolated from a few of its layers.

Each task appends its lines to `gpu.csv` when it is done, and is skipped when they are there, so it
can be stopped and continued anywhere; `gpu.md` is made of that file alone. `--minutes` is a budget
after which no further task begins. `--dry-run` does all of it in miniature sizes on a CPU, with
TRITON_INTERPRET=1.

ScienceQA's mix: 60 tokens of text, an image (256 tokens) for 48 % of the questions, 205 tokens of
answer. For comparison 600 and 64. It needs torch, transformers, triton, safetensors, accelerate,
pandas, psutil and hydra-core.
"""

import argparse
import copy
import csv
import gc
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qvlm.data import miniature
from qvlm.methods.awq import AWQ
from qvlm.methods.layerwise import LayerWise
from qvlm.methods.qvlm import QVLM
from qvlm.methods.rtn import RTN
from qvlm.models.hollow import skeleton
from qvlm.models.known import architecture, image_tokens
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.load import embedded, load_model
from qvlm.packing import PackedLinear, accumulation_bound, pack_model, weight_bytes
from qvlm.packing import triton_products as products
from qvlm.packing.llama import Decoder
from qvlm.packing.plan import blind
from qvlm.packing.triton_kernels import DECODING_ROWS, triton
from qvlm.quantization import Block, QuantizationConfig, QuantSpec, Walk
from qvlm.quantization.calibration import batch_by_length
from qvlm.quantization.layout import block_layers, quantizable
from qvlm.quantization.linear import QuantLinear
from qvlm.tables.markdown import table

COLUMNS = (
    *("section", "model", "form", "batch", "setting"),
    *("measure", "value", "unit", "note", "card", "versions"),
)
QUESTIONS, WITH_IMAGE = 4241, 0.48
TEXT, ANSWER = 60, 205
LONG, SHORT = 600, 64  # the prompt and the answer that the first rounds measured
PAPER_SEARCH_HOURS = 24.6


@dataclass(frozen=True)
class Form:
    """A packed form.

    Attributes:
        name: as the page prints it.
        bits: of weights and of activations.
        language: granularity of the language model's activations.
        normal_float: weights as in QLoRA.
    """

    name: str
    bits: int
    language: str
    normal_float: bool = False

    def specs(self, group: int) -> QuantizationConfig:
        """What is quantized how."""
        return QuantizationConfig(
            weight=QuantSpec(self.bits, "per_group", group, ranges="minmax"),
            language=QuantSpec(self.bits, self.language, group, ranges="minmax"),
            vision=QuantSpec(self.bits, "per_token", ranges="minmax"),
        )


BF16 = "bf16"
FORMS = (
    Form("W4A4 clusters", 4, "per_channel_group"),
    Form("W8A8 clusters", 8, "per_channel_group"),
    Form("NF4A4 clusters", 4, "per_channel_group", normal_float=True),
    Form("W4A4 per channel", 4, "per_channel"),
    Form("W8A8 per channel", 8, "per_channel"),
)
TOKEN = (Form("W4A4 per token", 4, "per_token"), Form("W8A8 per token", 8, "per_token"))


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    models: tuple[str, ...]
    group: int
    shapes: tuple[tuple[int, int], ...]  # of weights, [out, in]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    text: int
    answer: int
    long: int
    short: int
    repeats: int
    problems: int
    layers: tuple[int, int]  # of the decoder and the tower, for methods
    samples: int


FULL = Sizes(
    models=("llava_13b", "llava_7b"),
    group=128,
    shapes=((5120, 5120), (13824, 5120), (5120, 13824)),
    rows=(1, 4, 16, 316, 1024),
    batches=(1, 16),
    text=TEXT,
    answer=ANSWER,
    long=LONG,
    short=SHORT,
    repeats=7,
    problems=200,
    layers=(2, 2),
    samples=64,
)
TINY = Sizes(
    models=("tiny",),
    group=64,
    shapes=((16, 64),),
    rows=(1, 5),
    batches=(1,),
    text=2,
    answer=2,
    long=6,
    short=1,
    repeats=1,
    problems=2,
    layers=(1, 2),
    samples=2,
)


class Results:
    """The file of measured lines.

    Args:
        path: of the CSV.
        card: whose lines count as measured.
        versions: of the libraries.
    """

    def __init__(self, path: Path, card: str, versions: str) -> None:
        self.path, self.card, self.versions = path, card, versions
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        with path.open(encoding="utf-8", newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["unit"] is not None]

    def has(self, *task: object) -> bool:
        """Whether there are lines of a task (section, model, form, batch, setting)."""
        wanted = [*map(str, task), self.card]
        return any([row[name] for name in (*COLUMNS[:5], "card")] == wanted for row in self.rows)

    def add(self, task: Sequence[object], measures: dict[str, tuple[Any, str]], note: str) -> None:
        """Appends a task's lines at once."""
        rows = [
            dict(
                zip(
                    COLUMNS,
                    [*map(str, task), measure, str(value), unit, note, self.card, self.versions],
                    strict=True,
                )
            )
            for measure, (value, unit) in measures.items()
        ]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
        self.rows += rows
        shown = ", ".join(f"{name} {value} {unit}" for name, (value, unit) in measures.items())
        print(f"{' | '.join(map(str, task))}: {shown} {note}", flush=True)


@dataclass
class Bench:
    """A device, the sizes to measure on it, and where results go."""

    device: str
    sizes: Sizes
    results: Results
    ends: float
    failed: int = 0
    kept: list[Any] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        """Whether this is a GPU and not a dry run."""
        return self.device != "cpu"

    def do(
        self, *task: object, work: Callable[[], dict[str, tuple[Any, str]]], note: str = ""
    ) -> None:
        """Does a task whose lines are missing, while there is time; a failure is shown and kept."""
        if self.results.has(*task) or time.monotonic() > self.ends:
            return
        begun = time.monotonic()
        try:
            measures = work()
        except Exception:  # the other tasks must not be lost on a machine that is there for minutes
            self.failed += 1
            print(f"FAILED {task}", flush=True)
            traceback.print_exc()
            self.clear()
            return
        measures["seconds of this task"] = (f"{time.monotonic() - begun:.1f}", "s")
        self.results.add(task, measures, note)

    def clear(self) -> None:
        """Gives memory back, that of graphs included."""
        self.kept.clear()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """The median of some calls, after one to warm up."""
        call()
        times = []
        for _ in range(min(repeats or 100, self.sizes.repeats)):
            self.wait()
            begun = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def wait(self) -> None:
        """Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """What replays a call as a CUDA graph; on a CPU the call itself."""
        if not self.gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            call()
        self.kept.append((graph, call))  # and what the call reads, which the graph does not own
        return graph.replay

    def bf16(self) -> torch.dtype:
        """The type of models: Triton's interpreter cuts bf16 off instead of rounding."""
        return torch.bfloat16 if self.gpu else torch.float32


# Limits


def limits(bench: Bench) -> dict[str, tuple[Any, str]]:
    """What the card can do, measured."""
    count, size = (2**32, 8192) if bench.gpu else (2**16, 64)
    source = torch.randn(count // 4, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * count / bench.seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, size, size, device=bench.device).to(torch.bfloat16)
    multiplied = 2 * size**3 / bench.seconds(lambda: a @ b)
    c, d = torch.randint(-127, 127, (2, size, size), dtype=torch.int8, device=bench.device)
    integer = 2 * size**3 / bench.seconds(lambda: torch._int_mm(c, d.T))
    return {
        "copy, read and written": (f"{copied / 1e12:.3f}", "TB/s"),
        "bf16 product": (f"{multiplied / 1e12:.0f}", "TFLOP/s"),
        "int8 product": (f"{integer / 1e12:.0f}", "TOP/s"),
    }


# Kernels


def layer_of(bench: Bench, form: Form, shape: tuple[int, int]) -> PackedLinear:
    """A packed layer of a shape, with inputs as the language model's."""
    torch.manual_seed(sum(shape))
    linear = nn.Linear(shape[1], shape[0], bias=False, device=bench.device)
    specs = form.specs(bench.sizes.group)
    quantized = blind(linear, specs.weight, specs.language, form.normal_float)
    return PackedLinear.from_quantized(quantized, "triton")


@torch.no_grad()
def share_of_bound(layer: PackedLinear, x: Tensor) -> tuple[float, int]:
    """The largest error against float64, as a share of the bound, and wrong integers of the input.

    Scales of tokens are made on the CPU, as those of the reference are: PyTorch divides by a number
    on a GPU by multiplying with its reciprocal.
    """
    stored = layer._as_stored(x)
    form = layer.form
    if form.inputs == "token":
        steps, scale, _ = (part.to(x.device) for part in copy.deepcopy(layer).cpu()._steps(x.cpu()))
    else:
        steps, scale, _ = layer._steps(stored)
    wrong = 0
    if form.weight == "uniform":
        chunk = layer._chunk()
        assert chunk is not None
        grid = layer._input_grid(x)
        if form.inputs == "token":
            grid = products.token_grid(x, form.input_bits, form.ratio)
        planes = 8 // form.weight_bits
        q, sums = products.quantize(
            x, *grid, form.input_bits, planes, chunk, layer.order if form.ordered else None
        )
        found = q.transpose(1, 2).reshape(len(x), -1).float()
        if form.input_bits == 8:
            found += 128 - grid[1]
        wrong = int((found != steps).sum())
        wrong += int((steps.unflatten(1, (-1, chunk)).sum(2) != sums.T).sum())
    weight = layer._dequantized(slice(0, layer.out_features))
    expected = (steps.double() * scale.double()) @ weight.double().T
    error = (layer._fused(x, None).double() - expected).abs()
    return float((error / accumulation_bound(layer, x, "triton")).max()), wrong


def correctness(bench: Bench, form: Form) -> dict[str, tuple[Any, str]]:
    """All shapes and rows of a form."""
    largest, wrong, count = 0.0, 0, 0
    for shape in bench.sizes.shapes:
        layer = layer_of(bench, form, shape)
        for rows in bench.sizes.rows:
            x = torch.randn(rows, shape[1], device=bench.device)
            share, integers = share_of_bound(layer, x)
            # NaN is the largest
            largest = share if not share <= largest else largest
            wrong, count = wrong + integers, count + 1
            if not share <= 1 or integers:
                print(f"  {form.name} {shape} rows={rows}: {share} of the bound, {integers} wrong")
    return {
        "largest error / bound": (f"{largest:.3g}", "1"),
        "wrong integers of inputs": (wrong, "1"),
        "within the bound": ("yes" if largest <= 1 and not wrong else "NO", ""),
        "cases": (count, "1"),
    }


def candidates(product: str) -> list[products.Tile]:
    """Tiles to try."""
    if product == "float_few":
        return [
            products.Tile(*tile, 1)
            for tile in ((2, 8, 1), (4, 8, 1), (1, 8, 1), (8, 8, 4), (4, 16, 2))
        ]
    if product == "few":
        return [
            products.Tile(outputs, chunks, warps, 1)
            for outputs, chunks, warps in (
                *((1, 16, 4), (2, 8, 2), (2, 8, 4), (2, 16, 4), (2, 32, 4), (4, 4, 2), (4, 8, 2)),
                *((4, 8, 4), (4, 16, 4), (4, 16, 8), (8, 4, 4), (8, 8, 4), (8, 8, 8), (16, 4, 4)),
                *((1, 32, 4), (1, 64, 4), (4, 4, 1), (2, 8, 1), (4, 8, 1), (8, 8, 1), (1, 8, 1)),
                *((1, 16, 1), (2, 4, 1), (2, 16, 1), (1, 16, 2), (2, 16, 2), (4, 16, 2)),
            )
        ]
    if product.endswith("16"):
        return [
            products.Tile(outputs, 16, warps, stages)
            for outputs, warps, stages in (
                *((16, 1, 4), (16, 2, 4), (16, 4, 4), (32, 2, 4), (32, 4, 4), (32, 2, 6)),
                *((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 4), (32, 1, 5)),
            )
        ]
    return [
        products.Tile(outputs, rows, warps, stages)
        for outputs, rows, warps, stages in (
            *((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3)),
            *((128, 64, 4, 4), (128, 128, 8, 3)),
            *((64, 128, 4, 5), (256, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 3)),
            *((128, 32, 4, 3), (64, 32, 4, 4)),
        )
    ]


def tune(bench: Bench, key: tuple[str, int, int]) -> dict[str, tuple[Any, str]]:
    """The fastest tile of a product: the sum over the shapes of a layer of LLaVA-13B."""
    product, bits, most = key
    form = next(f for f in FORMS if f.bits == bits and f.normal_float == ("float" in product))
    rows = {DECODING_ROWS: 1, 16: 16}.get(most, 316)
    tried = candidates(product if rows != 16 else f"{product}16")
    if not bench.gpu:
        rows, tried = min(rows, 6), tried[:2]
    shapes = bench.sizes.shapes
    if bench.gpu:  # as they are joined
        shapes = ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824))
    layers = [layer_of(bench, form, shape) for shape in shapes]
    inputs = [torch.randn(rows, s[1], device=bench.device, dtype=bench.bf16()) for s in shapes]
    before = dict(products.TILES)
    _compile_all(bench, key, tried, layers[-1], inputs[-1])
    calls = [partial(layer._fused, x, None) for layer, x in zip(layers, inputs, strict=True)]
    found: dict[products.Tile, float] = {}
    for tile in tried:
        products.TILES[key] = tile
        try:
            found[tile] = _device_seconds(bench, calls)
        except Exception as error:  # too much shared memory, say
            print(f"  {key} {tile}: {str(error).splitlines()[0][:120]}")
    ranked = sorted(found, key=lambda tile: found[tile])
    for tile in ranked if product in ("few", "many") else ranked[:4]:
        print(f"  {key} {tile}: {1e6 * found[tile]:.1f} us", flush=True)
    products.TILES.update(before)
    best = ranked[0]
    products.TILES[key] = best
    stored = sum(weight_bytes(layer) for layer in layers)
    total = found[best]
    return {
        "tile": (f"{best.outputs} {best.other} {best.warps} {best.stages}", ""),
        "products of a layer": (f"{1e6 * total:.1f}", "us"),
        "weights read": (f"{stored / total / 1e12:.2f}", "TB/s"),
        "operations": (
            f"{2 * rows * sum(s[0] * s[1] for s in shapes) / total / 1e12:.1f}",
            "TOP/s",
        ),
    }


def _compile_all(
    bench: Bench, key: tuple[str, int, int], tiles: Sequence[products.Tile], layer: Any, x: Tensor
) -> None:
    """Compiles a product for all tiles at once, one thread each."""
    if not bench.gpu:
        return

    def build(tile: products.Tile) -> None:
        with suppress(Exception), torch.cuda.stream(torch.cuda.Stream()):
            form = layer.form
            if form.weight != "uniform":
                return
            chunk = layer._chunk()
            scale, zero_point = layer._input_grid(x)
            order: Any = layer.order if form.ordered else None
            q, sums = products.quantize(
                x, scale, zero_point, form.input_bits, 8 // form.weight_bits, chunk, order
            )
            products.multiply(
                q, sums, scale, zero_point, form.input_bits, layer.codes,
                layer.scale.view(torch.float32), layer.zero_point, form.weight_bits, chunk,
                x.dtype, form.folds, layer._sharing() == "group", None, layer._offsets(chunk), tile,
            )  # fmt: skip

    layer._fused(x, None)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(build, tiles))
    torch.cuda.synchronize()


def _device_seconds(bench: Bench, calls: Sequence[Callable[[], object]], loops: int = 10) -> float:
    """Seconds of some calls after another, in a graph; together they exceed the card's cache."""

    loops = loops if bench.gpu else 1

    def run() -> None:
        for _ in range(loops):
            for call in calls:
                call()

    return bench.seconds(bench.graph(run), 3 if bench.gpu else 1) / loops


# Whole models


def tiny() -> LlavaArchitecture:
    """An architecture for dry runs."""
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    return LlavaArchitecture(vision_config=vision, text_config=text, image_token_id=31)


def built_architecture(name: str) -> LlavaArchitecture:
    """The architecture of a name."""
    return tiny() if name == "tiny" else architecture(name)


def build(
    bench: Bench, name: str, form: Form | None, layers: tuple[int, int] | None = None
) -> Llava:
    """A model with random weights; the first block of each shape is made, the others are copies.

    Args:
        form: None is floating point.
        layers: of the decoder and the tower; None is all.
    """
    dtype, device = bench.bf16(), bench.device
    built = built_architecture(name)
    if layers is not None:
        text, vision = built.text_config, built.vision_config
        text.num_hidden_layers = min(layers[0], text.num_hidden_layers)
        vision.num_hidden_layers = min(layers[1], vision.num_hidden_layers)
    empty = copy.deepcopy(built)
    empty.text_config.num_hidden_layers = empty.vision_config.num_hidden_layers = 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Llava(empty)
        model = model.to(device).eval()
    finally:
        torch.set_default_dtype(before)
    for part in ("text_config", "vision_config"):
        getattr(model.config, part).num_hidden_layers = getattr(built, part).num_hidden_layers
    made: dict[str, nn.Module] = {}
    for path, (kind, block) in block_layers(skeleton(built, dtype), True).items():
        shape = str(block)
        if shape not in made:
            made[shape] = _drawn(bench, block, kind, form)
        block = copy.deepcopy(made[shape])
        parent, _, index = path.rpartition(".")
        if kind == "projector":
            model.set_submodule(path, block)
            continue
        attention: Any = block.self_attn
        attention.layer_idx = int(index)
        holder: Any = model.get_submodule(parent)
        holder.append(block)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _drawn(bench: Bench, block: nn.Module, kind: str, form: Form | None) -> nn.Module:
    block = block.to_empty(device=bench.device).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    if form is None:
        return block
    specs = form.specs(bench.sizes.group)
    for name, linear in quantizable(block).items():
        torch.manual_seed(linear.in_features)  # those that read the same input quantize it alike
        quantized = blind(linear, specs.weight, specs.activation(kind), form.normal_float)
        block.set_submodule(name, PackedLinear.from_quantized(quantized))
    return block


class Built:
    """A model that is built when it is first needed."""

    def __init__(self, bench: Bench, name: str, form: Form | None) -> None:
        self.bench, self.name, self.form = bench, name, form

    @cached_property
    def model(self) -> Llava:
        """The model."""
        self.bench.clear()
        return build(self.bench, self.name, self.form)


@torch.no_grad()
def vision_seconds(built: Built) -> dict[str, tuple[Any, str]]:
    """The tower and the projector, one image."""
    bench, model = built.bench, built.model
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device=bench.device, dtype=bench.bf16())

    def encode() -> None:
        model.model.get_image_features(pixels)

    eager = bench.seconds(encode)
    return {
        "image": (f"{1e3 * bench.seconds(bench.graph(encode)):.3f}", "ms"),
        "image, without a graph": (f"{1e3 * eager:.3f}", "ms"),
    }


@torch.no_grad()
def answer_seconds(
    built: Built, batch: int, prompts: Sequence[int], answer: int
) -> dict[str, tuple[Any, str]]:
    """Prefill of prompts and decoding of answers after the first of them."""
    bench, model = built.bench, built.model
    bench.clear()
    decoder = Decoder(model, batch, max(prompts) + answer + 8)
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    embedding = model.get_input_embeddings()
    vocabulary = model.config.text_config.vocab_size
    measures: dict[str, tuple[Any, str]] = {}
    readers = []
    for prompt in prompts:
        ids = torch.randint(vocabulary, (batch, prompt), device=bench.device)
        readers.append(bench.graph(partial(decoder.read, embedding(ids))))
        milliseconds = 1e3 * bench.seconds(readers[-1])
        measures[f"prefill of {prompt}"] = (f"{milliseconds:.3f}", "ms")
    step = bench.graph(decoder.step)
    each = []
    for _ in range(3 if bench.gpu else 1):
        readers[0]()
        bench.wait()
        begun = time.perf_counter()
        for _ in range(answer):
            step()
        bench.wait()
        each.append((time.perf_counter() - begun) / answer)
        decoder.check()
    token = statistics.median(each)
    measures |= {
        "token": (f"{1e3 * token:.4f}", "ms"),
        "token, spread": (f"{1e3 * (max(each) - min(each)):.4f}", "ms"),
        "decoding": (f"{batch / token:.1f}", "tokens/s"),
        "weights": (f"{weight_bytes(model) / 2**30:.3f}", "GiB"),
    }
    if bench.gpu:
        measures["peak memory"] = (f"{torch.cuda.max_memory_allocated() / 2**30:.3f}", "GiB")
    return measures


@torch.no_grad()
def overlap_seconds(built: Built, prompt: int, tokens: int = 32) -> dict[str, tuple[Any, str]]:
    """A token with launches that overlap and that do not, and whether they say the same."""
    bench, model = built.bench, built.model
    tokens = tokens if bench.gpu else 1
    decoder = Decoder(model, 1, prompt + tokens + 8)
    ids = torch.randint(model.config.text_config.vocab_size, (1, prompt), device=bench.device)
    embedded_ids = model.get_input_embeddings()(ids)
    found: dict[bool, tuple[float, Tensor]] = {}
    for overlap in (False, True):
        products.OVERLAP = overlap
        try:
            step = bench.graph(decoder.step)
            decoder.read(embedded_ids)
            bench.wait()
            begun = time.perf_counter()
            logits = []
            for _ in range(tokens):
                step()
                logits.append(decoder.logits.clone())
            bench.wait()
            found[overlap] = (time.perf_counter() - begun) / tokens, torch.cat(logits)
        finally:
            products.OVERLAP = True
    same = torch.equal(found[False][1], found[True][1])
    return {
        "token, launches apart": (f"{1e3 * found[False][0]:.4f}", "ms"),
        "token, launches overlapping": (f"{1e3 * found[True][0]:.4f}", "ms"),
        "same logits": ("yes" if same else "NO", ""),
    }


def models(bench: Bench, names: Sequence[str]) -> None:
    """All forms of some models."""
    sizes = bench.sizes
    for name in names:
        image = image_tokens(built_architecture(name))
        mix = f"{sizes.text}+{image} and {sizes.answer}"
        long = f"{sizes.long} and {sizes.short}"
        for form in (None, *FORMS):
            title = form.name if form else BF16
            built = Built(bench, name, form)
            for batch in sizes.batches:
                prompts = (sizes.text + image, sizes.text)
                bench.do(
                    *("model", name, title, batch, mix),
                    work=partial(answer_seconds, built, batch, prompts, sizes.answer),
                )
                if batch == 1 and form == FORMS[0]:
                    bench.do(
                        *("overlap", name, title, batch, mix),
                        work=partial(overlap_seconds, built, prompts[0]),
                    )
                if batch == 1:
                    bench.do(
                        *("model", name, title, batch, long),
                        work=partial(answer_seconds, built, batch, (sizes.long,), sizes.short),
                    )
            bench.do("vision", name, title, 1, "one image", work=partial(vision_seconds, built))
            del built
            bench.clear()


# Miniatures


@torch.no_grad()
def agreement(bench: Bench, name: str, packed: bool) -> dict[str, tuple[Any, str]]:
    """How many answers of a miniature are the same on both devices, token for token."""
    folder = embedded(name)
    assert folder is not None
    loaded = load_model(str(folder), name)
    count = bench.sizes.problems
    problems = list(islice(miniature.stream("test", 1), count))
    if packed:
        some = list(islice(miniature.stream("train", 1), 16 if bench.gpu else 2))
        quantization = QuantizationConfig(
            weight=QuantSpec(4, "per_group", 64),
            language=QuantSpec(4, "per_channel_group"),
            vision=QuantSpec(4, "per_token"),
        )
        RTN().quantize(Walk(loaded.model, batch_by_length(loaded, some, 8), quantization))
        pack_model(loaded.model)
    answers: list[list[str]] = []
    took: list[float] = []
    options = {
        "max_new_tokens": 64,
        "do_sample": False,
        "eos_token_id": loaded.tokenizer.eos_token_id,
        "pad_token_id": loaded.tokenizer.pad_token_id,
    }
    torch.backends.cudnn.allow_tf32 = False
    for device in ("cpu", bench.device):
        loaded.model.to(device)
        found: list[str] = []
        begun = time.perf_counter()
        for start in range(0, count, 50):
            batch = loaded.encode(problems[start : start + 50])
            model: Any = loaded.model
            ids = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
            found += loaded.decode(ids.cpu())
        took.append(time.perf_counter() - begun)
        answers.append(found)
    same = sum(a == b for a, b in zip(*answers, strict=True))
    choices = [
        [
            loaded.prompting.parse(text, len(problem["choices"]))
            for text, problem in zip(found, problems, strict=True)
        ]
        for found in answers
    ]
    alike = sum(a == b for a, b in zip(*choices, strict=True))
    return {
        "same answers": (same, f"of {count}"),
        "same choices": (alike, f"of {count}"),
        "CPU": (f"{took[0]:.1f}", "s"),
        "GPU": (f"{took[1]:.1f}", "s"),
    }


def miniatures(bench: Bench) -> None:
    """Both miniatures, in full precision and packed."""
    for name in ("mini_llava", "mini_moe_llava") if bench.gpu else ("mini_llava",):
        for packed in (False, True):
            title = "W4A4 packed" if packed else "full precision"
            bench.do(
                *("miniature", name, title, 50, "answers"),
                work=partial(agreement, bench, name, packed),
            )


# Methods


class TimedWalk(Walk):
    """A walk that notes how long each block was worked on."""

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """As `Walk.blocks`."""
        for block in super().blocks(partition):
            begun = time.perf_counter()
            yield block
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            kind = self.spent.setdefault(block.kind, {})
            kind[block.name] = kind.get(block.name, 0.0) + time.perf_counter() - begun

    spent: dict[str, dict[str, float]]


def method_seconds(bench: Bench, name: str, method: Any) -> dict[str, tuple[Any, str]]:
    """Quantizes a few layers of a model, and what all of them would take."""
    bench.clear()
    sizes = bench.sizes
    model = build(bench, name, None, sizes.layers)
    whole = built_architecture(name)
    image = image_tokens(whole)
    side = whole.vision_config.image_size
    batch = min(8, sizes.samples)
    torch.manual_seed(0)
    batches = []
    for _ in range(sizes.samples // batch):
        ids = torch.randint(whole.text_config.vocab_size - 1, (batch, image + sizes.text))
        ids[:, 1 : 1 + image] = whole.image_token_id
        pixels = torch.randn(batch, 3, side, side, device=bench.device, dtype=bench.bf16())
        batches.append({"input_ids": ids.to(bench.device), "pixel_values": pixels})
    specs = FORMS[0].specs(sizes.group)
    specs = replace(
        specs,
        weight=replace(specs.weight, ranges="lp"),
        language=replace(specs.language, ranges="lp"),
        vision=replace(specs.vision, ranges="lp"),
    )
    walk = TimedWalk(model, batches, specs)
    walk.spent = {}
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    report = method.quantize(walk)
    bench.wait()
    seconds = time.perf_counter() - begun
    assert all(
        isinstance(block.get_submodule(path), QuantLinear) or not path
        for _, block in block_layers(model, True).values()
        for path, part in block.named_modules()
        if isinstance(part, QuantLinear)
    )
    counts = {
        "language": whole.text_config.num_hidden_layers,
        "vision": whole.vision_config.num_hidden_layers,
        "projector": 1,
    }
    per = {kind: statistics.fmean(found.values()) for kind, found in walk.spent.items()}
    inside = sum(sum(found.values()) for found in walk.spent.values())
    total = seconds - inside + sum(counts[kind] * per[kind] for kind in per)
    measures: dict[str, tuple[Any, str]] = {
        "measured": (f"{seconds:.1f}", "s"),
        "decoder layer": (f"{per['language']:.2f}", "s"),
        "vision layer": (f"{per['vision']:.2f}", "s"),
        "candidates": (report.candidates, "1"),
        "all layers, extrapolated": (f"{total:.0f}", "s"),
        "all layers, extrapolated, GPU": (f"{total / 3600:.3f}", "h"),
    }
    if bench.gpu:
        measures["peak memory"] = (f"{torch.cuda.max_memory_allocated() / 2**30:.2f}", "GiB")
    return measures


def methods(bench: Bench) -> None:
    """Search of a 13B."""
    name = bench.sizes.models[0]
    made: dict[str, Callable[[], Any]] = {
        "Q-VLM, CDM only": lambda: QVLM(veo=False),
        "Layer-wise": LayerWise,
        "AWQ": AWQ,
    }
    decoder, tower = bench.sizes.layers
    for title, method in made.items():
        bench.do(
            *("method", name, title, bench.sizes.samples, f"{decoder} + {tower} layers"),
            work=lambda method=method: method_seconds(bench, name, method()),  # type: ignore[misc]
            note="extrapolated from the layers that ran",
        )


# The page


def page(frame: pd.DataFrame, command: str) -> str:
    """The page of all measured lines."""
    if frame.empty:
        return "# On a GPU\n\nNo GPU was measured.\n"
    parts = [
        "# On a GPU",
        "Random weights in the true architectures: time and memory do not depend on their values. "
        "All forms, bf16 included, run in the same decoder with CUDA graphs "
        "(`qvlm/packing/llama.py`), so that ratios compare the products. A ratio is the time or "
        "the memory of bf16 divided by that of the form. Methods ran on a few layers; *all layers* "
        "is extrapolated from them.",
        f"- Command: `{command}`\n- Cards: {', '.join(frame['card'].unique())}\n"
        f"- Versions: {', '.join(frame['versions'].unique())}",
    ]
    for card, lines in frame.groupby("card", sort=False):
        parts += [f"## {card}", *goals(lines), *_sections(lines)]
    return "\n\n".join(parts) + "\n"


def goals(lines: pd.DataFrame) -> Iterator[str]:
    """What LLaVA-13B in W4A4 should reach, one question at a time, and what it does."""
    mix = f"{TEXT}+256 and {ANSWER}"
    own = lines[
        (lines["model"] == "llava_13b") & (lines["setting"] == mix) & (lines["batch"] == "1")
    ]
    found = {
        (form, measure): float(value)
        for form, measure, value in own[["form", "measure", "value"]].itertuples(index=False)
        if measure in ("token", "decoding", f"prefill of {TEXT + 256}", "weights")
    }
    form = FORMS[0].name
    wanted = (
        ("decoding, times bf16", "token", 3.0),
        ("prefill, times bf16", f"prefill of {TEXT + 256}", 1.5),
        ("weights, times smaller", "weights", 3.4),
    )
    rows = []
    for title, measure, goal in wanted:
        if (form, measure) in found and (BF16, measure) in found:
            ratio = found[BF16, measure] / found[form, measure]
            rows.append([title, f"{goal}", f"{ratio:.2f}", "yes" if ratio >= goal else "no"])
    if (form, "decoding") in found:
        speed = found[form, "decoding"]
        rows.append(["tokens/s", "300", f"{speed:.0f}", "yes" if speed >= 300 else "no"])
    search = lines[lines["measure"] == "all layers, extrapolated, GPU"]
    for method, hours in search[["form", "value"]].itertuples(index=False):
        if str(method).startswith("Q-VLM"):
            title = f"hours of search (the paper: {PAPER_SEARCH_HOURS}), without VEO"
            rows.append([title, "1", hours, "yes" if float(hours) < 1 else "no"])
    tile = lines[lines["setting"] == " ".join(map(str, ("few", 4, DECODING_ROWS)))]
    if rows:
        yield f"### Goals: LLaVA-13B, {form}, one question at a time"
        yield table(["goal", "at least or most", "measured", "reached"], rows)
    layer: dict[Any, Any] = dict(tile[["measure", "value"]].itertuples(index=False))
    if rows and "products of a layer" in layer and (form, "token") in found:
        products_ms = 40 * float(layer["products of a layer"]) / 1e3
        yield (
            f"Of a token's {found[form, 'token']:.2f} ms the products of 40 layers, with the "
            f"quantization of their inputs, take {products_ms:.2f}, which read weights at "
            f"{layer['weights read']} TB/s. What is left to gain in decoding is the distance of "
            "that to the card's copy (below), and the other launches of a layer. Prefill is bound "
            "by what follows each chunk of 128 channels: its sum leaves the tensor cores, is "
            "scaled and added in float32. A stock product in bf16 or int8 does that once for all."
        )


def _sections(lines: pd.DataFrame) -> Iterator[str]:
    titles = {
        "limits": "### Limits, measured",
        "correctness": "### Products against float64",
        "tile": "### Products of a decoder layer of LLaVA-13B",
        "model": "### Whole models",
        "overlap": "### Programmatic dependent launch",
        "vision": "### One image: tower and projector",
        "miniature": "### Miniatures, GPU against CPU",
        "method": "### Methods on a 13B",
    }
    for section, title in titles.items():
        some = lines[lines["section"] == section]
        if some.empty:
            continue
        yield title
        if section == "model":
            yield from _models(some, lines)
            continue
        wide = some[some["measure"] != "seconds of this task"].copy()
        wide["shown"] = wide["value"].astype(str) + " " + wide["unit"].fillna("").replace("1", "")
        names = list(dict.fromkeys(wide["measure"]))
        head = [column for column in ("model", "form", "batch", "setting") if section != "limits"]
        rows = [
            [*(dict(zip(COLUMNS[1:5], key, strict=True))[column] for column in head),
             *(_one(part, measure) for measure in names)]
            for key, part in wide.groupby(list(COLUMNS[1:5]), sort=False)
        ]  # fmt: skip
        yield table([*head, *names], [list(map(str, row)) for row in rows])


def _one(part: pd.DataFrame, measure: str) -> str:
    found = part[part["measure"] == measure]["shown"]
    return str(found.iloc[-1]).strip() if len(found) else ""


def _models(some: pd.DataFrame, lines: pd.DataFrame) -> Iterator[str]:
    """Per model, batch and setting: the forms, with ratios to bf16."""
    values = {
        (*key, measure): value
        for *key, measure, value in some[[*COLUMNS[1:7]]].itertuples(index=False)
    }
    images = {
        (row["model"], row["form"]): float(row["value"])
        for row in lines[(lines["section"] == "vision") & (lines["measure"] == "image")].to_dict(
            "records"
        )
    }
    for (model, batch, setting), part in some.groupby(["model", "batch", "setting"], sort=False):
        yield f"**{model}, {batch} at a time, prompt and answer {setting} tokens**"
        prefills = [m for m in dict.fromkeys(part["measure"]) if str(m).startswith("prefill")]
        shown = [*prefills, "token", "decoding", "weights", "peak memory"]
        head = ["form"]
        for measure in shown:
            unit = part[part["measure"] == measure]["unit"]
            head += [f"{measure}, {unit.iloc[0] if len(unit) else ''}"]
            head += [] if measure == "peak memory" else ["ratio"]
        hours = len(prefills) == 2
        head += ["hours for 4,241 questions"] if hours else []
        rows = []
        ranked = [BF16, *(form.name for form in FORMS)]
        for form in sorted(dict.fromkeys(part["form"]), key=ranked.index):
            row = [str(form)]
            for measure in shown:
                own = values.get((model, form, batch, setting, measure))
                full = values.get((model, BF16, batch, setting, measure))
                row.append("" if own is None else str(own))
                if measure == "peak memory":
                    continue
                if own is None or full is None or not float(own) or not float(full):
                    row.append("")
                    continue
                ratio = float(full) / float(own)
                row.append(f"{1 / ratio if measure == 'decoding' else ratio:.2f}")
            if hours:
                image = images.get((model, form))
                read = [float(values[model, form, batch, setting, name]) for name in prefills]
                answer = int(str(setting).rpartition(" ")[2]) * float(
                    values[model, form, batch, setting, "token"]
                )
                if image is None:
                    row.append("")
                else:
                    mixed = (
                        WITH_IMAGE * (image * int(str(batch)) + read[0])
                        + (1 - WITH_IMAGE) * read[1]
                    )
                    row.append(f"{QUESTIONS / int(str(batch)) * (mixed + answer) / 3.6e6:.3f}")
            rows.append(row)
        yield table(head, rows)


def run(bench: Bench) -> None:
    """All tasks."""
    bench.do("limits", "", "", "", "", work=partial(limits, bench))
    for form in (FORMS[0], FORMS[2], FORMS[1], *FORMS[3:], *TOKEN):
        task = ("correctness", "", form.name, "", "shapes of LLaVA-13B")
        bench.do(*task, work=partial(correctness, bench, form))
    kept = {row["setting"]: row["value"] for row in bench.results.rows if row["measure"] == "tile"}
    for key in list(products.TILES):
        title = " ".join(map(str, key))
        if title in kept:
            products.TILES[key] = products.Tile(*map(int, kept[title].split()))
        else:
            bench.do("tile", "", "", "", title, work=partial(tune, bench, key))
    first, *others = bench.sizes.models
    models(bench, [first])
    miniatures(bench)
    methods(bench)
    models(bench, others)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="no task begins after them")
    parser.add_argument("--dry-run", action="store_true", help="miniature sizes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("results"))
    given = parser.parse_args(arguments)
    device = "cpu" if given.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("error: no GPU is at hand; --dry-run needs none", file=sys.stderr)
        return 2
    if given.dry_run and not triton.knobs.runtime.interpret:
        print("error: --dry-run needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    card = "dry run" if given.dry_run else torch.cuda.get_device_name()
    versions = (
        f"torch {torch.__version__}; triton {triton.__version__}; "
        f"transformers {transformers.__version__}; Python {platform.python_version()}"
    )
    results = Results(given.out / "gpu.csv", card, versions)
    sizes = TINY if given.dry_run else FULL
    bench = Bench(device, sizes, results, time.monotonic() + 60 * given.minutes)
    try:
        run(bench)
    finally:
        write_page(results, given)
    return 1 if bench.failed else 0


def write_page(results: Results, given: argparse.Namespace) -> None:
    """Makes the page of all lines that there are."""
    frame = pd.read_csv(results.path, dtype=str, keep_default_na=False)
    text = page(frame, "make gpu" if not given.dry_run else "experiments/gpu.py --dry-run")
    (given.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
