"""Which cell a record is of, whichever version of the code wrote it.

A record's hash holds the version of the code, so that a sweep never takes an older number for its
own. Committed answers outlive versions, and options are added in the meantime. Here an option that
is younger than a record has its default, which is what the older code did.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from qvlm.config.schema import RunConfig
from qvlm.errors import RunError, UserError
from qvlm.records.record import identify, plain

SUFFIX = ".json.gz"  # of the file of a cell's committed answers; see `qvlm.tables.answers`
METHODS = "qvlm.methods."  # others may have changed what they do by default


def cell_of(run: Mapping[str, Any]) -> str:
    """Returns what identifies a cell in every version of the code.

    Args:
        run: Content of a `run.json`, or the part of one that committed answers keep.

    Returns:
        64 hexadecimal digits.
    """
    parts = dict(run["influences"])
    defaults = {part: given for part, given in _parts().items() if part in parts}
    defaults["method"] = _parameters(str(parts["method"].get("_target_")))
    return identify(_filled(plain(defaults), plain(parts)), "", run["files_hashed"])


@lru_cache(maxsize=4)
def cells_in(folder: Path) -> frozenset[str]:
    """Returns the cells whose committed answers a folder holds, as `cell_of` names them.

    Raises:
        UserError: If there is no such folder.
        RunError: If a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"committed={folder} is not a folder. Give one such as results/answers/claims."
        )
    found = set()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            found.add(cell_of(json.loads(gzip.decompress(path.read_bytes()))["run"]))
        except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
            raise RunError(f"{path} is not what a page wrote; make the page anew") from error
    return frozenset(found)


def _parts() -> dict[str, dict[str, Any]]:
    """Returns the defaults of the groups of a configuration that have a class of their own."""
    made = {one.name: one.type for one in fields(RunConfig) if is_dataclass(one.type)}
    return {name: asdict(kind()) for name, kind in made.items() if isinstance(kind, type)}


def _parameters(target: str) -> dict[str, Any]:
    """Returns the defaults of a method of this package; nothing for any other."""
    if not target.startswith(METHODS):
        return {}
    module, _, name = target.rpartition(".")
    try:
        found = signature(getattr(import_module(module), name)).parameters.values()
    except (ImportError, AttributeError):  # it has another name by now
        return {}
    return {one.name: one.default for one in found if one.default is not Parameter.empty}


def _filled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `given` with the defaults of what it lacks, group by group."""
    inner = {
        key: _filled(defaults[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    return {**defaults, **given, **inner}
