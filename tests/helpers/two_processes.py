"""The script that `test_workers` launches on two ranks: rank 0 asks, rank 1 works."""

import atexit
import hashlib
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn

from qvlm.errors import RunError, UserError
from qvlm.runtime import workers


class Tied(nn.Module):
    """Two layers with one weight, a buffer that is in no checkpoint, and tensors beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("codes", torch.arange(5, dtype=torch.uint8), persistent=False)
        self.scalar, self.nothing = torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 2)
        self.register_forward_hook(lambda *_: None)  # cannot be pickled, and stays behind


def look(model: Tied) -> list[Any]:
    """What has arrived."""
    tied = model.second.weight is model.first.weight and isinstance(
        model.first.weight, nn.Parameter
    )
    values = [model.first.weight.tolist(), model.codes.tolist(), float(model.scalar)]  # type: ignore[operator]
    return [tied, values, model.nothing.shape, model.scalar.dtype]


def take(queue: workers.WorkQueue) -> list[int]:
    """The numbers that this process gets."""
    with queue as numbers:
        return list(numbers)


def take_until(queue: workers.WorkQueue, last: int) -> None:
    """Takes numbers; the second process has enough of them at `last`."""
    with queue as numbers:
        for number in numbers:
            if not workers.is_rank_zero() and number >= last:
                raise UserError("enough")


def break_elsewhere() -> None:
    """A defect in the second process."""
    if not workers.is_rank_zero():
        raise KeyError("missing")


def interrupted(queue: workers.WorkQueue) -> None:
    """The first process is interrupted while both take numbers."""
    with queue as numbers:
        for _ in numbers:
            if workers.is_rank_zero():
                raise KeyboardInterrupt


def refused(kind: type[BaseException], words: str, *task: Any) -> None:
    """Asserts that a task ends with this error."""
    with pytest.raises(kind, match=words):
        workers.run_on_all_ranks(*task)


def main() -> None:
    """What the first process asks for."""
    model = Tied()
    here, there = workers.run_on_all_ranks(look, model)
    assert here == there and here[0], (here, there)
    shares = workers.run_on_all_ranks(take, workers.WorkQueue(200))
    assert sorted(shares[0] + shares[1]) == list(range(200))
    # All numbers would take hours: that this ends is the point.
    refused(UserError, "enough", take_until, workers.WorkQueue(10**9), 3)
    refused(RunError, "rank 1 of 2 failed: KeyError: 'missing'", break_elsewhere)
    refused(KeyboardInterrupt, "", interrupted, workers.WorkQueue(10**9))
    workers.hashlib = SimpleNamespace(sha256=hashlib.sha512)  # type: ignore[assignment]
    refused(RunError, "differ from those that were sent", look, model)
    workers.hashlib = hashlib
    assert workers.run_on_all_ranks(look, model) == [here, there]


def say(words: str) -> None:
    """A line in one piece: `print` may write its end apart, and both processes share the pipe."""
    os.write(sys.stdout.fileno(), f"{words}\n".encode())


def has_left() -> None:
    """Says that this process has left its group, which it must before Python ends."""
    if not distributed.is_initialized():
        say("left")


if __name__ == "__main__":
    atexit.register(has_left)  # before what `init` registers, so it is called after it
    if not workers.init():
        sys.exit(workers.worker_loop())
    main()
    workers.shutdown()
    say("it holds")
