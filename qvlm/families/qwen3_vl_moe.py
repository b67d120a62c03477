"""Qwen3-VL with a mixture of experts in its decoder layers, whose weights are fused."""

from dataclasses import replace

from qvlm.families.qwen3_vl import QWEN3_VL

QWEN3_VL_MOE = replace(QWEN3_VL, model_type="qwen3_vl_moe", title="Qwen3-VL-MoE")
