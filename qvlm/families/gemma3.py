"""Gemma 3: SigLIP, a projection that is a bare parameter, and layers with a sliding window."""

from qvlm.families.family import Family

GEMMA3 = Family(
    model_type="gemma3",
    title="Gemma 3",
    tower="model.vision_tower.encoder.layers",
    projector=(),
    floats={
        "model.vision_tower.head": "the pooling head of SigLIP, whose output nothing reads",
        "model.multi_modal_projector": "a product with a bare parameter, which is not a linear",
    },
    unrotatable="a norm stands behind its attention and its MLP, in front of the residual stream",
    image_marks="token_type_ids",
)
