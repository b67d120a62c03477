"""Several processes for one cell: the first does what it would do alone, the others lend a hand.

    accelerate launch --multi_gpu --num_processes 4 run.py model=llava_7b method=fp

starts the same command four times. Only the first process reads it. The others wait for a function
and its arguments (`everywhere`), run it, reply, and wait again; so there is nothing that processes
could see differently: which cells are recorded, what is written, tracked and printed is the affair
of one. A model among the arguments arrives tensor by tensor, on the receiver's own card, with a
checksum: what one process quantized and proved is what all of them evaluate.

What is uneven is dealt out as it is asked for (`Deal`). All talk is through main memory (gloo),
with GPUs too: who waits there for a calibration of hours neither holds a card busy nor times out.
"""

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

PATIENCE = timedelta(days=30)  # one waits as long as another searches


def join() -> bool:
    """Meets the other processes that a launcher started; whether this is the first one."""
    state = PartialState(cpu=True, timeout=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(state.local_process_index % torch.cuda.device_count())
    return bool(state.is_main_process)


def count() -> int:
    """How many processes have joined: 1 without a launcher."""
    return distributed.get_world_size() if _joined() else 1


def is_first() -> bool:
    """Whether this process is the one that the others help."""
    return not _joined() or distributed.get_rank() == 0


def on_this_machine() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if _joined() else 1


def everywhere(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function in every process, this one included.

    Args:
        function: at the top of a module, as all that its arguments are made of.
        arguments: tensors arrive on a card if they are on a card here.

    Returns:
        What each process returned, this one first.

    Raises:
        Exception: what the function raised here.
        UserError, RunError: what it raised elsewhere, once all have ended.
        KeyboardInterrupt: of this process, once the others have replied, so that they are asked for
            the next task together again.
    """
    if count() == 1:
        return [function(*arguments)]
    _send((function, arguments))
    _refuse_errors(_talk(gather_object, [None]))  # of those that it did not reach whole
    try:
        own = _attempt(function, arguments)
    except KeyboardInterrupt:  # by a user, of whom the others hear too, or by a lock that was lost
        with suppress(RunError):
            _talk(gather_object, [None])
        raise
    replies = _talk(gather_object, [None if isinstance(own, Exception) else own])
    _refuse_errors([own, *replies[1:]])
    return list(replies)


def serve() -> int:
    """The life of every process but the first, and its exit code."""
    try:
        while (task := _receive()) is not None:
            error = _for_the_first(task) if isinstance(task, Exception) else None
            if any(_talk(gather_object, [error])):
                continue
            reply = _attempt(*task)
            del task  # a model is let go before the next one comes
            _talk(gather_object, [_for_the_first(reply)])
    except RunError:  # the first process is gone, and has said why
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def dismiss() -> None:
    """Ends the other processes; the first one calls this at its own end."""
    with suppress(RunError):  # they are gone already, and that has been said
        _send(None)


class Deal:
    """Numbers from 0 that are given out in order, each to the process that asks for the next one.

    To be passed to `everywhere` and entered there. Once one process has left it with an error,
    nothing more is given out, so that the others end soon and the error is heard.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self._key = uuid.uuid4().hex
        self._store: distributed.TCPStore | None = None

    def __enter__(self) -> Iterator[int]:
        if count() == 1:
            return iter(range(self.numbers))
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connect = partial(distributed.TCPStore, is_master=False, wait_for_workers=False)
        store = self._store = _talk(connect, *place)
        asked = (_talk(store.add, self._key, 1) - 1 for _ in itertools.count())
        return itertools.takewhile(lambda number: number < self.numbers, asked)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is not None and error is not None:
            with suppress(RunError):  # nobody is left who could be told
                _talk(self._store.add, self._key, self.numbers)
        self._store = None


@dataclass(frozen=True)
class _Form:
    """All of a tensor but its values."""

    shape: torch.Size
    dtype: torch.dtype
    on_card: bool
    is_parameter: bool
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        on_card, is_parameter = tensor.is_cuda, isinstance(tensor, nn.Parameter)
        return cls(tensor.shape, tensor.dtype, on_card, is_parameter, tensor.requires_grad)

    def empty(self) -> Tensor:
        """A tensor of this form on this process' own device."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cuda" if self.on_card else "cpu")
        if self.is_parameter:
            return nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


class _Pickler(pickle.Pickler):
    """Pickles everything but tensors, which it numbers, and the hooks of modules.

    transformers records hidden states with hooks that it adds at a model's first call, if the
    model's class has been constructed in this process; so the receiver constructs each once.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor; one that is shared has one number."""
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]

    def reducer_override(self, value: Any) -> Any:
        """How a module is taken apart."""
        if not isinstance(value, nn.Module):
            return NotImplemented
        state = value.__getstate__() | {"_forward_hooks": OrderedDict()}
        state.pop("_output_capturing_hooks_installed", None)
        if isinstance(value, PreTrainedModel):
            return _without_memory, (type(value), value.config), state
        return copyreg.__newobj__, (type(value),), state  # type: ignore[attr-defined]


class _Unpickler(pickle.Unpickler):
    """Puts the numbered tensors back in their places."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """The tensor of a number."""
        return self._tensors[number]


def _without_memory(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def _send(task: tuple[Callable[..., Any], tuple[Any, ...]] | None) -> None:
    """Gives a task to all other processes; None is their end."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(task)
    forms = [_Form.of(tensor) for tensor in pickler.tensors]
    _talk(broadcast_object_list, [sys.path, file.getvalue(), forms])  # the path, for methods
    digest = hashlib.sha256()
    for tensor in pickler.tensors:
        values = _bytes(tensor)
        digest.update(values.numpy().data)
        _talk(distributed.broadcast, values, 0)
    _talk(broadcast_object_list, [digest.hexdigest()])


def _receive() -> Any:
    """The next task; an exception if it does not arrive whole."""
    sys.path[:], content, forms = _talk(broadcast_object_list, [None, None, None])
    digest, tensors = hashlib.sha256(), []
    error: Exception | None = None
    for form in forms:
        values = torch.empty(form.shape.numel() * form.dtype.itemsize, dtype=torch.uint8)
        _talk(distributed.broadcast, values, 0)
        try:
            tensor = form.empty() if error is None else None
            if tensor is not None:
                tensor.data.copy_(values.view(form.dtype).view(form.shape))
                tensors.append(tensor)
                digest.update(_bytes(tensor).numpy().data)  # what has arrived, not what was sent
        except RuntimeError as problem:  # out of memory, say: the other tensors come all the same
            error, tensors = problem, []
    (sent,) = _talk(broadcast_object_list, [None])
    if error is not None:
        return error
    if digest.hexdigest() != sent:
        return RunError("the weights that were received are not those that were sent")
    try:
        return _Unpickler(io.BytesIO(content), tensors).load()
    except Exception as problem:  # a stranger's module is imported
        return problem


def _bytes(tensor: Tensor) -> Tensor:
    """The values of a tensor as bytes in main memory [n]."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a call returns, or the exception that it ended with."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _refuse_errors(replies: Sequence[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _for_the_first(reply: Any) -> Any:
    """A reply as the first process can take it: of a defect, whose traceback stays here, a name."""
    if not isinstance(reply, Exception) or isinstance(reply, UserError | RunError):
        return reply
    traceback.print_exception(reply)
    name, number = type(reply).__name__, distributed.get_rank() + 1
    return RunError(f"process {number} of {count()} broke: {name}: {reply}")


def _talk(speak: Callable[..., Any], *arguments: Any) -> Any:
    """A call in which all processes take part.

    Raises:
        RunError: if one of them is no longer there.
    """
    try:
        return speak(*arguments)
    except RuntimeError as error:
        raise RunError("another process ended in the middle of the work") from error


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
