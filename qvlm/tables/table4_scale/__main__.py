"""`python -m qvlm.tables.table4_scale` writes `table4_scale.csv` and `table4_scale.md`."""

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from qvlm.cell.inputs import find_device
from qvlm.command import run_command
from qvlm.planning import footprint
from qvlm.tables.command import made_with, table_parser, write_files
from qvlm.tables.cost import COLUMNS
from qvlm.tables.table4_scale.measure import Setting, measure
from qvlm.tables.table4_scale.page import page
from qvlm.validation import positive, whole_number

MODELS = ("llava_13b", "llava_7b", "moe_llava")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser(
        "table4_scale", "Measures the true architectures with random weights, packed and in bf16."
    )
    parser.add_argument(
        "--models", nargs="+", choices=footprint.MODELS, default=MODELS, metavar="MODEL"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats side by side")
    parser.add_argument("--layers", type=int, default=1000, help="most decoder layers to run")
    parser.add_argument(
        "--prompt",
        type=int,
        default=footprint.SCALE_PROMPT,
        help="tokens of image and text together",
    )
    parser.add_argument(
        "--memory", type=float, help="GiB that a whole model may take (default: all that is free)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")

    def work(options: argparse.Namespace) -> None:
        for name in ("repeats", "layers", "prompt"):
            whole_number(f"--{name}", getattr(options, name), 1)
        if options.memory is not None:
            positive("--memory", options.memory)
        names = ("models", "repeats", "layers", "prompt", "memory", "device", "out")
        setting = Setting(
            options.repeats,
            options.layers,
            options.prompt,
            options.memory,
            find_device(options.device),
            made_with(parser, options, *names),
        )
        models = [
            measure(model, setting) for model in tqdm(options.models, desc="models", disable=None)
        ]
        text = page(models, setting)
        rows = [row.columns for model in models for row in model.rows]
        frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
        csv = frame.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        files = {options.out / "table4_scale.csv": csv, options.out / "table4_scale.md": text}
        write_files(files)
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
