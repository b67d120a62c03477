"""Qwen2.5-VL: as Qwen2-VL, with attention in windows in most blocks of the tower."""

from dataclasses import replace

from qvlm.families.qwen2_vl import QWEN2_VL

QWEN2_5_VL = replace(QWEN2_VL, model_type="qwen2_5_vl", title="Qwen2.5-VL")
