"""What a table about a family of vision-language models says.

A table holds names and nothing else: no code of a family is here, and nothing elsewhere asks which
family a model belongs to. What a test on the model itself can find out is left to the test: which
linears read a norm (`qvlm.methods.awq.rescaling`), whether experts are fused
(`qvlm.quantization.experts`), and which layers get arguments of their own
(`qvlm.quantization.tracing`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are, as full names of its modules.

    Attributes:
        model_type: Entry of config.json by which a checkpoint of the family is recognized.
        title: Name in messages.
        tower: List of the vision tower's blocks; None for a language model alone.
        projector: Modules between tower and language model, in the order of the data. A list of
            modules stands for each of its entries.
        decoder: List of the decoder layers.
        floats: Other parts that multiply or hold linears and stay in floating point, and why. A
            part need not exist in every checkpoint.
        stream: Parameters that enter the residual stream of the language model beside embeddings
            and projector, which a rotation of the stream has to rotate.
        unrotatable: Why no rotation of the stream is possible; empty if one is.
        image_marks: Input of the model that is one at the positions of image tokens; None if the
            model has none.
        processor: Family whose processor encodes texts and pictures in the same way, where that of
            this one needs packages for video; None is its own.
        own_positions: Whether the model counts positions in its own way, as M-RoPE does.
    """

    model_type: str
    title: str
    tower: str | None
    projector: tuple[str, ...]
    decoder: str = "model.language_model.layers"
    floats: Mapping[str, str] = field(default_factory=dict)
    stream: tuple[str, ...] = ()
    unrotatable: str = ""
    image_marks: str | None = None
    processor: str | None = None
    own_positions: bool = False
