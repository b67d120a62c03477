"""What the code version of a cell sees, and what it does not."""

import ast
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qvlm.errors import UserError
from qvlm.records import provenance
from qvlm.records.environment import command_line

pytestmark = pytest.mark.slow


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of our source that a test may edit."""
    copy = tmp_path / "qvlm"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(provenance.PACKAGE, copy, ignore=ignored)
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    return copy


def version(package: Path, method: str = "rtn") -> str:
    return provenance.code_version(package / "methods" / f"{method}.py")


@pytest.mark.parametrize(
    ("file", "changes_rtn", "changes_fp"),
    [
        ("methods/rtn.py", True, False),
        ("methods/full_precision.py", False, True),
        ("quantization/quantizer.py", True, True),
        ("quantization/linear.py", True, True),
        ("models/llava.py", True, True),
        ("models/checkpoints/original.py", True, True),
        ("evaluation/task.py", True, True),
        ("data/scienceqa.py", True, True),
        ("data/prompts.py", True, True),
        ("runtime/workers.py", True, True),
        ("cell/pipeline.py", True, True),
        ("cli.py", False, False),
        ("config/schema.py", False, False),
        ("records/record.py", False, False),
        ("records/tracking.py", False, False),
        ("sweep/__init__.py", False, False),
        ("tables/table2.py", False, False),
        ("__init__.py", False, False),
    ],
)
def test_the_version_changes_with_the_code_that_counts(
    package: Path, file: str, changes_rtn: bool, changes_fp: bool
) -> None:
    before = version(package), version(package, "full_precision")
    assert (version(package), version(package, "full_precision")) == before
    assert (package / file).is_file()
    with (package / file).open("a") as source:
        source.write("\nCHANGED = 1\n")
    after = version(package), version(package, "full_precision")
    assert (after[0] != before[0], after[1] != before[1]) == (changes_rtn, changes_fp)


def test_every_data_file_beside_a_reached_module_counts(package: Path) -> None:
    (source,) = package.rglob("native_rows.h")  # a product that a CPU takes first
    before = version(package)
    code = source.read_text()
    line = next(line for line in code.splitlines() if line.rstrip().endswith(";"))
    source.write_text(code.replace(line, line.replace(";", " + 0;"), 1))
    changed = version(package)
    assert changed != before
    task = package / "evaluation" / "scienceqa.yaml"
    task.write_text(task.read_text() + "\n# changed\n")
    assert version(package) not in (before, changed)

    settled = version(package)
    for name in (".native.c.swp", "native.c~", "NOTES.md"):
        source.with_name(name).write_text("not loaded")
    assert version(package) == settled
    source.with_name("scales.csv").write_text("1,2\n")
    assert version(package) != settled


def other_docstring(code: str) -> str:
    return code.replace('"""', '"""Other words. ', 1)


def no_docstring(code: str) -> str:
    tree = ast.parse(code)
    first = tree.body[0]
    assert isinstance(first, ast.Expr)
    return "\n".join(code.splitlines()[first.end_lineno :]) + "\n"


def prose_below_an_attribute(code: str) -> str:
    return code + '\n"""What was just defined."""\n'


def comments(code: str) -> str:
    return f"# A remark.\n{code}\n# Another one.\n"


def blank_lines(code: str) -> str:
    return code.replace("\n\n", "\n\n\n\n") + "\n\n"


@pytest.mark.parametrize(
    "edit", [other_docstring, no_docstring, prose_below_an_attribute, comments, blank_lines]
)
def test_prose_and_layout_change_no_version(package: Path, edit: Callable[[str], str]) -> None:
    before = version(package)
    for name in ("quantization/quantizer.py", "cell/pipeline.py", "methods/rtn.py"):
        file = package / name
        code = file.read_text()
        assert edit(code) != code
        file.write_text(edit(code))
    assert version(package) == before


@pytest.mark.parametrize(
    ("written", "changed"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "y = 1"),
        ("x = None", "x = 'None'"),
        ("x = [None]", "x = []"),
        ("def f(a=None): pass", "def f(a): pass"),
        ("def f(): return", "def f(): return None"),
        ("f('text')", "f('other text')"),
        ("x = 'text'", "x = 'other text'"),
        ("for a in b: c()", "for a in b: c(a)"),
    ],
)
def test_code_that_differs_is_told_apart(written: str, changed: str) -> None:
    def canonical(code: str) -> str:
        return provenance.canonical_code(ast.parse(code))

    assert canonical(written) == canonical(f"{written}  # a remark")
    assert canonical(written) != canonical(changed)


def test_what_is_not_followed_runs_no_code() -> None:
    """The packages around a reached module are imported too, so they may only re-export."""
    roots = [provenance.PACKAGE / "cell" / "pipeline.py", provenance.PACKAGE / "methods" / "rtn.py"]
    reached = set(provenance.sources(roots).values())
    for file in provenance.PACKAGE.rglob("__init__.py"):
        folder = file.relative_to(provenance.PACKAGE).parts[0]
        if file in reached or folder in provenance.BYSTANDERS:
            continue
        for statement in ast.parse(file.read_text()).body:
            names = statement.targets if isinstance(statement, ast.Assign) else []
            dunder = [isinstance(n, ast.Name) and n.id.startswith("__") for n in names]
            prose = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            harmless = isinstance(statement, ast.Import | ast.ImportFrom) or prose
            assert harmless or (dunder and all(dunder)), f"{file}, line {statement.lineno}"


def test_a_method_from_elsewhere_counts_with_what_it_imports(tmp_path: Path) -> None:
    method, helper = tmp_path / "mine.py", tmp_path / "helper.py"
    method.write_text("import helper\nfrom qvlm.methods.base import MethodReport\n")
    helper.write_text("x = 1\n")
    (tmp_path / "other.py").write_text("unrelated = True\n")
    files = provenance.sources([method])
    assert {"mine.py", "helper.py", "qvlm/methods/base.py"} <= set(files)
    assert "other.py" not in files
    before = provenance.code_version(method)
    helper.write_text("x = 2\n")
    assert provenance.code_version(method) != before


def test_the_content_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    (folder / "README.md").write_text("card")
    first = provenance.content_hash(folder, (".safetensors",))
    (folder / "README.md").write_text("another card")
    assert provenance.content_hash(folder, (".safetensors",)) == first
    (folder / "model.safetensors").write_bytes(b"two")
    os.utime(folder / "model.safetensors", (1, 1))
    second = provenance.content_hash(folder, (".safetensors",))
    assert second != first
    (folder / "model.safetensors").rename(folder / "renamed.safetensors")
    assert provenance.content_hash(folder, (".safetensors",)) != second
    with pytest.raises(UserError, match="is not a folder"):
        provenance.content_hash(tmp_path / "nowhere", (".json",))


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("/home/someone/qvlm/run.py", "python run.py 'results_dir=a b'"),
        ("/home/someone/qvlm/qvlm/__main__.py", "python -m qvlm 'results_dir=a b'"),
    ],
)
def test_the_command_names_no_folder_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, started: str, command: str
) -> None:
    monkeypatch.setattr("sys.argv", [started, "results_dir=a b"])
    assert command_line() == command
