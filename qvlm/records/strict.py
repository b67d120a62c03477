"""Reads JSON of unknown origin into dataclasses, and accepts nothing that they do not declare.

A value must have the declared type: `"4"` and `4.0` are not whole numbers, and `true` is not one
either. Unknown, missing and repeated keys are refused, as are numbers that are not finite. No name
is imported, and no text is interpreted.
"""

import json
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

MOST_BYTES = 16 * 2**20
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: If it is not a regular file, or cannot be read.
        ValueError: If it is larger than `MOST_BYTES`, is not JSON in UTF-8, repeats a key, or holds
            a number that is not finite or has more than 64 bits, or a text that is not Unicode.
    """
    if not path.is_file():  # opening a pipe or a device could wait for ever
        raise OSError(f"{path.name} is not a file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES // 2**20} MiB")
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse,
        )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is not a text
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    return value


def build(kind: type[T], value: Any, where: str = "", defaults: bool = False) -> T:
    """Makes an object of a declared type from a value of JSON.

    Args:
        kind: Dataclass, plain type, or list, tuple, dict or union of such types.
        value: Value to read.
        where: Name of the value in messages, such as "model.path".
        defaults: Whether fields that have a default may be missing.

    Raises:
        ValueError: If the value is not of that type. The message names its place.
        UserError: If a dataclass refuses a value.
    """
    return _build(kind, value, where, defaults)


def _build(kind: Any, value: Any, where: str, defaults: bool) -> Any:
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if outer in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (outer,) = (part for part in inner if part is not type(None))
        return _build(outer, value, where, defaults)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, where, defaults)
    if outer is float and type(value) is int:
        return float(value)
    accepted: Any = list if outer is tuple else outer
    if type(value) is not accepted:
        raise ValueError(f"{where or 'its content'} is not {_KINDS[outer]}")
    if outer in (list, tuple):
        element = inner[0] if inner else Any
        items = enumerate(value)
        return outer(_build(element, item, f"{where}[{i}]", defaults) for i, item in items)
    if outer is dict and inner:
        return {k: _build(inner[1], item, f"{where}.{k}", defaults) for k, item in value.items()}
    return value


def _build_dataclass(kind: Any, value: Any, where: str, defaults: bool) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{where or 'its content'} is not an object")
    declared, prefix = get_type_hints(kind), f"{where}." if where else ""
    if unknown := sorted(value.keys() - {part.name for part in fields(kind)}):
        raise ValueError(f"{prefix}{unknown[0]} is not a known key")
    required = {p.name for p in fields(kind) if not defaults or p.default is MISSING}
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{prefix}{missing[0]} is missing")
    items = value.items()
    return kind(**{key: _build(declared[key], item, prefix + key, defaults) for key, item in items})


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is repeated")
        found[key] = value
    return found


def _integer(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError("a whole number has more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refuse(text)
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")
