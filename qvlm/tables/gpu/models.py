"""Whole models with random weights: prefill, decoding, memory, and the vision tower."""

import statistics
import time
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from qvlm.models.architectures import architecture
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.networks import image_tokens
from qvlm.packing import PackedLinear, weight_bytes
from qvlm.packing.decoder import Decoder
from qvlm.packing.kernels import triton_launch
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.quantization.targets import quantizable
from qvlm.tables.gpu.bench import Bench, Measures
from qvlm.tables.gpu.forms import BF16, FORMS, W4A4, Form
from qvlm.tables.table4_scale.models import place, shortened


def built_architecture(name: str) -> LlavaArchitecture:
    """Returns the architecture of a name, or a tiny one for dry runs."""
    if name != "tiny":
        return architecture(name)
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


def build(
    bench: Bench, name: str, form: Form | None, layers: tuple[int, int] | None = None
) -> Llava:
    """Builds a model with random weights.

    Args:
        bench: Device of the model, and its floating-point type.
        name: Name of the architecture.
        form: Packed form; None is floating point.
        layers: Numbers of layers of decoder and tower; None is all.
    """
    built = built_architecture(name)
    if layers is not None:
        built = shortened(built, *layers)

    def change(kind: str, block: nn.Module) -> None:
        if form is None:
            return
        quantization = form.quantization(bench.sizes.group)
        inputs = quantization.activation(kind)
        for path, linear in quantizable(block).items():
            torch.manual_seed(linear.in_features)  # linears of one input quantize it alike
            quantized = quantize_uncalibrated(
                linear, quantization.weights(kind), inputs, form.normal_float
            )
            block.set_submodule(path, PackedLinear.from_quantized(quantized))

    return place(built, change, bench.device, bench.dtype)


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
def vision_seconds(built: Built) -> Measures:
    """Measures the tower and the projector with one image."""
    bench, model = built.bench, built.model
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, device=bench.device, dtype=bench.dtype)

    def encode() -> None:
        model.model.get_image_features(pixels)

    eager = bench.seconds(encode)
    return {
        "image": (f"{1e3 * bench.seconds(bench.graph(encode)):.3f}", "ms"),
        "image, without a graph": (f"{1e3 * eager:.3f}", "ms"),
    }


@torch.no_grad()
def answer_seconds(built: Built, batch: int, prompts: Sequence[int], answer: int) -> Measures:
    """Measures the prefill of prompts, and the decoding of answers after the first prompt.

    Args:
        built: Model.
        batch: Number of sequences.
        prompts: Numbers of tokens of the prompts.
        answer: Number of tokens of the answers.
    """
    bench, model = built.bench, built.model
    bench.clear()
    decoder = Decoder(model, batch, max(prompts) + answer + 8)
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    embedding = model.get_input_embeddings()
    vocabulary = model.config.text_config.vocab_size
    measures: dict[str, tuple[object, str]] = {}
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
def overlap_seconds(built: Built, prompt: int, tokens: int = 32) -> Measures:
    """Measures a token with and without overlapping launches, and compares the logits."""
    bench, model = built.bench, built.model
    tokens = tokens if bench.gpu else 1
    decoder = Decoder(model, 1, prompt + tokens + 8)
    ids = torch.randint(model.config.text_config.vocab_size, (1, prompt), device=bench.device)
    embedded = model.get_input_embeddings()(ids)
    found: dict[bool, tuple[float, Tensor]] = {}
    for overlap in (False, True):
        triton_launch.OVERLAP = overlap
        try:
            step = bench.graph(decoder.step)
            decoder.read(embedded)
            bench.wait()
            begun = time.perf_counter()
            logits = []
            for _ in range(tokens):
                step()
                logits.append(decoder.logits.clone())
            bench.wait()
            found[overlap] = (time.perf_counter() - begun) / tokens, torch.cat(logits)
        finally:
            triton_launch.OVERLAP = True
    same = torch.equal(found[False][1], found[True][1])
    return {
        "token, launches apart": (f"{1e3 * found[False][0]:.4f}", "ms"),
        "token, launches overlapping": (f"{1e3 * found[True][0]:.4f}", "ms"),
        "same logits": ("yes" if same else "NO", ""),
    }


def models(bench: Bench, names: Sequence[str]) -> None:
    """Measures all forms of some models."""
    sizes = bench.sizes
    for name in names:
        image = image_tokens(built_architecture(name))
        mix = f"{sizes.text}+{image} and {sizes.answer}"
        long = f"{sizes.long} and {sizes.short}"
        prompts = (sizes.text + image, sizes.text)
        for form in (None, *FORMS):
            title = form.name if form else BF16
            built = Built(bench, name, form)
            for batch in sizes.batches:
                bench.do(
                    *("model", name, title, batch, mix),
                    work=partial(answer_seconds, built, batch, prompts, sizes.answer),
                )
                if batch == 1 and form == W4A4:
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
