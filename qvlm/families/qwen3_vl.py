"""Qwen3-VL: features of several blocks of the tower enter as many decoder layers (DeepStack)."""

from dataclasses import replace

from qvlm.families.qwen2_vl import QWEN2_VL

QWEN3_VL = replace(
    QWEN2_VL,
    model_type="qwen3_vl",
    title="Qwen3-VL",
    projector=("model.visual.deepstack_merger_list", "model.visual.merger"),
)
