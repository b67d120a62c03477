"""Qwen2-VL: a tower for images of any size, a merger of four patches, and Qwen2 with M-RoPE."""

from qvlm.families.family import Family

QWEN2_VL = Family(
    model_type="qwen2_vl",
    title="Qwen2-VL",
    tower="model.visual.blocks",
    projector=("model.visual.merger",),
    image_marks="mm_token_type_ids",
    own_positions=True,
)
