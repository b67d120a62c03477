"""Which rows of a tensor to keep where all of them are too many."""

import torch
from torch import Tensor


def evenly_spaced(length: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of about evenly spaced rows, the first and the last among them.

    Args:
        length: Number of rows there are.
        count: Number of rows to keep. All are kept if there are no more.
        device: Device of the indices.

    Returns:
        Ascending int64 indices [min(length, count)].
    """
    rows = torch.linspace(0, length - 1, min(length, count), dtype=torch.float64, device=device)
    return rows.long()
