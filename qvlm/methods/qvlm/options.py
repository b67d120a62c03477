"""Checks of the options of a method. Each raises UserError with a sentence that names the option.

The option is named as on the command line, `method.<option>`. Python counts true and false as
numbers; these checks do not.
"""

from collections.abc import Collection
from math import inf
from typing import TypeGuard

from qvlm.errors import UserError


def check_switch(option: str, value: object) -> None:
    """Accepts True and False only."""
    if not isinstance(value, bool):
        raise refused(option, value, "true or false")


def check_whole(option: str, value: object, least: int = 1) -> None:
    """Accepts whole numbers from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refused(option, value, f"a whole number from {least}")


def check_number(option: str, value: object) -> None:
    """Accepts finite numbers from 0."""
    if not is_number(value) or not 0 <= value < inf:
        raise refused(option, value, "a finite number from 0")


def check_choice(option: str, value: object, accepted: Collection[str]) -> None:
    """Accepts one of a few names."""
    if value not in accepted:
        raise UserError(
            f"method.{option}={value!r} is not known. Choose one of: {', '.join(accepted)}"
        )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a number, NaN and infinity included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refused(option: str, value: object, expected: str) -> UserError:
    """The error for a value that is not what was expected."""
    return UserError(f"method.{option}={value!r} is not {expected}")
