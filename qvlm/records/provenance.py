"""The code version of a cell, and the hash of the files that it reads.

A record is reused as long as what made it is unchanged. The code version must therefore change
whenever a number can, and should stay when only prose, a table or the command line changes. It is
made of the modules that the pipeline and the method reach through import statements:

- Python files count by their syntax tree, without docstrings and comments.
- Data files beside a reached module of this package (`native.c`, YAML, CSV) count by their bytes.
- The folders of `BYSTANDERS` do not count, because they arrange, record or show results.

The file of a method is reached only by that method, so an edit there leaves the records of other
methods valid. Package versions are recorded and not hashed; `force=true` computes a cell anew.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qvlm.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]

# Folders that change no number, and the package's own file, which holds its version. What a
# configuration says is hashed by its values.
BYSTANDERS = ("__init__.py", "config", "planning", "records", "sweep", "tables")

# Files beside a module that no module loads.
NOT_DATA = (".md", ".py", ".pyc", ".pyi", ".so")


def code_version(method_file: Path | None) -> str:
    """Hashes the code that the pipeline and a method run.

    Args:
        method_file: File that defines the method; None if no method runs.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    roots = [PACKAGE / "cell" / "pipeline.py", *([method_file] if method_file else [])]
    for name, path in sorted(sources(roots).items()):
        content = _read(path).code if path.suffix == ".py" else _hash_bytes(path)
        digest.update(name.encode() + b"\0" + content.encode())
    return digest.hexdigest()


def sources(roots: Iterable[Path]) -> dict[str, Path]:
    """Finds every file that `roots` reach by imports, and the data files beside them.

    Only files of this package and of the roots' own top-level folders count. The package's YAML
    files may name a function beside them, so their whole folder is reached.

    Returns:
        Path of each file, by its name relative to the folder where its imports start.
    """
    found: dict[str, Path] = {}
    waiting = [path.resolve() for path in roots]
    # The last is looked at first: a file of this package counts before one of the same name.
    tops = [*sorted({_top(path) for path in waiting} - {PACKAGE.parent}), PACKAGE.parent]
    while waiting:
        path = waiting.pop()
        top = _top(path)
        name = path.relative_to(top).as_posix()
        if name in found or _is_bystander(path):
            continue
        found[name] = path
        data = list(_data_beside(path)) if path.is_relative_to(PACKAGE) else []
        found |= {file.relative_to(top).as_posix(): file for file in data}
        if any(file.suffix == ".yaml" for file in data):
            waiting += path.parent.glob("*.py")
        for imported in _read(path).imports:
            waiting += [p for base in tops for p in _files(base, imported)]
    return found


def content_hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Hashes the files of a folder, by name and content.

    Args:
        folder: Folder whose files, and those of the folders in it, are hashed.
        suffixes: Endings of the file names that count, such as ".safetensors".

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give an existing one.")
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes and path.is_file():
            name = path.relative_to(folder).as_posix()
            digest.update(name.encode() + b"\0" + _hash_bytes(path).encode())
    return digest.hexdigest()


def canonical_code(tree: object) -> str:
    """Writes the syntax tree of a Python file down, without docstrings, comments and positions.

    The notation is that of `ast.dump`, whose own output differs between Python versions in which
    empty fields it prints. `ast.unparse` differs as well: it quotes f-strings in another way since
    Python 3.12. Here no empty field is written, so Python 3.11 to 3.13 agree.

    Args:
        tree: Node of a syntax tree, list of nodes, or value of a node's field.
    """
    if isinstance(tree, ast.AST):
        fields = ", ".join(
            f"{name}={canonical_code(content)}"
            for name, content in ast.iter_fields(tree)
            if content is not None and content != []
        )
        return f"{type(tree).__name__}({fields})"
    if isinstance(tree, list):
        return f"[{', '.join(canonical_code(item) for item in tree if not _is_docstring(item))}]"
    return repr(tree)


def _is_docstring(node: object) -> bool:
    """Whether a statement is nothing but a string: a docstring, or prose below an attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _hash_bytes(path: Path) -> str:
    """The hash of a file's bytes. It is kept until the file is written to."""
    status = path.stat()
    return _hash_file(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_file(path: Path, _size: int, _written: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_beside(module: Path) -> Iterator[Path]:
    """The data files in a module's folder; hidden files and editors' copies are not data."""
    for path in module.parent.iterdir():
        hidden = path.name.startswith(".") or path.name.endswith("~")
        if path.is_file() and path.suffix not in NOT_DATA and not hidden:
            yield path


def _top(path: Path) -> Path:
    """The folder from which a module is imported: above its outermost package."""
    if path.is_relative_to(PACKAGE):
        return PACKAGE.parent
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _is_bystander(path: Path) -> bool:
    return path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in BYSTANDERS


@dataclass(frozen=True)
class _Source:
    """What a Python file contributes.

    Attributes:
        code: Hash of its syntax tree, 64 hexadecimal digits.
        imports: Dotted names that it imports; `from a import b` may mean the module `a.b`.
    """

    code: str
    imports: tuple[tuple[str, ...], ...]


def _read(path: Path) -> _Source:
    """Reads a Python file. The answer is kept until the file is written to."""
    status = path.stat()
    return _parse(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _parse(path: Path, _size: int, _written: int) -> _Source:
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = path.relative_to(_top(path)).parent.parts
    names: list[tuple[str, ...]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = start + tuple(node.module.split(".") if node.module else ())
            names += [base, *((*base, alias.name) for alias in node.names)]
    return _Source(hashlib.sha256(canonical_code(tree).encode()).hexdigest(), tuple(names))


def _files(top: Path, name: tuple[str, ...]) -> Iterator[Path]:
    """The file of a dotted name; not the packages around it, which only re-export it."""
    module = top.joinpath(*name)
    for path in (module / "__init__.py", module.with_name(f"{module.name}.py")):
        if path.is_file():
            yield path.resolve()
