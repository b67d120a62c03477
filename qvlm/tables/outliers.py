"""Outliers of a model: `python -m qvlm.tables.outliers model=smollm2 data=text`.

It shows in a minute whether a model is like the miniatures, which have outlier channels only in the
inputs of their down projections, or like a LLaMA. The float model reads calibration rows, and for
every input of a decoder's linears:

- the largest channel over the median channel, by the largest magnitude of each (outlier channels);
- the kurtosis of all values, which is 3 for normally distributed ones;
- the largest magnitude at the first position over the largest at all others (massive activations).

Beside them stand the norms of the residual stream by layer, at the first position and the median of
all others. Rows are kept in a CSV by model, and the page and the plot are functions of the CSV.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn

from qvlm.cell import inputs as prepare
from qvlm.cell.material import calibration_batches
from qvlm.command import run_command
from qvlm.config.compose import compose
from qvlm.config.schema import RunConfig, canonical
from qvlm.errors import UserError
from qvlm.markdown import table
from qvlm.models.loaded import LoadedModel
from qvlm.quantization import unfuse_experts
from qvlm.quantization.hooks import hooked
from qvlm.quantization.targets import decoder_layers, quantizable
from qvlm.records.files import explained, write_files
from qvlm.tables.command import table_parser

NAME = "outliers"
RESIDUAL = "residual"
COLUMNS = ("model", "layer", "input", "channel", "kurtosis", "first", "norm", "first_norm")
# Linears that read the same channels -> how the page calls their input.
INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("o_proj", "dense"), "attention output"),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1"), "MLP"),
    **dict.fromkeys(("down_proj", "fc2"), "MLP output"),
}

HEAD = """\
# Outliers: is a model like a miniature or like a LLaMA?

For the inputs of a decoder's linears, the median over the layers and, in parentheses, the largest.
*channel* is the largest channel over the median channel, *kurtosis* is 3 for normally distributed
values, and both leave the first position out. *first token* is the largest magnitude at the first
position over the largest at all others. Static ranges per tensor or per cluster suffer from the
first number, scales per token from it as well, and every static range from the third."""

NORMS = """\
Norms of the residual stream behind a layer: the median of the tokens and, in parentheses, that of
the first position."""


@torch.no_grad()
def measure(loaded: LoadedModel, batches: Sequence[dict[str, Tensor]]) -> pd.DataFrame:
    """Measures the outliers of a model in floating point.

    Args:
        loaded: Model in full precision; fused experts are taken apart.
        batches: Keyword arguments of its forward, rows of equal length.

    Returns:
        Rows with the columns `COLUMNS`. Those of inputs have no norms, and those of the residual
        stream nothing else. `first` is missing for the inputs of experts, whose tokens have lost
        their positions.
    """
    unfuse_experts(loaded.model)
    layers = decoder_layers(loaded.model)
    kept: dict[tuple[int, str], list[tuple[Tensor, Tensor | None]]] = {}

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            x = args[0] if output is None else output
            x = (x[0] if isinstance(x, tuple) else x).detach().float()
            kept.setdefault(key, []).append((x.flatten(0, -2), _first(x)))

        return hook

    readers: dict[nn.Module, Callable[..., None]] = {}
    for number, layer in enumerate(layers.values()):
        for name, linear in _readers(layer):
            readers[linear] = keep((number, name))
    after = {layer: keep((number, RESIDUAL)) for number, layer in enumerate(layers.values())}
    with hooked(readers, after):
        for batch in batches:
            loaded.model(**batch, use_cache=False)
    rows = [
        {"model": loaded.name, "layer": number, "input": name, **_statistics(name, parts)}
        for (number, name), parts in sorted(kept.items())
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _readers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of a layer, one for each input that several of them read, with its name."""
    seen: set[tuple[str, str]] = set()
    for name, linear in quantizable(layer).items():
        parent, _, child = name.rpartition(".")
        kind = INPUTS.get(child, child)
        if (parent, kind) not in seen:
            seen.add((parent, kind))
            yield kind, linear


def _first(x: Tensor) -> Tensor | None:
    """Which tokens of [sequences, tokens, features] are first; None where positions are lost."""
    if x.ndim != 3:
        return None
    return (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[:2]).flatten()


def _statistics(name: str, parts: list[tuple[Tensor, Tensor | None]]) -> dict[str, float | None]:
    x = torch.cat([tokens for tokens, _ in parts])
    masks = [mask for _, mask in parts if mask is not None]
    mask = torch.cat(masks) if len(masks) == len(parts) else None
    others = x if mask is None else x[~mask]
    if name == RESIDUAL:
        norms = others.norm(dim=1)
        own = None if mask is None else float(x[mask].norm(dim=1).median())
        return {"norm": float(norms.median()), "first_norm": own}
    largest = others.abs().amax(0)
    deviation = others.double() - others.double().mean()
    spread = deviation.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "channel": float(largest.max() / largest.median().clamp_min(1e-12)),
        "kurtosis": float(deviation.pow(4).mean() / spread.square()),
        "first": None if mask is None else float(x[mask].abs().max() / largest.max()),
    }


def page(rows: pd.DataFrame, command: str) -> str:
    """Returns the page.

    Args:
        rows: Rows with the columns `COLUMNS`.
        command: Command that regenerates a model's rows.
    """
    lines = []
    measures = ("channel", "kurtosis", "first")
    inputs = rows[rows["input"] != RESIDUAL].groupby(["model", "input"], sort=True)
    for (model, name), own in inputs:
        lines.append([str(model), str(name), *(_spread(own[key]) for key in measures)])
    residual = rows[rows["input"] == RESIDUAL]
    norms = []
    for model, own in residual.groupby("model", sort=True):
        own = own.sort_values("layer")
        at = [own.iloc[round(share * (len(own) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        norms.append([str(model), *(f"{row['norm']:.3g} ({row['first_norm']:.3g})" for row in at)])
    header = ["model", "input of", "channel", "kurtosis", "first token"]
    shares = ["model", "first layer", "a quarter", "half", "three quarters", "last layer"]
    parts = [HEAD, table(header, lines, left=2), NORMS, table(shares, norms)]
    parts += ["![Outliers by depth](outliers.png)", f"Command: `{command}`"]
    return "\n\n".join(parts) + "\n"


def _spread(values: pd.Series) -> str:
    known = values.dropna()
    return f"{known.median():.1f} ({known.max():.1f})" if len(known) else "not known"


def plot(rows: pd.DataFrame) -> bytes:
    """Draws channels and residual norms by depth, as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for index, (model, own) in enumerate(rows.groupby("model", sort=True)):
        depth = max(own["layer"].max(), 1)
        for name, style in (("attention", "-"), ("MLP output", "--")):
            part = own[own["input"] == name].groupby("layer")["channel"].max()
            left.plot(part.index / depth, part, style, color=f"C{index}", label=f"{model}, {name}")
        residual = own[own["input"] == RESIDUAL].sort_values("layer")
        place = residual["layer"] / depth
        right.plot(place, residual["norm"], "-", color=f"C{index}", label=f"{model}, other tokens")
        right.plot(place, residual["first_norm"], "--", color=f"C{index}", label=f"{model}, first")
    left.set_title("largest channel / median channel of an input")
    right.set_title("norm of the residual stream")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("depth")
        axis.legend(fontsize=7)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return content.getvalue()


def configuration(overrides: Sequence[str]) -> RunConfig:
    """Returns the configuration of a cell in full precision with these overrides.

    Raises:
        UserError: If an override is wrong, or asks for another method or bit width.
    """
    for word in overrides:
        key, _, value = word.partition("=")
        if key.partition(".")[0] in ("method", "bits") and value != "fp":
            raise UserError(
                f"{word} is not possible here: outliers are those of the model in full precision. "
                "Leave it out."
            )
    config = canonical(compose([*overrides, "method=fp", "bits=fp"]))
    if config.model.packed is not None:
        raise UserError(
            f"model.packed={config.model.packed} is not possible here: outliers are those of the "
            "model in full precision. Give model.path=FOLDER."
        )
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser(NAME, "Measures the outliers of a model's activations.")
    parser.add_argument("overrides", nargs="*", help="options of run.py, such as model=NAME")

    def work(options: argparse.Namespace) -> None:
        config = configuration(options.overrides)
        loaded = prepare.load(config, prepare.find_device(config.device))
        rows = measure(loaded, calibration_batches(config, loaded)[0])
        file = options.out / f"{NAME}.csv"
        if file.is_file():
            before = pd.read_csv(file)
            rows = pd.concat([before[before["model"] != loaded.name], rows])
        rows = rows.sort_values(["model", "layer", "input"], kind="stable")
        command = options.command or f"{parser.prog} model=NAME"
        texts = {
            file: rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
            options.out / f"{NAME}.md": page(rows, command),
        }
        picture = plot(rows)
        with explained(f"--out: {options.out}", UserError, "choose a folder that can be written"):
            write_files({**texts, options.out / f"{NAME}.png": lambda p: p.write_bytes(picture)})
        print(texts[options.out / f"{NAME}.md"], end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
