"""`python -m qvlm.tables.claims` says which of the paper's claims the records support."""

import sys

from qvlm.tables.claims.command import main

if __name__ == "__main__":
    sys.exit(main())
