"""The calibration walk of a cell, shown as a progress bar over the blocks of the model."""

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from qvlm.quantization import Block, Walk


class ProgressWalk(Walk):
    """A `Walk` with a progress bar. The bar is silent where stderr is not a terminal.

    Attributes:
        finished: Number of blocks that an earlier process quantized; the bar starts there.
    """

    finished = 0

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """Yields the blocks in execution order; see `Walk.blocks`."""
        total = len(self.names if partition is None else partition)
        with tqdm(
            total=total,
            initial=self.finished,
            desc="blocks",
            unit="block",
            leave=False,
            disable=None,
        ) as bar:
            for block in super().blocks(partition):
                bar.set_postfix_str(block.name)
                yield block
                bar.update()
