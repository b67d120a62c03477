"""Idefics3: SigLIP, a linear connector that merges neighboring patches, and a LLaMA."""

from qvlm.families.family import Family

IDEFICS3 = Family(
    model_type="idefics3",
    title="Idefics3",
    tower="model.vision_model.encoder.layers",
    projector=("model.connector",),
    decoder="model.text_model.layers",
)
