"""Measured memory, to put beside the predictions of `qvlm.planning.footprint`.

Weight bytes come from recorded runs of packed models, from `make table4-scale`, and from the
embedded miniatures, which are packed on the spot. `make table4-scale` also measured the peak memory
of whole processes, which includes what a process takes that has no model.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from torch import nn

from qvlm.cell import inputs as prepare
from qvlm.config.schema import RunConfig
from qvlm.models.load import embedded
from qvlm.packing.model import pack_model, weight_bytes
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.planning.footprint import FULL, GIB, Variant
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.records.record import find_records
from qvlm.runtime.processes import in_fresh_process

Key = tuple[str, str, str]  # model, bits as tables print them, format of the weights

# The format that a method's weights are packed to. Other methods may quantize other layers.
FORMATS = {"FP": "FP", "RTN": "uniform", "AWQ": "uniform", "Q-VLM": "uniform", "QLoRA": "QLoRA"}


def scale_rows(runs: Path) -> dict[Key, dict[str, Any]]:
    """Returns the rows of `table4_scale.csv` whose memory was measured, by `Key`.

    Args:
        runs: Folder of records; the table is in the folder that holds it.
    """
    scale = runs.parent / "table4_scale.csv"
    if not scale.is_file():
        return {}
    rows = pd.read_csv(scale, keep_default_na=False)
    rows = rows[(rows["weight_gib"] != "") & ~rows["extrapolated"].str.contains("memory")]
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    return {(row["model"], row["bits"], row["method"]): row for row in records}


def recorded(runs: Path) -> dict[Key, int]:
    """Returns weight bytes that were measured by recorded runs or `make table4-scale`, by `Key`.

    Args:
        runs: Folder of records.
    """
    found = {key: round(float(row["weight_gib"]) * GIB) for key, row in scale_rows(runs).items()}
    for record in find_records(runs):
        run, form = record.run, FORMATS.get(record.method)
        if "weight_bytes" in run and form and (form == "FP" or run["execution"] == "packed"):
            found[record.model, record.bits, form] = run["weight_bytes"]
    return found


def packed_miniature(model: str, config: RunConfig, variant: Variant) -> int | None:
    """Loads and packs an embedded miniature; returns its weight bytes, None for other models."""
    if not embedded(config.model.path):
        return None
    loaded = prepare.load(config, "cpu").model
    if variant != FULL:
        pack_blindly(loaded, config, variant)
    return weight_bytes(loaded)


def without_model() -> int:
    """Returns the resident bytes of a process that has loaded the libraries and no model."""
    return in_fresh_process(_resident)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def pack_blindly(model: nn.Module, config: RunConfig, variant: Variant) -> None:
    """Packs a real model without calibrating it; see `qvlm.packing.uncalibrated`."""
    quantization = prepare.quantization_config(config)
    for kind, block in block_layers(model, quantization.vision_tower).values():
        for name, linear in quantizable(block).items():
            inputs = quantization.activation(kind)
            block.set_submodule(
                name,
                quantize_uncalibrated(
                    linear, quantization.weights(kind), inputs, variant.normal_float
                ),
            )
    pack_model(model)
