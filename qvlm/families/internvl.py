"""InternVL3 in transformers' format (the repositories that end in -hf)."""

from qvlm.families.family import Family

INTERNVL = Family(
    model_type="internvl",
    title="InternVL3",
    tower="model.vision_tower.encoder.layer",
    projector=("model.multi_modal_projector",),
)
