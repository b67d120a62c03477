"""What all tests share: the fixtures of cells that run in seconds."""

from hypothesis import settings

from tests.helpers.cells import cell, checkpoint, tracked

# The same examples on every machine, however slow it is.
settings.register_profile("everywhere", deadline=None, derandomize=True)
settings.load_profile("everywhere")

__all__ = ["cell", "checkpoint", "tracked"]
