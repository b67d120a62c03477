"""Splits made of data sets in memory, in the place of those that are opened from a source."""

import datasets

from qvlm.data.sources import Split, table_split


def split_of(data: datasets.Dataset, name: str) -> Split:
    """Makes a split of a data set in memory."""
    return table_split(data, name, "memory", lambda index: f"memory, row {index}", None)
