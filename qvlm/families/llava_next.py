"""LLaVA-NeXT: LLaVA with an image in tiles, as many as its shape asks for.

A learned vector ends each row of features, and enters the language model beside them.
"""

from qvlm.families.family import Family

LLAVA_NEXT = Family(
    model_type="llava_next",
    title="LLaVA-NeXT",
    tower="model.vision_tower.encoder.layers",
    projector=("model.multi_modal_projector",),
    stream=("model.image_newline",),
)
