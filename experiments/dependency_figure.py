"""Figures 2 and 5: does the dependency of layers predict what a joint search gains?

`python -m experiments.dependency_figure` takes calibration problems one by one. For each problem it
measures three decoder layers of the floating-point model, with ranges from that problem alone:

- The discretization error difference (DED) is the error of the layer's output with percentiles
  found layer by layer, minus the error with percentiles found jointly, in consecutive blocks of at
  most three linears. It is summed over the blocks.
- The activation entropy, eq. (4), is the mean dependency of the consecutive linears in those
  blocks.
- The quantization error is the mean relative error of their activations, the other proxy of
  Table 5.

Errors are shares of a token's energy. The command writes `figure2.csv`, with a row per problem and
layer, and `figure2.png`, with a panel per proxy and layer and Pearson's correlation in its title.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from hydra import compose, initialize_config_dir
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from qvlm.cell import inputs as prepare
from qvlm.command import run_command
from qvlm.config.compose import CONF, from_hydra, register
from qvlm.config.schema import RunConfig, canonical
from qvlm.methods.qvlm.dependency import element_joint, entropy, lane, mine, quantization_error
from qvlm.methods.qvlm.search import search_block
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.quantization import Block, Walk, batch_by_length
from qvlm.tables.figure import STYLE

DEPTH = 3
PROXIES = {"entropy": entropy(element_joint), "quantization_error": quantization_error}
LABELS = {
    "entropy": "activation entropy, nats",
    "quantization_error": "relative quantization error, %",
}
FACTORS = {"entropy": 1, "quantization_error": 100}  # from the CSV to the units of the labels


def configuration(overrides: list[str]) -> RunConfig:
    """Returns the configuration of a cell of Q-VLM with these overrides."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return canonical(from_hydra(compose("config", ["method_name=qvlm", *overrides])))


def options_of(group: str) -> list[str]:
    """Returns the options of a group of the configuration."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def three_layers(count: int) -> list[int]:
    """Returns the indices at a quarter, half and three quarters of `count` decoder layers."""
    return sorted({count // 4, count // 2, 3 * count // 4})


def runs_of(block: Block, names: list[str]) -> list[list[str]]:
    """Divides the linears of a block into runs of consecutive linears of one lane.

    Args:
        block: Block of the linears.
        names: Names of the linears that received tokens, in the order in which they run.

    Returns:
        Runs of at most `DEPTH` names.
    """
    runs: list[list[str]] = []
    for name in names:
        joins = runs and len(runs[-1]) < DEPTH and lane(block, runs[-1][0]) == lane(block, name)
        if joins:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def measure(
    model: Any, batch: Any, quantization: Any, search: SearchOptions
) -> list[dict[str, Any]]:
    """Measures one problem at three decoder layers.

    Args:
        model: Floating-point model.
        batch: Inputs of the problem, as a batch of one.
        quantization: Specs of weights and activations.
        search: Grid of percentiles.

    Returns:
        One row per layer, with `layer`, `ded`, `entropy` and `quantization_error`.
    """
    walk = Walk(model, [batch], quantization)
    chains = {
        proxy: {chain.name: chain for chain in mine(walk, dependency, "linear", 4096)}
        for proxy, dependency in PROXIES.items()
    }
    decoder = [name for name in walk.names if "language_model" in name]
    chosen = {decoder[index]: index for index in three_layers(len(decoder))}
    rows = []
    for block in walk.blocks():
        if block.name not in chosen:
            continue
        runs = runs_of(block, list(block.linears))
        found = search_block(block, [[[name] for name in run] for run in runs], search)
        for name in block.linears:
            block.restore(name)  # the next layer is measured in the floating-point model
        within = {pair for run in runs for pair in pairwise(run)}
        row: dict[str, Any] = {"layer": chosen[block.name]}
        row["ded"] = sum(result.layerwise_error - result.error for result in found)
        for proxy, by_block in chains.items():
            chain = by_block[block.name]
            steps = zip(pairwise(chain.units), chain.dependencies, strict=True)
            values = [value for pair, value in steps if pair in within and value is not None]
            row[proxy] = sum(values) / len(values)
        rows.append(row)
    return rows


def draw(frame: pd.DataFrame, title: str, path: Path) -> None:
    """Draws the panels.

    Args:
        frame: Rows of all problems (see `measure`).
        title: Title of the figure.
        path: PNG file to write.
    """
    layers = sorted(frame["layer"].unique())
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(len(PROXIES), len(layers), squeeze=False, sharex="row")
        for row, proxy in zip(axes, PROXIES, strict=True):
            for panel, layer in zip(row, layers, strict=True):
                own = frame[frame["layer"] == layer]
                correlation = own[proxy].corr(own["ded"])
                word = "none" if math.isnan(correlation) else f"{round(correlation, 2) + 0:.2f}"
                panel.plot(FACTORS[proxy] * own[proxy], own["ded"], linestyle="none", alpha=0.7)
                panel.set_title(f"decoder layer {layer}: r = {word}, n = {len(own)}")
                panel.set_xlabel(LABELS[proxy])
                for axis in (panel.xaxis, panel.yaxis):
                    axis.set_major_locator(MaxNLocator(4))
            row[0].set_ylabel("DED, share of a token's energy")
        figure.suptitle(title)
        figure.savefig(path)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=options_of("model"), default="mini_llava")
    parser.add_argument("--bits", choices=options_of("bits"), default="w4a4")
    parser.add_argument("--samples", type=int, default=200, help="problems of the training split")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the files")
    return run_command(parser, work, arguments)


def work(options: argparse.Namespace) -> None:
    """Measures all problems, writes both files and prints the correlations."""
    config = configuration(
        [
            f"model={options.model}",
            f"bits={options.bits}",
            f"calibration.samples={options.samples}",
        ]
    )
    prepare.settle(config, "cpu")
    loaded = prepare.load(config, "cpu")
    problems, rows_of_split = prepare.draw_calibration(config)
    quantization = prepare.quantization_config(config)
    rows = []
    for problem, index in tqdm(
        list(zip(problems, rows_of_split, strict=True)), desc="problems", disable=None
    ):
        (batch,) = batch_by_length(loaded, [problem], 1)
        for row in measure(loaded.model, batch, quantization, SearchOptions()):
            rows.append(
                {"model": options.model, "bits": config.bits.label, "problem": index, **row}
            )
    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "figure2.csv", index=False, float_format="%.6g")
    draw(frame, f"{options.model}, {config.bits.label}", options.out / "figure2.png")
    for layer in sorted(frame["layer"].unique()):
        own = frame[frame["layer"] == layer]
        for proxy in PROXIES:
            correlation = own[proxy].corr(own["ded"])
            print(f"layer {layer}: correlation of DED with {proxy} {correlation:.2f}")


if __name__ == "__main__":
    sys.exit(main())
