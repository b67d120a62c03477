"""What all tests share: the fixtures of cells that run in seconds, and of tiny checkpoints."""

import os

# As `make test` does, before PyTorch is imported: tests compare to the bit sums of float32, whose
# order depends on the number of threads. Those that are about threads set it themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from tests.helpers.cells import cell, checkpoint, tracked
from tests.helpers.families import folder_of, tiny

# The same examples on every machine, however slow it is.
settings.register_profile("everywhere", deadline=None, derandomize=True)
settings.load_profile("everywhere")

__all__ = ["cell", "checkpoint", "folder_of", "tiny", "tracked"]
