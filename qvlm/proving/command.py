"""`qvlm prove CHECKPOINT`: is this checkpoint quantized as it says?

The exit code is 0 if nothing is wrong with it, 1 if something is, and 2 if it cannot be opened.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm.command import run_command
from qvlm.errors import RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 only if the checkpoint is proven."""
    parser = argparse.ArgumentParser(
        prog="qvlm prove",
        description="Opens a quantized checkpoint of any origin, without running its code, and "
        "says what its layers hold.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder in the format of compressed-tensors, AutoAWQ, GPTQ, bitsandbytes, torchao or "
        "qvlm, or a GGUF file",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")

    def work(options: argparse.Namespace) -> None:
        from qvlm.proving.page import content, page, verdict
        from qvlm.proving.proof import prove

        proof = prove(options.checkpoint)
        if options.json:
            print(json.dumps(content(proof), indent=2))
        else:
            print(page(proof))
        if not proof.holds:
            raise RunError(f"{options.checkpoint} is {verdict(proof)}.")
        if not options.json:
            print(f"\n{options.checkpoint} is {verdict(proof)}.")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
