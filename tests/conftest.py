"""What all tests share: the fixtures of cells that run in seconds, and of tiny checkpoints."""

from hypothesis import settings

from tests.helpers.cells import cell, checkpoint, tracked
from tests.helpers.families import folder_of, tiny

# The same examples on every machine, however slow it is.
settings.register_profile("everywhere", deadline=None, derandomize=True)
settings.load_profile("everywhere")

__all__ = ["cell", "checkpoint", "folder_of", "tiny", "tracked"]
