"""`python -m qvlm.tables.gpu` writes `gpu.csv` and `gpu.md`."""

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from qvlm.command import run_command
from qvlm.errors import RunError, UserError
from qvlm.records.environment import revision, revision_in_words
from qvlm.tables.command import made_with, table_parser, write_files
from qvlm.tables.gpu.page import page
from qvlm.validation import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser(
        "gpu", "Measures packed models, kernels and methods on a GPU; goes on where it stopped."
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no task begins after them (default: 8)"
    )
    parser.add_argument("--dry-run", action="store_true", help="miniature sizes on a CPU")
    parser.add_argument("--page", action="store_true", help="only make the page of the CSV file")

    def work(options: argparse.Namespace) -> None:
        positive("--minutes", options.minutes)
        csv = options.out / "gpu.csv"
        if options.page:
            if not csv.is_file():
                raise UserError(f"--page: {csv} does not exist. Give the folder of a gpu.csv.")
            _write_page(csv, made_with(parser, options))
            return
        _check_device(options.dry_run)
        failed = _measure(csv, options.dry_run, options.minutes, made_with(parser, options))
        if failed:
            raise RunError(f"{failed} tasks failed. Their tracebacks are above.")

    return run_command(parser, work, arguments)


def _check_device(dry_run: bool) -> None:
    """Raises a UserError if there is no GPU, or a dry run has no interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed. Install it, or use --page.")
    if dry_run and "TRITON_INTERPRET" not in os.environ:
        raise UserError("--dry-run needs Triton's interpreter. Set TRITON_INTERPRET=1.")
    if not dry_run and not torch.cuda.is_available():
        raise UserError("No GPU is at hand. Choose --dry-run, which needs none, or --page.")


def _measure(csv: Path, dry_run: bool, minutes: float, command: str) -> int:
    """Does the missing tasks and makes the page. Returns the number of tasks that failed."""
    import transformers
    import triton

    from qvlm.tables.gpu.bench import Bench, Results
    from qvlm.tables.gpu.forms import FULL, TINY
    from qvlm.tables.gpu.run import run

    card = "dry run" if dry_run else torch.cuda.get_device_name()
    versions = (
        f"torch {torch.__version__}; triton {triton.__version__}; "
        f"transformers {transformers.__version__}; Python {platform.python_version()}; "
        f"qvlm {revision_in_words(revision())}"
    )
    results = Results(csv, card, versions)
    device, sizes = ("cpu", TINY) if dry_run else ("cuda", FULL)
    bench = Bench(device, sizes, results, time.monotonic() + 60 * minutes)
    try:
        run(bench)
    finally:
        _write_page(csv, command)
    return bench.failed


def _write_page(csv: Path, command: str) -> None:
    """Makes the page of all lines that there are."""
    frame = pd.read_csv(csv, dtype=str, keep_default_na=False)
    text = page(frame, command)
    write_files({csv.with_name("gpu.md"): text})
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
