"""`python -m qvlm.tables.peers` writes the page and the CSV of this machine's instruction set.

They are `peers_<instruction set>`, such as `peers_avx2.md`, so that a machine of another kind adds
a page and does not replace one.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from qvlm.command import run_command
from qvlm.models.architectures import architecture
from qvlm.planning.footprint import SCALE_PROMPT
from qvlm.tables.command import made_with, table_parser, write_files
from qvlm.tables.peers import PEERS
from qvlm.tables.peers.measure import Setting, measure
from qvlm.tables.peers.page import instruction_set, page, rows
from qvlm.validation import whole_number

LAYERS = 2  # decoder layers of whole models


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("peers", "Times packed layers beside those of other libraries.")
    parser.add_argument("--repeats", type=int, default=7, help="number of timed repeats")
    parser.add_argument("--threads", type=int, help="threads of every peer (default: PyTorch's)")

    def work(options: argparse.Namespace) -> None:
        whole_number("--repeats", options.repeats, 1)
        if options.threads is not None:
            whole_number("--threads", options.threads, 1)
            torch.set_num_threads(options.threads)
        config = architecture("llava_13b").get_text_config()
        setting = Setting(config, LAYERS, SCALE_PROMPT, options.repeats)
        measured = measure([peer for peer in PEERS if peer.obstacle() is None], setting)
        text = page(
            measured, PEERS, setting, made_with(parser, options, "repeats", "threads", "out")
        )
        frame = rows(measured, PEERS)
        csv = frame.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        name = f"peers_{instruction_set()}"
        write_files({options.out / f"{name}.csv": csv, options.out / f"{name}.md": text})
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
