"""A save replaces nothing but a save, is whole or absent, and has the modes of new files."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from qvlm.errors import RunError, UserError
from qvlm.packing import saving, write_origin
from qvlm.packing.saving import PROGRESS, UNFINISHED, require_own, save_folder
from tests.helpers.files import small_files
from tests.helpers.folders import content
from tests.helpers.origins import make_origin, write_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def fill(folder: Path) -> None:
    """Writes what a save writes, with the same libraries."""
    save_file({"a": torch.arange(5000)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}" * 5000)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(5000)}, "w0")).save(
        str(folder / "tokenizer.json")
    )
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    write_origin(folder, make_origin(files=names))


@pytest.mark.parametrize("place", ["new", "below/a/b", "empty", "linked", "below/../new"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_save_is_written_where_nothing_is(
    place: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to("empty")
    monkeypatch.chdir(tmp_path)
    folder = Path(place) if relative else tmp_path / place
    for _ in range(2):  # and over itself
        save_folder(folder, fill)
        names = ["config.json", "model.safetensors", "qvlm.json", "tokenizer.json"]
        assert sorted(os.listdir(folder.resolve())) == names
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("place", [".", "..", "../here"])
def test_the_current_folder_is_not_replaced(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=f"^save_packed={place} is the current folder"):
        save_folder(Path(place), fill)
    assert Path.cwd().is_dir()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_new_files(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_folder(tmp_path / "packed", fill)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "packed").iterdir()} == {mode}


def others(folder: Path) -> None:
    (folder / "diary.txt").write_text("dear")


def checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def named_alike(folder: Path) -> None:
    write_json(folder, {"mine": 1})


def beside_a_save(folder: Path) -> None:
    folder.rmdir()
    save_folder(folder, fill)
    (folder / "README.md").write_text("notes")


def below_a_save(folder: Path) -> None:
    folder.rmdir()
    save_folder(folder, fill)
    (folder / "runs").mkdir()


def half(folder: Path) -> None:
    checkpoint(folder)
    (folder / UNFINISHED).write_text("")  # a mark is known in FOLDER.partial only


PLACES = [others, checkpoint, named_alike, beside_a_save, below_a_save, half]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_of_other_files_is_refused(place: object, streamed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    place(folder)  # type: ignore[operator]
    before = content(tmp_path)
    (tmp_path / "link").symlink_to("folder")
    for way in (folder, tmp_path / "link", tmp_path / "link" / ".." / "folder"):
        with pytest.raises(UserError, match=r"^save_packed=.* Give a new or an empty folder\.$"):
            require_own(way, streamed)
        with pytest.raises(UserError):
            save_folder(way, fill)
    (tmp_path / "link").unlink()
    assert content(tmp_path) == before


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "packed.partial").write_text("mine")
    for name in ("file", "loop", "/", "packed", "a\0b"):
        with pytest.raises(UserError, match="^save_packed"):
            save_folder(tmp_path / name, fill)
    assert (tmp_path / "file").read_text() == (tmp_path / "packed.partial").read_text() == "mine"


def test_an_unfinished_save_is_begun_anew_and_other_files_in_its_place_are_not(
    tmp_path: Path,
) -> None:
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    (partial / UNFINISHED).write_text("")
    (partial / "model.safetensors").write_bytes(b"half")
    save_folder(tmp_path / "packed", fill)
    assert not partial.exists()

    partial.mkdir()
    (partial / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match=r"packed\.partial holds other files"):
        save_folder(tmp_path / "packed", fill)
    assert (partial / "diary.txt").read_text() == "dear"
    (partial / "diary.txt").rename(partial / PROGRESS)  # hours of work
    with pytest.raises(UserError, match="holds an unfinished stream"):
        save_folder(tmp_path / "packed", fill)
    assert (partial / PROGRESS).is_file()


def test_two_saves_into_one_folder_are_not_mixed(tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> None:
        fill(folder)
        before = content(folder)
        with pytest.raises(RunError, match="another save into .* is going on"):
            save_folder(tmp_path / "packed", lambda other: (other / "config.json").write_text("{}"))
        assert content(folder) == before

    save_folder(tmp_path / "packed", meanwhile)
    assert (tmp_path / "packed" / "model.safetensors").exists()
    save_folder(tmp_path / "packed", fill)  # once it has ended


def test_the_mark_is_the_first_file(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    save_folder(tmp_path / "packed", lambda folder: (seen.append(os.listdir(folder)), fill(folder)))
    assert seen == [[UNFINISHED]]


@pytest.mark.parametrize("limit", [0, 1, 1000, 20_000, 45_000])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_full_disk_leaves_what_was_there(limit: int, replaced: bool, tmp_path: Path) -> None:
    """At the weights, the configuration or the tokenizer."""
    folder = tmp_path / "packed"
    if replaced:
        save_folder(folder, fill)
    before = content(tmp_path)
    with (
        small_files(limit),
        pytest.raises(RunError, match=r"^save_packed: .* cannot be written \(.*File too large"),
    ):
        save_folder(folder, fill)
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["packed"] * replaced
    save_folder(folder, fill)
    assert sorted(content(tmp_path)) == [
        f"packed/{name}" for name in ("config.json", "model.safetensors", "qvlm.json")
    ] + ["packed/tokenizer.json"]


@pytest.mark.parametrize("step", ["mkdir", "write_file", "sync", "rename", "chmod"])
def test_no_step_of_a_save_loses_the_one_before(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packed"
    save_folder(folder, fill)
    before = content(tmp_path)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, step) if hasattr(Path, step) else (saving, step)), full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
            save_folder(folder, fill)
    assert content(tmp_path) == before
    save_folder(folder, fill)


def test_the_save_before_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packed"
    save_folder(folder, fill)
    before, rename = content(tmp_path), Path.rename

    def once(self: Path, target: Path) -> Path:
        if self.name == "packed.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(RunError, match="No space left"):
        save_folder(folder, fill)
    assert content(tmp_path) == before


def test_a_save_that_was_killed_while_it_replaced_another_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    script = f"""
import os, signal
from pathlib import Path
from qvlm.packing.saving import save_folder
from tests.unit.packing.test_saving import fill

folder, rename = Path({str(folder)!r}), Path.rename
save_folder(folder, fill)
def once(self, target):
    if self.name == "packed.partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = once
save_folder(folder, fill)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    other = tmp_path / ".packed.0123abcd.partial"  # not of ours
    other.mkdir()
    (before,) = {path.name for path in tmp_path.iterdir()} - {"packed.partial", other.name}
    assert before.startswith(".packed.")
    save_folder(folder, fill)
    assert sorted(os.listdir(tmp_path)) == [other.name, "packed"]


def test_other_exceptions_pass_and_leave_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_folder(tmp_path / "packed", broken)
    assert os.listdir(tmp_path) == []
