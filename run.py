"""Runs cells: `python run.py --help`."""

import sys

from qvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
