"""What may import what; docs/architecture.md has the same table for people."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qvlm

PACKAGE = Path(qvlm.__file__).resolve().parent
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "families": set(),
    "markdown": set(),
    "validation": {"errors"},
    "bits": {"errors", "validation"},
    "command": {"errors", "validation"},
    "registration": {"models"},
    "routes": {"command", "errors"},
    "config": {"bits", "command", "errors", "routes", "validation"},
    "data": {"errors", "validation"},
    "quantization": {"bits", "errors", "families", "validation"},
    "records": {"bits", "config", "data", "errors", "validation"},
    "runtime": {"errors", "validation"},
    "packing": {"bits", "errors", "quantization", "records", "validation"},
    "models": {"data", "errors", "families", "packing", "validation"},
    "methods": {"errors", "quantization", "validation"},
    "evaluation": {"config", "data", "errors", "models", "records", "runtime", "validation"},
}
BELOW["cell"] = {*BELOW} - {"command", "markdown", "registration", "routes"}
BELOW["planning"] = {*BELOW}
BELOW["exporting"] = {"command", "errors", "models", "packing", "records"}
BELOW["proving"] = {"api", "command", "errors", "markdown", "models", "packing", "quantization"}
BELOW["tables"] = {*BELOW}
BELOW["summary"] = {*BELOW}
BELOW["report"] = {*BELOW}
BELOW["api"] = {*BELOW} - {"markdown", "planning", "report", "routes", "summary", "tables"}
BELOW["lm_eval_model"] = {"api", "command", "errors", "evaluation"}
BELOW["sweep"] = {"bits", "cell", "config", "errors", "planning", "records", "validation"}
BELOW["cli"] = {*BELOW} - {"api", "report", "tables"}


def imported(file: Path) -> Iterator[str]:
    """The parts of this package that a file imports."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "qvlm" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("part", sorted(BELOW))
def test_arrows_point_downwards(part: str) -> None:
    files = [PACKAGE / f"{part}.py", *(PACKAGE / part).rglob("*.py")]
    found = {name for file in files if file.is_file() for name in imported(file)} - {part}
    assert found <= BELOW[part]


def test_every_part_has_a_rule() -> None:
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    parts = {path.stem for path in [*folders, *PACKAGE.glob("*.py")]}
    assert parts - {"__init__", "__main__"} <= {*BELOW}
