"""Checks of what a user may set, worded as it is set: `method.<option>=<value>: accepted are ...`.

Each raises UserError with that sentence. true is no number here, though Python has it for one.
"""

from collections.abc import Collection
from math import inf
from typing import TypeGuard

from qvlm.errors import UserError


def check_switch(option: str, value: object) -> None:
    """Accepts true and false, and no word for them."""
    if not isinstance(value, bool):
        raise refused(option, value, "true and false")


def check_whole(option: str, value: object, least: int = 1) -> None:
    """Accepts whole numbers from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refused(option, value, f"whole numbers from {least}")


def check_number(option: str, value: object) -> None:
    """Accepts finite numbers from 0."""
    if not is_number(value) or not 0 <= value < inf:
        raise refused(option, value, "finite numbers from 0")


def check_choice(option: str, value: object, accepted: Collection[str]) -> None:
    """Accepts one of a few names."""
    if value not in accepted:
        raise refused(option, value, ", ".join(accepted))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a number, NaN and infinity included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(option: str, value: object, accepted: str) -> UserError:
    """The error to raise."""
    return UserError(f"method.{option}={value!r}: accepted are {accepted}")
