"""The quantized candidates of each linear: one per clipping percentile."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qvlm.methods.qlora import normal_float
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.quantization import (
    Block,
    Quantizer,
    QuantLinear,
    minmax,
    mse,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.ranges import RangeEstimator
from qvlm.quantization.spec import QuantSpec


def candidates(
    block: Block, samples: Mapping[str, Tensor], options: SearchOptions
) -> dict[str, list[QuantLinear]]:
    """Quantizes each linear with each percentile.

    Args:
        block: Block with its float linears.
        samples: What each linear read, [tokens, in].
        options: Grid of percentiles, and what they clip.

    Returns:
        Candidates of each linear, in the order of the grid. A linear that read no token has one
        candidate, the default that all methods share.
    """
    found: dict[str, list[QuantLinear]] = {}
    last: tuple[Tensor, list[Quantizer]] | None = None
    for name, read in samples.items():
        weight_spec, input_spec = block.spec(name)
        if len(read) == 0:
            found[name] = [
                block.quantize_linear(name, read, weights=weights_of(weight_spec, options))
            ]
            continue
        if last is None or not torch.equal(last[0], read):
            # Queries, keys and values read the same tensor: its ranges are estimated once.
            estimators = [_estimator(p, input_spec, options.clip) for p in options.percentiles]
            last = read, [block.input_quantizer(name, read, each) for each in estimators]
        found[name] = []
        for p, quantizer in zip(options.percentiles, last[1], strict=True):
            estimator = _estimator(p, weight_spec, options.clip) if options.clip_weights else None
            same = None
            clips = options.clip_weights and options.weights == "uniform"
            if found[name] and not clips and not quantizer.folds:
                same = found[name][0].weight_quantizer  # the same weight, with the same ranges

            def weights(
                weight: Tensor,
                same: Quantizer | None = same,
                spec: QuantSpec = weight_spec,
                estimator: RangeEstimator | None = estimator,
                inputs: Quantizer = quantizer,
            ) -> Quantizer:
                if same is not None:
                    return same
                if (normal := weights_of(spec, options)) is not None:
                    return normal(weight)
                return weight_quantizer(weight, spec, estimator, inputs)

            found[name].append(
                block.quantize_linear(name, read, input_quantizer=quantizer, weights=weights)
            )
    return found


def weights_of(spec: QuantSpec, options: SearchOptions) -> Callable[[Tensor], Quantizer] | None:
    """The function from a weight to its NormalFloat quantizer; None for the shared quantizer."""
    return normal_float(spec.bits) if options.weights == "normal_float" else None


def _estimator(p: float, spec: QuantSpec, clip: str) -> RangeEstimator | None:
    """The range estimator of a percentile; None is the one that every method starts from."""
    if p == 1:
        return None
    if clip == "percentile":
        return percentile(p)
    start, inner = mse if spec.ranges == "lp" else minmax, percentile(p)

    def tighter(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        (lo, hi), (low, high) = start(groups, spec), inner(groups, spec)
        return torch.maximum(lo, low), torch.minimum(hi, high)

    return tighter
