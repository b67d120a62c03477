"""What the search of clipping percentiles tries, and the error that it minimizes.

Percentile 1.0 is the range that every method starts from (the MSE estimator's). Below 1, a scale
group is clipped at the quantiles 1 - p and p of its own calibration values *instead*, or, with
`clip="further"`, at whichever of the two ranges is tighter. An MSE range with exponent 0.5 is so
tight that hardly any percentile of the grid is tighter, and a search that can only tighten it finds
nothing. Quantiles of the distribution lie on both sides of it. Scales that are made per token take
the mean share of a token's range that lies between the two quantiles.

The output of a segment is, by default, that of the decoder layer that contains its last linear:
queries, keys and values do not form a sequence, and only there do their errors meet.
`output="block"` is the narrower reading of the paper: the output of the segment's last linear, and
of those in the segment that read the same input.

A sum of squared errors would be dominated by a few tokens of huge norm, so each token's error is
divided by the energy of its float output (`normalize`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qvlm import validation

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
EXHAUSTIVE = 5**3
OUTPUTS = ("layer", "block")
CLIPS = ("percentile", "further")
WEIGHTS = ("uniform", "normal_float")


def with_weights(name: str, weights: str) -> str:
    """The name of a method in tables, with its kind of weights if it is not the shared one."""
    return f"{name} (NormalFloat)" if weights == "normal_float" else name


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search; the module's docstring explains them.

    Args:
        percentiles: Grid of percentiles, tried in this order. Of equal errors the first wins.
        normalize: Whether a token's squared error is divided by the energy of its float output.
            The option of a method is spelled `normalise`.
        output: "layer" (the decoder layer's output) or "block" (the segment's own output).
        clip: "percentile" or "further".
        clip_weights: Whether the percentile clips the scale groups of the weight too.
        tokens: Approximate number of calibration tokens that the error is computed on, in whole
            batches. The option of a method is called `search_tokens`.
        weights: "uniform" for the shared weight quantizer, or "normal_float" for QLoRA's, which has
            no range to clip. Table 1 of the paper adds Q-VLM's parts to QLoRA.
        exhaustive: Largest number of settings of a segment that are all tried. Beyond it, the
            search is a coordinate descent.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    percentiles: Sequence[float] = PERCENTILES
    normalize: bool = True
    output: str = "layer"
    clip: str = "percentile"
    clip_weights: bool = True
    tokens: int = 4096
    weights: str = "uniform"
    exhaustive: int = EXHAUSTIVE

    def __post_init__(self) -> None:
        grid = self.percentiles
        if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid:
            raise validation.refused("method.percentiles", grid, "a list of at least one number")
        if not all(validation.is_number(p) and 0.5 < p <= 1 for p in grid):
            raise validation.refused(
                "method.percentiles", list(grid), "a list of numbers above 0.5 and up to 1"
            )
        validation.switch("method.normalise", self.normalize)
        validation.one_of("method.output", self.output, OUTPUTS)
        validation.one_of("method.clip", self.clip, CLIPS)
        validation.switch("method.clip_weights", self.clip_weights)
        validation.one_of("method.weights", self.weights, WEIGHTS)
        validation.whole_number("method.search_tokens", self.tokens)
        validation.whole_number("method.exhaustive", self.exhaustive)
