"""What a stranger gets: the wheel, run from an empty folder without the clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["evaluation.limit=8", "calibration.samples=4", "tracking=off", "threads=1"]
NOT_SHIPPED = (".py", ".pyc", ".md")  # what is no data: code is found as packages


def tracked() -> list[str]:
    """The files of the clone, or all there are if this is not one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this clone, built with the tools that are installed."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        if name.startswith(("qvlm/", "hydra_plugins/", "conf/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "wheels"), str(source))
    (made,) = (source / "wheels").glob("*.whl")
    return made


def pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_holds_every_file_that_is_not_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {*archive.namelist()}
    wanted = {
        re.sub("^conf/", "qvlm/conf/", name)
        for name in tracked()
        if name.startswith(("qvlm/", "conf/")) and not name.endswith(NOT_SHIPPED)
    }
    assert len(wanted) > 50
    assert wanted - shipped == set()
    code = {n for n in tracked() if n.startswith(("qvlm/", "hydra_plugins/")) and n.endswith(".py")}
    assert code - shipped == set()
    assert not any(name.startswith(("conf/", "tests/", "experiments/")) for name in shipped)


def test_a_cell_and_a_table_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip("install", "--target", str(site), str(wheel))
    script = site / "bin" / "qvlm"
    assert os.access(script, os.X_OK)
    words = ["table2", "model=mini_llava", "method=fp,rtn", "bits=w4a4", *SMALL]
    done = subprocess.run(
        [sys.executable, str(script), *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in here.iterdir()) == ["results"]
    names = sorted(path.name.rpartition("-")[0] for path in (here / "results/runs").glob("[!.]*"))
    assert names == ["mini_llava-fp-fp", "mini_llava-rtn-w4a4"]
    assert "mini_llava on 8 questions of miniature, split test" in done.stdout  # the comparison
    page = (here / "results" / "table2.md").read_text(encoding="utf-8")
    assert page in done.stdout
    assert "Command: `qvlm table2 model=mini_llava method=fp,rtn" in page
    assert "not in a git repository" in page
    traces = subprocess.run(
        [sys.executable, "-c", "import qvlm; print(qvlm.__file__, qvlm.__version__)"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert traces.stdout.split() == [str(site / "qvlm" / "__init__.py"), version()]


def version() -> str:
    """The version that pyproject.toml and CITATION.cff state."""
    (stated,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\nversion: {stated}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {stated}\n" in (ROOT / "CHANGELOG.md").read_text()
    return stated
