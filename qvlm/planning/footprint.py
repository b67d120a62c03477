"""Predicts what a model takes in memory: `python -m qvlm.planning.footprint --budget 6`.

Three parts, in bytes, add up to what one question takes:

- weights: the tensors of the real modules, built on the meta device, where they have shapes and no
  memory. Packed layers replace the linears that are quantized (codes, scales, zero points);
  embeddings, head, norms and routers stay as they are.
- KV cache: of the prompt, the answer and the room that is allocated ahead (`qvlm.models.cache`),
  counted in the cache that such a model returns.
- activations: the most that is alive at once beside these while the model on the meta device
  encodes an image and reads the prompt. Packed execution adds the working memory of the packed
  layer that needs most (`PackedLinear.working_bytes`).

The prompt is a ScienceQA question of 344 text tokens and its image: 600 tokens for LLaVA at 224
pixels, whose image takes 256. Full precision is the dtype of conf/model, and one question is
answered at a time. Python, its libraries and the pixels are not counted.

The table shows measured bytes beside the predicted ones where there are any (`planning.measured`).
"""

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvlm.cell import inputs as prepare
from qvlm.command import folder, run_command
from qvlm.config.compose import CONF, from_hydra, register
from qvlm.config.schema import RunConfig, canonical
from qvlm.errors import UserError
from qvlm.markdown import table
from qvlm.models.architectures import architecture
from qvlm.models.cache import CACHE, ROOM
from qvlm.models.llava import Llava
from qvlm.models.meta import meta_model
from qvlm.models.mixture import MixtureOfExperts
from qvlm.models.networks import Architecture, LanguageModel, has_vision, image_tokens
from qvlm.packing.model import packed_layers, weight_bytes
from qvlm.packing.uncalibrated import put_empty_layers

GIB = 2**30
TEXT_TOKENS = 344
ANSWER_TOKENS = 64
# `make table4-scale`: prompt tokens, image included, and tokens of the timed answer.
SCALE_PROMPT, SCALE_ANSWER = 600, 4
# All but `hf`, which stands for any checkpoint, so that its size is not known.
MODELS = tuple(sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"hf"}))


@dataclass(frozen=True)
class Variant:
    """A bit width and a format of the weights.

    Attributes:
        bits: Option of conf/bits; "fp" is full precision.
        method: Name of the format as tables print it. "uniform" is the format of every method
            except QLoRA.
        granularity: Granularity of the language model's activations; None for the default.
    """

    bits: str
    method: str
    granularity: str | None = None

    @property
    def label(self) -> str:
        """Bit widths as tables print them."""
        return self.bits.upper()

    @property
    def normal_float(self) -> bool:
        """Whether the weights are in QLoRA's format, NormalFloat."""
        return self.method == "QLoRA"


FULL = Variant("fp", "FP")
VARIANTS = (
    FULL,
    *(Variant(bits, "uniform") for bits in ("w8a8", "w6a6", "w4a4")),
    Variant("w4a4", "QLoRA"),
)


@dataclass(frozen=True)
class Need:
    """What one question takes, in bytes."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the three parts."""
        return self.weights + self.cache + self.activations


def configuration(model: str, bits: str, granularity: str | None = None) -> RunConfig:
    """Returns the configuration of a cell.

    Args:
        model: Option of conf/model.
        bits: Option of conf/bits.
        granularity: Granularity of the language model's activations; None for the default.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={model}", f"bits={bits}", "method_name=rtn"]
        if granularity is not None:
            overrides.append(f"quantizer.language.granularity={granularity}")
        return canonical(from_hydra(compose("config", overrides)))


def predict(
    built: Architecture,
    config: RunConfig,
    variant: Variant,
    text_tokens: int = TEXT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Need:
    """Predicts what a model takes. Its weights need not be on this machine.

    Args:
        built: Architecture of the model.
        config: Configuration of a cell with this model and bit width.
        variant: Bit width and format of the weights.
        text_tokens: Tokens of the prompt beside those of its image.
        answer_tokens: Tokens of the answer, for which the cache has room as well, and for `ROOM`
            more, since it grows by as many.
    """
    dtype = getattr(torch, config.model.dtype)
    prompt = image_tokens(built) + text_tokens
    model = meta_model(built, dtype)
    cache, activations = _running(meta_model(built, dtype), prompt)
    if variant != FULL:
        quantization = prepare.quantization_config(config)
        put_empty_layers(model, quantization, variant.normal_float)
        layers = packed_layers(model).values()
        activations += max(layer.working_bytes(prompt) for layer in layers)
    positions = prompt + answer_tokens + ROOM
    return Need(weight_bytes(model), cache * positions // prompt, activations)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made in the block, for as long as they live.

    Args:
        known: Tensors that are not counted, and neither are views of them.

    Attributes:
        peak: Most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        # Kept alive, so that no other storage gets the id of one of these.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._sizes = dict.fromkeys(map(id, self._known), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and id(output.untyped_storage()) not in self._sizes:
                storage = output.untyped_storage()
                self._sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, id(storage))
        self.peak = max(self.peak, sum(self._sizes.values()))
        return outputs


class _OneExpert(nn.Module):
    """A mixture that sends every token to one expert: routing is unknown on the meta device."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.expert, self.top_k = mixture.experts[0], mixture.top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        copies = hidden_states.flatten(0, -2).repeat(self.top_k, 1)
        return self.expert(copies)[: len(copies) // self.top_k].view_as(hidden_states)


@torch.no_grad()
def _running(model: Llava | LanguageModel, prompt: int) -> tuple[int, int]:
    """Returns the bytes of the KV cache of a prompt and those of the activations beside it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MixtureOfExperts):
            model.set_submodule(name, _OneExpert(module))
    width = model.config.get_text_config().hidden_size
    kind = {"device": "meta", "dtype": model.dtype}
    with LiveBytes((*model.parameters(), *model.buffers())) as live:
        if has_vision(model.config):
            side = model.config.vision_config.image_size
            model.model.get_image_features(torch.empty(1, 3, side, side, **kind))
        embedded = torch.empty(1, prompt, width, **kind)
        layers = model(inputs_embeds=embedded, logits_to_keep=1, use_cache=True)[CACHE]
    cache = sum(part.nbytes for layer in layers.layers for part in (layer.keys, layer.values))
    return cache, live.peak - cache


def table_rows(
    models: Sequence[str], budget: float, text_tokens: int, runs: Path
) -> Iterator[list[str]]:
    """Yields the rows of the table, one per model and variant."""
    from qvlm.planning import measured  # needs the classes of this module

    found, peaks = measured.recorded(runs), measured.scale_rows(runs)
    bare = measured.without_model() if peaks else 0
    for model in models:
        built = architecture(model)
        for variant in VARIANTS:
            config = configuration(model, variant.bits)
            need = predict(built, config, variant, text_tokens)
            actual = found.get((model, variant.label, variant.method))
            if actual is None:
                actual = measured.packed_miniature(model, config, variant)
            sizes = (need.weights, need.cache, need.activations, need.total)
            process = ["not measured", ""]
            if (peak := peaks.get((model, variant.label, variant.method))) is not None:
                text = SCALE_PROMPT - image_tokens(built)
                expected = predict(built, config, variant, text, SCALE_ANSWER).total
                expected += bare if peak["device"] == "cpu" else 0
                process = _against(expected, round(float(peak["peak_memory_gib"]) * GIB))
            yield [
                *(model, variant.label, variant.method, *map(_gib, sizes)),
                "yes" if need.total <= budget * GIB else "no",
                *(["not measured", ""] if actual is None else _against(need.weights, actual)),
                *process,
            ]


def _against(predicted: int, actual: int) -> list[str]:
    return [_gib(actual), f"{100 * (predicted / actual - 1):+.1f} %"]


def _gib(count: int) -> str:
    return f"{count / GIB:.4f}" if count < GIB / 10 else f"{count / GIB:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qvlm.planning.footprint",
        description="Predicts what each model takes at each bit width, in GiB.",
    )
    parser.add_argument("--budget", type=float, default=6.0, help="available memory in GiB")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument(
        "--text-tokens", type=int, default=TEXT_TOKENS, help="text tokens of a question"
    )
    parser.add_argument(
        "--runs", type=folder, default=Path("results/runs"), help="folder of records"
    )

    def work(given: argparse.Namespace) -> None:
        if not given.budget > 0:
            raise UserError(f"--budget: {given.budget:g} is not above 0. Choose a number above 0.")
        if given.text_tokens < 1:
            raise UserError(
                f"--text-tokens: {given.text_tokens} is not at least 1. Choose a number from 1."
            )
        transformers.utils.logging.disable_progress_bar()
        header = ["model", "bits", "method", "weights", "KV cache", "activations", "sum"]
        header += [f"fits {given.budget:g} GiB", "weights measured", "prediction off by"]
        header += ["process measured", "prediction off by"]
        lines = list(table_rows(given.models, given.budget, given.text_tokens, given.runs))
        print(f"GiB for one question: {given.text_tokens} text tokens, an image and ", end="")
        print(f"{ANSWER_TOKENS} tokens of answer.\n")
        print(table(header, lines, left=3))

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
