"""What all tests share: the fixtures of cells that run in seconds."""

from tests.helpers.cells import cell, checkpoint, tracked

__all__ = ["cell", "checkpoint", "tracked"]
