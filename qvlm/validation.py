"""Checks of the options that a user sets, and the sentence for a value that is refused.

Every check raises a `UserError` of one form, "option=value is not ...", and names what is accepted.
The option is named as it is written on the command line, for example `calibration.samples`.
A boolean is never accepted as a number, although Python treats `True` as 1.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any, TypeGuard

from qvlm.errors import UserError

MOST = 2**31 - 1  # largest count that fits every index that PyTorch and its kernels use
MOST_SEED = 2**63 - 1  # largest seed that fits 64 bits with its sign
LONGEST_NAME = 64  # characters of a name


def one_of(option: str, value: object, choices: Iterable[str]) -> None:
    """Accepts one of a few names.

    Raises:
        UserError: if `value` is not one of `choices`.
    """
    choices = tuple(choices)
    if value not in choices:
        raise UserError(
            f"{option}={shown(value)} is not a known value. Choose one of: {', '.join(choices)}."
        )


def switch(option: str, value: object) -> None:
    """Accepts true and false.

    Raises:
        UserError: for anything else, the words "true" and "false" included.
    """
    if not isinstance(value, bool):
        raise UserError(f"{option}={shown(value)} is not a switch. Choose one of: true, false.")


def whole_number(option: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Accepts whole numbers from `least` to `most`, both included; `most=None` stands for `MOST`.

    Raises:
        UserError: if `value` is not a whole number, or out of range.
    """
    if most is None and is_number(value) and value > MOST:
        most = MOST  # the sentence names it only where it matters
    if not is_number(value) or not isinstance(value, int) or not _within(value, least, most):
        raise refused(option, value, f"a whole number {_range(least, most)}")


def seed(option: str, value: object) -> None:
    """Accepts whole numbers from 0 that fit 64 bits.

    Raises:
        UserError: if `value` is not one.
    """
    whole_number(option, value, 0, MOST_SEED)


def number(option: str, value: object, least: float = 0, most: float | None = None) -> None:
    """Accepts finite numbers from `least` to `most`, both included; `most=None` is no upper bound.

    Raises:
        UserError: if `value` is not a number, is not finite, or is out of range.
    """
    if not is_number(value) or not isfinite(value) or not _within(value, least, most):
        raise refused(option, value, f"a finite number {_range(least, most)}")


def positive(option: str, value: object) -> None:
    """Accepts finite numbers above 0.

    Raises:
        UserError: if `value` is not a number, is not finite, or is not above 0.
    """
    if not is_number(value) or not isfinite(value) or value <= 0:
        raise refused(option, value, "a finite number above 0")


def check_name(option: str, name: object) -> None:
    """Accepts names that can be a part of a file's name.

    A record therefore never lands outside the results folder, hidden, or in another folder.

    Raises:
        UserError: if `name` is not one.
    """
    if not isinstance(name, str) or not re.fullmatch(
        rf"(?!\.)[A-Za-z0-9._-]{{1,{LONGEST_NAME}}}", name
    ):
        raise UserError(
            f"{option}: {name!r} is not a name. Use letters, digits, '.', '_' and '-', not "
            f"beginning with '.', at most {LONGEST_NAME} characters."
        )


def expanded_path(option: str, value: str) -> str:
    """Returns a path with its `~` expanded. Nothing needs to be there.

    Raises:
        UserError: if the operating system accepts no such path: it is empty, holds a NUL, is too
            long, runs in a loop of links, or lies in a folder that this user may not read.
    """
    path = os.path.expanduser(value)
    try:
        if not path:
            raise OSError("it is empty")
        if path.startswith("~"):
            raise OSError(f"{path.partition('/')[0]} has no home folder")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(os.path.join(path, "x"))  # as what will be looked for in it
    except (OSError, ValueError) as error:  # ValueError: a NUL, or no text of this system
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        shortened = value if len(value) <= 80 else f"{value[:80]}..."
        raise UserError(
            f"{option}={shortened!r} is not a path that can be used ({reason}). Give another one."
        ) from error
    return path


def plain_parameters(option: str, node: Mapping[str, Any]) -> None:
    """Accepts the parameters of a class that a configuration names, if they name no other class.

    Args:
        option: Name of the node, such as "method". Its own `_target_` is not looked at.
        node: `_target_` and parameters.

    Raises:
        UserError: if a key at any depth is one that Hydra interprets, such as `_target_`.
    """
    waiting: list[tuple[str, Any]] = [
        (f"{option}.{key}", value) for key, value in node.items() if key != "_target_"
    ]
    while waiting:
        place, value = waiting.pop()
        key = place.rpartition(".")[2]
        if len(key) > 2 and key[0] == key[-1] == "_":
            raise UserError(
                f"{place} is not a parameter. Only {option} itself names a class; its parameters "
                "are plain values."
            )
        if isinstance(value, Mapping):
            waiting += [(f"{place}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{index}]", inner) for index, inner in enumerate(value)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a number; NaN and infinity are, booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(option: str, value: object, expected: str) -> UserError:
    """Makes the error for a value that is not what was expected.

    Args:
        option: Name of the option, as it is written on the command line.
        value: Value that was given.
        expected: Noun phrase for the values that are accepted, such as "a whole number from 1".
    """
    return UserError(f"{option}={shown(value)} is not {expected}.")


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _within(value: float, least: float, most: float | None) -> bool:
    return value >= least and (most is None or value <= most)


def _range(least: float, most: float | None) -> str:
    if most is None:
        return f"of at least {_plain(least)}"
    return f"from {_plain(least)} to {_plain(most)}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
