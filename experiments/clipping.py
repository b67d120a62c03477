"""What static ranges clip, by kind of question: `python -m experiments.clipping`.

A model is rounded to nearest with static scales per channel, calibrated once on image-text pairs
and once on a sample of all problems. Then it reads test questions with their solutions. For
questions with and without an image, the table has the share of the energy (sum of squares) of the
inputs of projector and language model that lies outside the ranges.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import qvlm
from qvlm.command import run_command
from qvlm.data import miniature
from qvlm.markdown import table
from qvlm.quantization.hooks import hooked
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import UniformQuantizer

KINDS = ("with an image", "without")
SETS = {"only": "image-text pairs", "any": "all problems"}


def clipped_energy(x: Tensor, quantizer: UniformQuantizer) -> tuple[float, float]:
    """Returns the energy of an input [..., in] outside the ranges, and all of it."""
    exact = x.detach().double()
    low, high = (end * quantizer.scale for end in (quantizer.lowest, quantizer.highest))
    outside = exact - exact.maximum(low).minimum(high)
    return float(outside.square().sum()), float(exact.square().sum())


@torch.no_grad()
def measure(model: qvlm.Model, questions: int) -> dict[str, float]:
    """Returns the clipped share of the energy in percent, by kind of question.

    Args:
        model: Model whose language model has static scales per channel.
        questions: Number of questions of the miniature's test split.
    """
    network = model.loaded.model
    energy: Counter[str] = Counter()
    kind = KINDS[0]

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLinear)
        assert isinstance(layer.input_quantizer, UniformQuantizer)
        outside, whole = clipped_energy(args[0], layer.input_quantizer)
        energy[f"{kind}, clipped"] += outside  # type: ignore[assignment]
        energy[kind] += whole  # type: ignore[assignment]

    static = [
        layer
        for layer in network.modules()
        if isinstance(layer, QuantLinear) and layer.input_quantizer.folds
    ]
    with hooked(dict.fromkeys(static, look)):
        for problem in miniature.generate("test", questions, 0):
            kind = KINDS[problem["image"] is None]
            batch: Mapping[str, Tensor] = model.loaded.encode([problem], with_target=True)
            network(**{name: value for name, value in batch.items() if name != "labels"})
    return {kind: 100 * energy[f"{kind}, clipped"] / energy[kind] for kind in KINDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.clipping",
        description="Shows what static ranges clip, by kind of question.",
    )
    parser.add_argument("--models", nargs="+", default=["mini_llava", "mini_moe_llava"])
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--questions", type=int, default=400)

    def work(options: argparse.Namespace) -> None:
        rows = []
        for name in options.models:
            for images, words in SETS.items():
                model = qvlm.load(name)
                qvlm.quantize(model, "rtn", options.bits, f"calibration.images={images}")
                found = measure(model, options.questions)
                rows.append([name, words, *(f"{found[kind]:.3f}" for kind in KINDS)])
        header = ["model", "calibrated on", *(f"{kind}, % clipped" for kind in KINDS)]
        print(table(header, rows, left=2))

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
