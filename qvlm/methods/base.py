"""The interface of a quantization method. To write one:

1. Add one file here with one class. The arguments of its constructor are the options that a user
   may set; check them there with `qvlm.validation`. A YAML file in `conf/method` names the class as
   `_target_` and lists the options.
2. `quantize` receives a `Walk` and asks it for its blocks, in the order of the data.
3. For each block, decide what each linear becomes. `block.quantize_linear` is the default that all
   methods share, with the ranges that every method starts from. Pass `input_quantizer` or `weights`
   to differ from it.
4. Try candidates with `block.replace`, `block.run` and `block.restore`, and compare their outputs
   with `block.float_outputs()`. `walk.blocks(partition)` joins several layers into one block.
   `walk.survey()`, before it, visits the float model.
5. Replace every linear of a block before you ask for the next one: the walk runs the block as it is
   then, and the proof of bits refuses a model that contains a float layer.
6. Return a `MethodReport` with the cost of the search and what a reader of the record should know.
7. Set `one_pass = False` if the method needs more than surveys and one walk: the whole model, or
   several layers at once. It is then refused where a model is streamed layer by layer.
8. Equal inputs and an equal seed must result in equal codes. No choice may depend on time or on
   global random state.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from qvlm.quantization.calibration import Walk


@dataclass(frozen=True)
class MethodReport:
    """What a method did, for the record.

    Attributes:
        search_seconds: CPU time of the process in seconds that the search took, which other
            processes on the machine do not disturb; 0 for a method without a search. All threads
            count.
        candidates: Number of settings that were evaluated on calibration data.
        details: Further results worth recording, as JSON-compatible values.
    """

    search_seconds: float = 0.0
    candidates: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to quantize a model.

    Attributes:
        name: Name of the method in tables.
    """

    name: str

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place."""
        ...
