"""Reads every layer of a quantized checkpoint, and collects what is wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qvlm.errors import RunError, UserError
from qvlm.packing import ORIGIN, read_origin, refutation
from qvlm.proving import checks, experts
from qvlm.proving.checkpoint import open_checkpoint
from qvlm.proving.copies import Copies
from qvlm.proving.floats import FloatWeight, left_over
from qvlm.proving.formats import Format, Own
from qvlm.proving.stored import StoredWeight, UnreadableError
from qvlm.quantization import LayerBits, check_bits

_WHOLE = "checkpoint"  # what a fault of no single layer is a fault of


@dataclass(frozen=True)
class LayerProof:
    """What a quantized layer holds.

    Attributes:
        layer: Full name.
        shape: Shape of the weight.
        bits: Bits that the checkpoint says it has.
        values: Number of distinct codes in the layer.
        per_scale: Largest number of distinct codes that share a scale.
        sharing: Number of weights that share a scale.
        empty: Number of scales that are zero above weights that are zero as well.
        faults: What is wrong, a sentence each.
    """

    layer: str
    shape: tuple[int, ...] = ()
    bits: int = 0
    values: int = 0
    per_scale: int = 0
    sharing: int = 0
    count: int = 0
    empty: int = 0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proof:
    """What a checkpoint holds.

    Attributes:
        path: The checkpoint, as it was given.
        format: Name of its format.
        claim: What it says of itself.
        layers: Its quantized layers, in its own order.
        floats: Its tensors in floating point.
        faults: What is wrong with the checkpoint as a whole, by part.
        inputs: Codes that entered each product, where the model runs here.
        uncalibrated: Layers that no calibration token reached, where the checkpoint says so.
    """

    path: str
    format: str
    claim: str
    layers: list[LayerProof]
    floats: list[FloatWeight]
    faults: list[tuple[str, str]] = field(default_factory=list)
    inputs: list[LayerBits] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[tuple[str, str]]:
        """Everything that is wrong: the part, and what is wrong with it."""
        return [
            *self.faults,
            *((layer.layer, fault) for layer in self.layers for fault in layer.faults),
            *((tensor.name, tensor.fault) for tensor in self.floats if tensor.fault),
        ]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return bool(self.layers) and not self.found

    @property
    def float_share(self) -> float:
        """Share of the parameters that are in floating point, from 0 to 1."""
        left = sum(tensor.count for tensor in self.floats)
        return left / max(1, left + sum(layer.count for layer in self.layers))


def prove(path: str | Path, run: bool = True) -> Proof:
    """Opens a quantized checkpoint and looks at everything in it.

    Args:
        path: Folder with a config.json and safetensors, or GGUF file.
        run: Whether a packed checkpoint of qvlm is loaded as well, to count what enters each
            product.

    Raises:
        UserError: If it cannot be opened.
    """
    with _of_any_form(path):
        form = open_checkpoint(Path(path))
        names = form.layers()
        rows, scales = _read_layers(form, names)
        floats = left_over(form, names)
        every = dict.fromkeys([*names, *(part.name.removesuffix(".weight") for part in floats)])
        faults = [
            *((_WHOLE, fault) for fault in form.faults()),
            *experts.missing(every).items(),
            *experts.uncalibrated(scales).items(),
            *((_WHOLE, fault) for fault in _mostly_float(rows, floats)),
        ]
        claim = form.claim()
    inputs: list[LayerBits] = []
    uncalibrated: list[str] = []
    if run and isinstance(form, Own) and (Path(path) / ORIGIN).is_file():
        inputs, failures = _run(Path(path))
        faults += failures
        uncalibrated = read_origin(path).uncalibrated if inputs else []
    return Proof(str(path), form.name, claim, rows, floats, faults, inputs, uncalibrated)


@contextmanager
def _of_any_form(path: str | Path) -> Iterator[None]:
    """Turns what a checkpoint of another form than its format's raises into one sentence.

    Raises:
        UserError: If something other than a `UserError` or a `RunError` is raised.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # a configuration of unknown origin raises anything
        raise UserError(
            f"prove: {path} has a configuration or a tensor of another form than its format's "
            f"({_reason(error)}). Give a whole copy."
        ) from error


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _read_layers(form: Format, names: list[str]) -> tuple[list[LayerProof], dict[str, Tensor]]:
    """Returns what each layer holds, and its scales by name."""
    rows, scales, copies = [], {}, Copies()
    for name in names:
        try:
            weight = form.read(name)
            row = _looked_at(name, weight, copies)
        except UnreadableError as error:
            rows.append(LayerProof(name, faults=(str(error),)))
        except (UserError, RunError):
            raise
        except Exception as error:  # as above, and the other layers can still be read
            rows.append(LayerProof(name, faults=(f"it cannot be read ({_reason(error)})",)))
        else:
            rows.append(row)
            scales[name] = weight.scale
    return rows, scales


def _looked_at(name: str, weight: StoredWeight, copies: Copies) -> LayerProof:
    found = checks.counted(weight)
    return LayerProof(
        layer=name,
        shape=weight.shape,
        bits=weight.claimed_bits,
        values=found.values,
        per_scale=found.per_scale,
        sharing=weight.codes.shape[1],
        count=weight.count,
        empty=checks.empty_groups(weight),
        faults=(*checks.faults(weight, found), *copies.faults(name, weight)),
    )


def _mostly_float(rows: list[LayerProof], floats: list[FloatWeight]) -> list[str]:
    """Says so if more weights of linears are in floating point than are quantized."""
    if not rows:
        return ["it has no quantized layer"]
    left = sum(part.count for part in floats if part.kind in ("linear", "expert"))
    taken = sum(row.count for row in rows)
    if left <= taken:
        return []
    return [f"{left} weights of linears are in floating point, and {taken} are quantized"]


def _run(path: Path) -> tuple[list[LayerBits], list[tuple[str, str]]]:
    """Loads a packed checkpoint of qvlm and counts what enters each product.

    Returns:
        The counts, and what is wrong: the part, and what is wrong with it.
    """
    from qvlm import api

    try:
        model = api.load(path)
        layers = api.prove(model).layers
    except (UserError, RunError) as error:
        return [], [(_WHOLE, f"it does not run here: {error}")]
    sentence = "more values than its bits allow enter its product"
    found = [(name, sentence) for name in check_bits(layers)]
    weights, activations = model.bits.weights, model.bits.activations
    assert weights is not None
    assert activations is not None
    if reason := refutation(model.loaded.model, layers, weights, activations):
        found.append((_WHOLE, f"it is not a {model.bits} model as its {ORIGIN} says: {reason}"))
    return layers, found
