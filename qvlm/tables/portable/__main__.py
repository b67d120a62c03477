"""`python -m qvlm verify-portable` computes cells under every setting and compares them."""

import argparse
from collections.abc import Sequence

from qvlm.command import run_command
from qvlm.errors import RunError
from qvlm.markdown import table
from qvlm.tables.portable.settings import SETTINGS, differences, outcomes

MODELS = ("mini_llava", "mini_moe_llava")
METHODS = (
    *("rtn", "awq", "qlora", "zeroquant", "layerwise", "qvlm"),
    *("smoothquant", "gptq", "quarot", "roco"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser("qvlm verify-portable", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="overrides of every cell, such as bits=w6a6")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods (conf/method)")
    parser.add_argument("--command", help=argparse.SUPPRESS)

    def work(options: argparse.Namespace) -> None:
        cells = [
            [f"model={model}", f"method={method}", *options.overrides]
            for model in options.models
            for method in options.methods
        ]
        _compare(cells)

    return run_command(parser, work, arguments)


def _compare(cells: Sequence[Sequence[str]]) -> None:
    """Computes the cells under each setting and prints where they differ from the first.

    Raises:
        RunError: If anything differs.
    """
    first, *others = SETTINGS
    reference = []
    for outcome in outcomes(first, cells, packed="every"):
        reference.append(outcome)
        found = differences(outcome, outcome)
        print(_line(first.name, outcome.cell, found), flush=True)
    rows, unequal = [], sum(bool(differences(outcome, outcome)) for outcome in reference)
    for setting in others:
        differing = 0
        for expected, outcome in zip(reference, outcomes(setting, cells), strict=True):
            found = differences(expected, outcome)
            differing += bool(found)
            print(_line(setting.name, outcome.cell, found), flush=True)
        rows.append([setting.name, str(len(cells)), str(differing)])
        unequal += differing
    print("\n" + table(["setting", "cells", "that differ"], rows))
    tensors = sum(len(outcome.tensors) for outcome in reference)
    answers = sum(len(outcome.answers["simulated"]) for outcome in reference)
    print(f"\nCompared under each setting: {tensors:,} tensors and {answers:,} answers.")
    if unequal:
        raise RunError(f"{unequal} cells differ; they are named above.")


def _line(setting: str, cell: Sequence[str], found: Sequence[str]) -> str:
    return f"{setting}: {' '.join(cell)}: {'; '.join(found) or 'equal'}"


if __name__ == "__main__":
    raise SystemExit(main())
