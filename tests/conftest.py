"""What all tests share: the fixtures of cells that run in seconds, and of tiny checkpoints."""

from tests.helpers.cells import cell, checkpoint, tracked
from tests.helpers.families import folder_of, tiny

__all__ = ["cell", "checkpoint", "folder_of", "tiny", "tracked"]
