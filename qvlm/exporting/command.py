"""`qvlm export FOLDER --format compressed-tensors --out DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm.command import folder, run_command
from qvlm.errors import RunError
from qvlm.records.files import explained

FORMATS = ("compressed-tensors",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="qvlm export",
        description="Writes a packed checkpoint in a format that transformers loads.",
    )
    parser.add_argument("folder", type=Path, help="folder that save_packed=FOLDER wrote")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format to write")
    parser.add_argument(
        "--packed",
        action="store_true",
        help="keep codes packed; transformers 5.23 does not load that together with zero points",
    )
    parser.add_argument("--out", type=folder, required=True, help="new folder to write")

    def work(options: argparse.Namespace) -> None:
        from qvlm.exporting.compressed_tensors import BYTES, PACKED
        from qvlm.exporting.folder import export, needs_qvlm

        with explained(f"export: {options.out}", RunError, "Give another --out"):
            count = export(options.folder, options.out, PACKED if options.packed else BYTES)
        print(f"wrote {count} layers to {options.out}")
        if needs_qvlm(options.out):
            print(
                "transformers has no class for this model: `import qvlm` before it is loaded, and "
                "do not expect another engine to load it."
            )

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
