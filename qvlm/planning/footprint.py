"""Will it fit? `python -m qvlm.fit --budget 6` says what each model takes at each bit width.

Three parts, in bytes, add up to what a question takes:

- weights: the tensors of the real modules, built on the meta device, where they have shapes and no
  memory, with packed layers in the place of linears (codes, scales, zero points; embeddings, head,
  norms and routers stay as they are);
- KV cache: of prompt and answer, counted in the cache that such a model returns;
- activations: the most that is alive at once beside these, while the model on the meta device
  encodes an image and reads the prompt. The packed layer that takes most to work with adds that
  (`PackedLinear.working_bytes`).

The prompt is a ScienceQA question of 344 text tokens and its image: 600 tokens for LLaVA at 224
pixels, whose image takes 256. Full precision is the dtype of conf/model, and one question is
answered at a time. Not counted: Python and its libraries, and the pixels.

Beside the predicted weight bytes stand measured ones: those of recorded runs of packed models, of
`make table4-scale`, and of the embedded miniatures, which are packed on the spot. Where
`make table4-scale` measured the peak of a process that answers, it stands beside the prediction for
the same prompt, with what a process takes here that has no model.
"""

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvlm.cell import inputs as prepare
from qvlm.config.schema import CONF, RunConfig, canonical, from_hydra, register
from qvlm.errors import RunError, UserError
from qvlm.models.architectures import architecture
from qvlm.models.llava import Llava, LlavaArchitecture, image_tokens
from qvlm.models.load import embedded
from qvlm.models.meta import meta_model
from qvlm.models.mixture import MixtureOfExperts
from qvlm.packing.model import pack_model, packed_layers, weight_bytes
from qvlm.packing.plan import blind, plan
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.records.record import find_records
from qvlm.tables.cost import in_fresh_process
from qvlm.tables.markdown import table

GIB = 2**30
TEXT_TOKENS = 344
ANSWER_TOKENS = 64
# Of `make table4-scale`: image and text together, and the tokens of an answer that are timed.
SCALE_PROMPT, SCALE_ANSWER = 600, 4
# What the weights of a method are packed to; others may quantize other things than the default.
FORMS = {"FP": "FP", "RTN": "uniform", "AWQ": "uniform", "Q-VLM": "uniform", "QLoRA": "QLoRA"}
MODELS = tuple(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))


@dataclass(frozen=True)
class Variant:
    """A bit width and the kind of weights.

    Attributes:
        bits: an option of conf/bits; "fp" is full precision.
        method: as tables print it. "uniform" is the format of all methods but QLoRA.
        granularity: of the language model's activations; None is the default quantizer's.
    """

    bits: str
    method: str
    granularity: str | None = None

    @property
    def label(self) -> str:
        """As tables print the bits."""
        return self.bits.upper()

    @property
    def normal_float(self) -> bool:
        """Whether weights are QLoRA's."""
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
        """All of it."""
        return self.weights + self.cache + self.activations


def configuration(model: str, bits: str, granularity: str | None = None) -> RunConfig:
    """A cell's configuration, with the default quantizer, or activations of this granularity."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={model}", f"bits={bits}", "method_name=rtn"]
        if granularity is not None:
            overrides.append(f"quantizer.language.granularity={granularity}")
        return canonical(from_hydra(compose("config", overrides)))


def predict(
    built: LlavaArchitecture,
    config: RunConfig,
    variant: Variant,
    text_tokens: int = TEXT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Need:
    """What a model takes, without its weights.

    Args:
        built: its architecture.
        config: of a cell of this model and bit width.
        text_tokens: of the prompt, beside its image.
        answer_tokens: that the cache must hold besides.
    """
    dtype = getattr(torch, config.model.dtype)
    prompt = image_tokens(built) + text_tokens
    model = meta_model(built, dtype)
    cache, activations = _running(meta_model(built, dtype), prompt)
    if variant != FULL:
        quantization = prepare.quantization_config(config)
        plan(model, quantization, variant.normal_float)
        layers = packed_layers(model).values()
        activations += max(layer.working_bytes(prompt) for layer in layers)
    return Need(weight_bytes(model), cache * (prompt + answer_tokens) // prompt, activations)


def pack_blindly(model: nn.Module, config: RunConfig, variant: Variant) -> None:
    """Packs a model for real, uncalibrated: see `qvlm.packing.plan.blind`."""
    quantization = prepare.quantization_config(config)
    for kind, block in block_layers(model, quantization.vision_tower).values():
        for name, linear in quantizable(block).items():
            inputs = quantization.activation(kind)
            block.set_submodule(
                name, blind(linear, quantization.weight, inputs, variant.normal_float)
            )
    pack_model(model)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, as long as they live.

    Args:
        known: tensors that are not counted, nor are views of them.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = [
            tensor.untyped_storage() for tensor in known
        ]  # kept, so that ids stay theirs
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
    """A mixture all of whose tokens go to one expert: who goes where is unknown on meta."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.expert, self.top_k = mixture.experts[0], mixture.top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        copies = hidden_states.flatten(0, -2).repeat(self.top_k, 1)
        return self.expert(copies)[: len(copies) // self.top_k].view_as(hidden_states)


@torch.no_grad()
def _running(model: Llava, prompt: int) -> tuple[int, int]:
    """Bytes of the KV cache of a prompt, and of the activations beside it, on the meta device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MixtureOfExperts):
            model.set_submodule(name, _OneExpert(module))
    side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
    kind = {"device": "meta", "dtype": model.dtype}
    with LiveBytes((*model.parameters(), *model.buffers())) as live:
        model.model.get_image_features(torch.empty(1, 3, side, side, **kind))
        embedded = torch.empty(1, prompt, width, **kind)
        layers = model(inputs_embeds=embedded, logits_to_keep=1, use_cache=True).past_key_values
    cache = sum(part.nbytes for layer in layers.layers for part in (layer.keys, layer.values))
    return cache, live.peak - cache


def placed(runs: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows of `table4_scale.csv` beside the records whose memory was measured.

    By model, bits and kind of weights.
    """
    scale = runs.parent / "table4_scale.csv"
    if not scale.is_file():
        return {}
    rows = pd.read_csv(scale, keep_default_na=False)
    rows = rows[(rows["weight_gib"] != "") & ~rows["extrapolated"].str.contains("memory")]
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    return {(row["model"], row["bits"], row["method"]): row for row in records}


def recorded(runs: Path) -> dict[tuple[str, str, str], int]:
    """Measured weight bytes by model, bits and kind of weights.

    Args:
        runs: the folder of records; `table4_scale.csv` beside it counts too.
    """
    found = {key: round(float(row["weight_gib"]) * GIB) for key, row in placed(runs).items()}
    for run in (record.run for record in find_records(runs)):
        form = FORMS.get(run["method"])
        if "weight_bytes" in run and form and (form == "FP" or run["execution"] == "packed"):
            found[run["model"], run["bits"], form] = run["weight_bytes"]
    return found


def measured(model: str, config: RunConfig, variant: Variant) -> int | None:
    """Weight bytes of an embedded miniature, loaded and packed; None for a model not at hand."""
    if not embedded(config.model.path):
        return None
    loaded = prepare.load(config, "cpu").model
    if variant != FULL:
        pack_blindly(loaded, config, variant)
    return weight_bytes(loaded)


def without_model() -> int:
    """Bytes that a process on the CPU takes which has no model."""
    return in_fresh_process(_resident)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def rows(models: Sequence[str], budget: float, text_tokens: int, runs: Path) -> Iterator[list[str]]:
    """The table's rows."""
    found, peaks = recorded(runs), placed(runs)
    bare = without_model() if peaks else 0
    for model in models:
        built = architecture(model)
        for variant in VARIANTS:
            config = configuration(model, variant.bits)
            need = predict(built, config, variant, text_tokens)
            actual = found.get((model, variant.label, variant.method))
            if actual is None:
                actual = measured(model, config, variant)
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


def _against(predicted: int, measured: int) -> list[str]:
    return [_gib(measured), f"{100 * (predicted / measured - 1):+.1f} %"]


def _gib(count: int) -> str:
    return f"{count / GIB:.4f}" if count < GIB / 10 else f"{count / GIB:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qvlm.fit", description="What each model takes at each bit width, in GiB."
    )
    parser.add_argument("--budget", type=float, default=6.0, help="memory that there is, in GiB")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help="beside the image's")
    parser.add_argument("--runs", type=Path, default=Path("results/runs"), help="the records")
    given = parser.parse_args(arguments)
    try:
        if not given.budget > 0:
            raise UserError(f"--budget: {given.budget:g} is not accepted; give a number above 0")
        if given.text_tokens < 1:
            raise UserError(f"--text-tokens: {given.text_tokens}; accepted are numbers from 1")
        transformers.utils.logging.disable_progress_bar()
        header = ["model", "bits", "method", "weights", "KV cache", "activations", "sum"]
        header += [f"fits {given.budget:g} GiB", "weights measured", "prediction off by"]
        header += ["process measured", "prediction off by"]
        lines = list(rows(given.models, given.budget, given.text_tokens, given.runs))
        print(f"GiB for one question: {given.text_tokens} text tokens, an image and ", end="")
        print(f"{ANSWER_TOKENS} tokens of answer.\n")
        print(table(header, lines, left=3))
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
