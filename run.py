"""The command line from a clone: `python run.py --help` (see `qvlm.__main__`)."""

import sys

from qvlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
