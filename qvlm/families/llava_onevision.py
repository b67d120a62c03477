"""LLaVA-OneVision: SigLIP, a projector of two layers, and Qwen2. Images are cut into tiles."""

from qvlm.families.family import Family

LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    title="LLaVA-OneVision",
    tower="model.vision_tower.encoder.layers",
    projector=("model.multi_modal_projector",),
    floats={"model.vision_tower.head": "the pooling head of SigLIP, whose output nothing reads"},
    stream=("model.image_newline",),
)
