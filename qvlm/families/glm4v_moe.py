"""GLM-4.5V: a tower for images of any size, and routed experts beside a shared one."""

from dataclasses import replace

from qvlm.families.qwen2_vl import QWEN2_VL

GLM4V_MOE = replace(QWEN2_VL, model_type="glm4v_moe", title="GLM-4.5V")
