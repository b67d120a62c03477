"""Several processes evaluate one cell: rank 0 runs the command, the other ranks work for it.

    accelerate launch --multi_gpu --num_processes 4 run.py model=llava_7b method=fp

starts the same command four times. Only rank 0 reads the command line. The other ranks wait for a
function and its arguments (`run_on_all_ranks`), run it, reply and wait again. Rank 0 alone decides
which cells are recorded, and alone writes, tracks and prints, so the ranks cannot disagree. A model
among the arguments is sent tensor by tensor, arrives on the receiver's own GPU and is verified with
a checksum: all ranks evaluate exactly the model that rank 0 quantized and proved.

Work of uneven size goes through a `WorkQueue`. All communication uses main memory (gloo), with GPUs
too: a rank that waits for hours of calibration neither occupies a GPU nor times out.
"""

import atexit
import copyreg
import hashlib
import io
import itertools
import os
import pickle
import sys
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from qvlm.errors import RunError, UserError

TIMEOUT = timedelta(days=30)  # ranks wait for as long as rank 0 calibrates and searches


def init() -> bool:
    """Joins the process group that the launcher started, and leaves it when this process ends.

    Returns:
        Whether this process is rank 0.
    """
    state = PartialState(cpu=True, timeout=TIMEOUT)
    # A thread of gloo that releases a tensor after Python has ended would abort the process.
    atexit.register(state.destroy_process_group)
    if torch.cuda.is_available():
        torch.cuda.set_device(state.local_process_index % torch.cuda.device_count())
    return bool(state.is_main_process)


def world_size() -> int:
    """Returns the number of ranks, which is 1 without a launcher."""
    return distributed.get_world_size() if _is_distributed() else 1


def is_rank_zero() -> bool:
    """Returns whether this process is rank 0, which it is without a launcher."""
    return not _is_distributed() or distributed.get_rank() == 0


def local_world_size() -> int:
    """Returns the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _is_distributed() else 1


def run_on_all_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function on every rank, this one included. Only rank 0 calls this.

    Args:
        function: Function at the top level of a module, as are the classes of its arguments.
        arguments: Arguments of the function. Tensors that are on a GPU here arrive on a GPU.

    Returns:
        What the function returned on each rank, in the order of the ranks.

    Raises:
        Exception: Whatever the function raised on rank 0.
        UserError, RunError: What it raised on another rank, once all ranks have finished.
        KeyboardInterrupt: If rank 0 was interrupted, once the other ranks have replied, so that all
            ranks are ready for the next task.
    """
    if world_size() == 1:
        return [function(*arguments)]
    _broadcast_task((function, arguments))
    _refuse_errors(_collective(gather_object, [None]))  # of ranks that did not receive it whole
    try:
        own = _attempt(function, arguments)
    except KeyboardInterrupt:  # from the user, who interrupts all ranks, or after a lost lock
        with suppress(RunError):
            _collective(gather_object, [None])
        raise
    replies = _collective(gather_object, [None if isinstance(own, Exception) else own])
    _refuse_errors([own, *replies[1:]])
    return list(replies)


def worker_loop() -> int:
    """Runs the tasks of rank 0 until it shuts down; returns the exit code of this process."""
    try:
        while (task := _receive_task()) is not None:
            error = _for_rank_zero(task) if isinstance(task, Exception) else None
            if any(_collective(gather_object, [error])):
                continue
            reply = _attempt(*task)
            del task  # frees the model before the next one arrives
            _collective(gather_object, [_for_rank_zero(reply)])
    except RunError:  # rank 0 has ended and has reported why
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def shutdown() -> None:
    """Ends the other ranks. Rank 0 calls this when its command is finished."""
    with suppress(RunError):  # they have already ended, and that was reported
        _broadcast_task(None)


class WorkQueue:
    """A queue of task numbers 0, 1, ...: each number goes to the rank that asks for the next one.

    Pass a queue to `run_on_all_ranks` and enter it on every rank. Once a rank leaves it with an
    exception, the queue is empty, so that the other ranks stop soon and the exception is raised.

    Args:
        size: Number of tasks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._key = uuid.uuid4().hex
        self._store: distributed.TCPStore | None = None

    def __enter__(self) -> Iterator[int]:
        if world_size() == 1:
            return iter(range(self.size))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connect = partial(distributed.TCPStore, is_master=False, wait_for_workers=False)
        store = self._store = _collective(connect, *address)
        taken = (_collective(store.add, self._key, 1) - 1 for _ in itertools.count())
        return itertools.takewhile(lambda number: number < self.size, taken)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is not None and error is not None:
            with suppress(RunError):  # no other rank is left
                _collective(self._store.add, self._key, self.size)
        self._store = None


@dataclass(frozen=True)
class _TensorSpec:
    """Everything about a tensor except its values."""

    shape: torch.Size
    dtype: torch.dtype
    on_gpu: bool
    is_parameter: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_TensorSpec":
        on_gpu, is_parameter = tensor.is_cuda, isinstance(tensor, nn.Parameter)
        return cls(tensor.shape, tensor.dtype, on_gpu, is_parameter, tensor.requires_grad)

    def empty(self) -> Tensor:
        """Returns an uninitialized tensor of this kind on the device of this rank."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cuda" if self.on_gpu else "cpu")
        if self.is_parameter:
            return nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


class _Pickler(pickle.Pickler):
    """Pickles everything except the values of tensors, which it numbers, and module hooks.

    transformers records hidden states with hooks that it adds at a model's first call, provided
    that the model's class was constructed in this process. The receiver therefore constructs it.

    Attributes:
        tensors: Tensors by their number; a tensor that is used twice is listed once.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """Returns the number of a tensor, and None for anything else."""
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]

    def reducer_override(self, value: Any) -> Any:
        """Reduces modules to their class and their state without hooks."""
        if not isinstance(value, nn.Module):
            return NotImplemented
        state = value.__getstate__() | {"_forward_hooks": OrderedDict()}
        state.pop("_output_capturing_hooks_installed", None)
        if isinstance(value, PreTrainedModel):
            return _construct_on_meta, (type(value), value.config), state
        return copyreg.__newobj__, (type(value),), state  # type: ignore[attr-defined]


class _Unpickler(pickle.Unpickler):
    """Unpickles what `_Pickler` wrote, with these tensors in place of their numbers."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """Returns the tensor with this number."""
        return self._tensors[number]


def _construct_on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def _broadcast_task(task: tuple[Callable[..., Any], tuple[Any, ...]] | None) -> None:
    """Sends a task to all other ranks; None ends them."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(task)
    specs = [_TensorSpec.of(tensor) for tensor in pickler.tensors]
    _collective(broadcast_object_list, [sys.path, file.getvalue(), specs])  # sys.path finds methods
    digest = hashlib.sha256()
    for tensor in pickler.tensors:
        values = _bytes(tensor)
        digest.update(values.numpy().data)
        _collective(distributed.broadcast, values, 0)
    _collective(broadcast_object_list, [digest.hexdigest()])


def _receive_task() -> Any:
    """Returns the next task, or the exception that says why it did not arrive whole."""
    sys.path[:], content, specs = _collective(broadcast_object_list, [None, None, None])
    digest, tensors = hashlib.sha256(), []
    error: Exception | None = None
    for spec in specs:
        values = torch.empty(spec.shape.numel() * spec.dtype.itemsize, dtype=torch.uint8)
        _collective(distributed.broadcast, values, 0)
        try:
            tensor = spec.empty() if error is None else None
            if tensor is not None:
                tensor.data.copy_(values.view(spec.dtype).view(spec.shape))
                tensors.append(tensor)
                digest.update(_bytes(tensor).numpy().data)  # of the received values
        except RuntimeError as problem:  # such as out of memory: the other tensors still arrive
            error, tensors = problem, []
    (sent,) = _collective(broadcast_object_list, [None])
    if error is not None:
        return error
    if digest.hexdigest() != sent:
        return RunError("the weights that arrived on another rank differ from those that were sent")
    try:
        return _Unpickler(io.BytesIO(content), tensors).load()
    except Exception as problem:  # unpickling imports modules of the user
        return problem


def _bytes(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor as uint8 [bytes] in main memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Returns what a call returned, or the exception that it raised."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _refuse_errors(replies: Sequence[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _for_rank_zero(reply: Any) -> Any:
    """Converts the reply of a worker for rank 0.

    An unexpected exception is printed here, and only its type and message are sent.
    """
    if not isinstance(reply, Exception) or isinstance(reply, UserError | RunError):
        return reply
    traceback.print_exception(reply)
    rank, name = distributed.get_rank(), type(reply).__name__
    return RunError(f"rank {rank} of {world_size()} failed: {name}: {reply}")


def _collective(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Runs an operation that needs the other ranks.

    Raises:
        RunError: If another rank has ended.
    """
    try:
        return operation(*arguments)
    except RuntimeError as error:
        raise RunError("another rank ended before the work was finished") from error


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
