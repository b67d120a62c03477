"""Where a number comes from: code, weights, packages, revision and hardware.

A record is reused as long as what made it is unchanged, so the code version must change whenever a
number can, and should not when only a table or the command line does. It is the hash of the source
files that the pipeline and the chosen method reach by imports, found by reading the import
statements, less the modules that only record and show. Another method's file is not reached, so
editing it invalidates its own records alone.

Left out: versions of packages. They are recorded, not hashed; `force=true` computes anew.
"""

import ast
import functools
import hashlib
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from qvlm.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]

# They write, show, look up or arrange results, and change none.
BYSTANDERS = (
    *("__init__", "cli", "config", "errors", "records", "runtime"),
    *("planning", "sweep", "tables"),
)

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "numpy", "pandas")


def code_version(method_file: Path) -> str:
    """Hashes the source that the pipeline and the method defined in `method_file` are made of."""
    digest = hashlib.sha256()
    for name, path in sorted(sources([PACKAGE / "cell" / "pipeline.py", method_file]).items()):
        digest.update(name.encode() + b"\0" + _sha256(path).encode())
    return digest.hexdigest()


def sources(roots: Iterable[Path]) -> dict[str, Path]:
    """Every file reached by imports from `roots`, by its path from where its imports start.

    Only files of this package and of the roots' own top-level folders count. YAML files beside a
    reached module belong to it.
    """
    found: dict[str, Path] = {}
    waiting = [path.resolve() for path in roots]
    tops = {_top(path) for path in waiting} | {PACKAGE.parent}
    while waiting:
        path = waiting.pop()
        top = _top(path)
        name = path.relative_to(top).as_posix()
        if name in found or _bystander(path):
            continue
        found[name] = path
        data = list(path.parent.glob("*.yaml")) if path.is_relative_to(PACKAGE) else []
        if data:  # it may name any function beside it
            found |= {file.relative_to(top).as_posix(): file for file in data}
            waiting += path.parent.glob("*.py")
        package = path.relative_to(top).parent.parts
        for imported in _imports(path, package):
            waiting += [p for base in tops for p in _files(base, imported)]
    return found


def content_hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Hashes the files of a folder, by name and content.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give an existing one")
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and path.is_file():
            name = path.relative_to(folder).as_posix()
            digest.update(name.encode() + b"\0" + _sha256(path).encode())
    return digest.hexdigest()


def surroundings() -> dict[str, Any]:
    """What is recorded beside a number without naming it: time, packages, revision, hardware."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": revision(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in PACKAGES
    }


def revision_in_words(git: Mapping[str, Any]) -> str:
    """The commit of what `revision` returned, as pages print it."""
    return f"{git['revision'] or 'unknown'}" + (", with local changes" if git["dirty"] else "")


def revision() -> dict[str, Any]:
    """The git revision of this checkout and whether its tracked files were changed since.

    What a run generates does not count: the second table of a fresh clone is as clean as the first.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"revision": commit, "dirty": bool(changed) if commit else None}


def hardware() -> dict[str, Any]:
    """Processor, memory and GPU; no name that identifies the machine."""
    import torch

    return {
        "system": platform.system(),
        "cpu": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _sha256(path: Path) -> str:
    """The hash of a file; computed once for as long as the file is not written to."""
    status = path.stat()
    return _hash_file(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_file(path: Path, _size: int, _written: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _top(path: Path) -> Path:
    """The folder from which a module is imported: above its outermost package."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _bystander(path: Path) -> bool:
    if not path.is_relative_to(PACKAGE):
        return False
    return path.relative_to(PACKAGE).with_suffix("").parts[0] in BYSTANDERS


def _imports(path: Path, package: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The dotted names that a file imports; `from a import b` may mean the module a.b."""
    status = path.stat()
    return _read_imports(path, package, status.st_size, status.st_mtime_ns)


@functools.cache
def _read_imports(
    path: Path, package: tuple[str, ...], _size: int, _written: int
) -> tuple[tuple[str, ...], ...]:
    names: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = start + tuple(node.module.split(".") if node.module else ())
            names += [base, *((*base, alias.name) for alias in node.names)]
    return tuple(names)


def _files(top: Path, name: tuple[str, ...]) -> Iterator[Path]:
    """The file of a dotted name; not the packages around it, which only re-export it."""
    module = top.joinpath(*name)
    for path in (module / "__init__.py", module.with_name(f"{module.name}.py")):
        if path.is_file():
            yield path.resolve()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
