"""What a method is. To write one:

1. One file here, one class; what a user may set are the arguments of its constructor, checked
   there (`UserError`). A YAML in `conf/method` names the class as `_target_` and lists them.
2. `quantize` receives a `Walk` and asks it for its blocks, in the order of the data.
3. Per block, decide what each linear becomes: `block.quantize_linear` is the shared default (the
   lp-minimal ranges that every method starts from); pass `input_quantizer` or `weights` to differ.
4. Candidates are tried with `block.replace`, `block.run` and `block.restore`; the target to
   compare with is `block.float_outputs()`. `walk.blocks(partition)` joins layers into one block;
   walking first without replacing anything is a look at the float model.
5. When the next block is asked for, every linear of the block must have been replaced: the walk
   runs it as it is, and the proof of bits refuses a model with a float layer left in it.
6. Return a `MethodReport`: what the search cost, and what a reader of the record should know.
7. A method that walks more than once, or needs the whole model, sets `one_pass = False`: it is
   refused where the model is streamed layer by layer.
8. Equal inputs and seed must give equal integers: no choice may hang on time or global random
   state.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from qvlm.quantization.calibration import Walk


@dataclass(frozen=True)
class MethodReport:
    """What a method did.

    Attributes:
        search_seconds: wall time of choosing parameters; 0 for a method that does not search.
        candidates: how many settings it evaluated on calibration data.
        details: anything else worth recording, as JSON-compatible values.
    """

    search_seconds: float = 0.0
    candidates: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to quantize a model.

    Attributes:
        name: as shown in tables.
    """

    name: str

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place."""
        ...
