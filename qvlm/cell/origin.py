"""What a cell writes into a packed checkpoint about its making, and how it is held to it."""

import copy
from collections.abc import Sequence
from dataclasses import asdict

from qvlm.cell.findings import Quantized
from qvlm.cell.identity import Cell
from qvlm.cell.settled import Settled
from qvlm.config.schema import RunConfig
from qvlm.errors import UserError
from qvlm.methods.base import MethodReport
from qvlm.models.loaded import LoadedModel
from qvlm.models.meta import meta_model
from qvlm.packing import ORIGIN, Encoding, Origin, read_origin, refutation
from qvlm.packing.origin import VERSION
from qvlm.quantization import LayerBits, expected_layers
from qvlm.records.record import plain
from qvlm.records.strict import build


def describe_origin(
    cell: Cell, loaded: LoadedModel, method_name: str, expected: Sequence[str], quantized: Quantized
) -> Origin:
    """Makes the content of `qvlm.json`; the names of the files are added when they are written.

    Args:
        cell: Cell that quantized the model.
        loaded: The model.
        method_name: Name of the method in tables.
        expected: Full names of the layers that must be packed.
        quantized: What quantizing the model found out.
    """
    return Origin(
        version=VERSION,
        hash=cell.hash,
        method=method_name,
        options=asdict(Settled.of(cell.config)),
        expected=list(expected),
        calibration_ids=quantized.calibration_ids,
        uncalibrated=quantized.uncalibrated,
        report=plain(asdict(quantized.report)),
        files=[],
        encoding=Encoding(loaded.image_fit, loaded.image_text, loaded.begins_with_bos),
    )


def quantized_by(origin: Origin) -> Quantized:
    """Returns what quantizing the model of a packed checkpoint found out.

    Raises:
        UserError: if the report of its method is not one.
    """
    try:
        report = build(MethodReport, origin.report, "report")
    except ValueError as error:
        raise UserError(f"save_packed: {ORIGIN} cannot be used: {error}.") from error
    return Quantized(report, origin.calibration_ids, origin.uncalibrated)


def expected_of(loaded: LoadedModel, config: RunConfig) -> list[str]:
    """Returns the layers of a packed checkpoint that must be packed, as its architecture has them.

    Args:
        loaded: Packed model.
        config: Configuration of the cell, with the options that the checkpoint settles.

    Raises:
        UserError: if the checkpoint itself expects other layers.
    """
    architecture = copy.deepcopy(loaded.model.config)
    whole = meta_model(architecture, loaded.model.dtype)
    expected = expected_layers(whole, config.quantizer.vision_tower)
    stated = read_origin(str(config.packed_source)).expected
    if stated != expected:
        raise UserError(
            f"model.packed: {config.packed_source} has a {ORIGIN} that cannot be used: it expects "
            f"{len(stated)} packed layers, and the model has {len(expected)} or others. Pack the "
            "model again."
        )
    return expected


def require_bits(loaded: LoadedModel, config: RunConfig, layers: Sequence[LayerBits]) -> None:
    """Makes sure that a packed checkpoint has the bits that it states.

    Args:
        loaded: Packed model.
        config: Configuration of the cell, with the options that the checkpoint settles.
        layers: Levels that were counted in its layers.

    Raises:
        UserError: if it does not.
    """
    weights, activations = config.bits.weights, config.bits.activations
    assert weights is not None
    assert activations is not None
    reason = refutation(loaded.model, layers, weights, activations)
    if reason is not None:
        raise UserError(
            f"model.packed: {config.packed_source} is not a {config.bits} model as its {ORIGIN} "
            f"states: {reason}. Pack the model again."
        )
