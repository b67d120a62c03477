"""LLaVA-1.5 in transformers' format: CLIP, a projector of two layers, and a LLaMA."""

from qvlm.families.family import Family

LLAVA = Family(
    model_type="llava",
    title="LLaVA-1.5",
    tower="model.vision_tower.encoder.layers",
    projector=("model.multi_modal_projector",),
)
