"""Files are written whole or not at all, with the modes of the user, also when the disk is full."""

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qvlm.errors import RunError, UserError
from qvlm.records.files import explained, reason, temporary_name, write_file, write_files

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 2**16  # bytes that one file may have on the "full disk" of these tests


def tensors(path: Path) -> None:
    save_file({"a": torch.zeros(LIMIT)}, path)


def pickled(path: Path) -> None:
    torch.save(torch.zeros(LIMIT), path)


LARGE: list[Any] = [b"x" * 2 * LIMIT, "x" * 2 * LIMIT, tensors, pickled]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond `LIMIT` bytes: the system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("large", LARGE, ids=["bytes", "text", "safetensors", "torch"])
def test_every_kind_of_content_is_written(tmp_path: Path, large: Any) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_file(path, large)
    size = path.stat().st_size
    assert size >= 2 * LIMIT
    assert os.listdir(path.parent) == ["file.bin"]
    write_file(path, "short\n")
    assert path.read_bytes() == b"short\n"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("large", LARGE, ids=["bytes", "text", "safetensors", "torch"])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, large: Any, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", large)
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "plain")}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("large", LARGE, ids=["bytes", "text", "safetensors", "torch"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, full_disk: None, large: Any) -> None:
    write_files({tmp_path / "a.txt": "old a", tmp_path / "b.bin": "old b"})
    for kind in (RunError, UserError):
        with (
            pytest.raises(kind, match=r"^x: it cannot be written \(.+\); free some$") as refusal,
            explained("x: it", kind, "free some"),
        ):
            write_files({tmp_path / "a.txt": "new a", tmp_path / "b.bin": large})
        assert "\n" not in str(refusal.value)
    assert content(tmp_path) == {"a.txt": b"old a", "b.bin": b"old b"}
    with pytest.raises(OSError, match=r"File too large|fail|I/O|error"):
        write_file(tmp_path / "new.bin", large)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.bin"]


@pytest.mark.parametrize("place", ["file/under", "folder", "/proc/nowhere/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match=r"\w") as refusal:
        write_file(tmp_path / place, "text")
    assert reason(refusal.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("call", range(6))
def test_an_interrupt_at_any_step_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write_files({tmp_path / "a": "old", tmp_path / "b": "old"})
    calls = 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > call:
                raise KeyboardInterrupt
            return original(*arguments)

        return replacement

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(Path, "replace", failing(Path.replace))
        try:
            write_files({tmp_path / "a": "new", tmp_path / "b": "new"})
        except KeyboardInterrupt:
            assert call < 5
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert {(tmp_path / name).read_text() for name in "ab"} <= {"old", "new"}


def test_a_kill_leaves_the_old_file_and_a_hidden_one(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "old")
    script = """
import os, signal, sys
from pathlib import Path
from qvlm.records.files import write_file
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_file(Path(sys.argv[1]), "new")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "a").read_text() == "old"
    (leftover,) = (name for name in os.listdir(tmp_path) if name != "a")
    assert leftover.startswith(".a.") and leftover.endswith(".partial")


def test_temporary_names_are_valid_where_the_name_is() -> None:
    longest = Path("folder") / ("x" * 255)
    assert len(temporary_name(longest).name) < 100
    assert temporary_name(longest) != temporary_name(longest)
