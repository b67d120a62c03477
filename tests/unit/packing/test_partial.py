"""An unfinished stream of unknown content: resumed, or refused in one sentence."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qvlm.errors import RunError, UserError
from qvlm.packing.partial import PartialCheckpoint
from qvlm.packing.saving import PROGRESS, UNFINISHED
from tests.helpers.files import small_files
from tests.helpers.folders import content

NAMES = ["first", "second"]


def begin(tmp_path: Path, **options: Any) -> PartialCheckpoint:
    return PartialCheckpoint(tmp_path / "packed", "it", NAMES, "cpu", **options)


@pytest.fixture
def progress(tmp_path: Path) -> Path:
    """The progress of a stream with one finished block."""
    stream = begin(tmp_path)
    save_file({"rest": torch.zeros(3)}, stream.partial / stream._shard(0))
    stream.add(nn.LayerNorm(3), [((torch.ones(2, 3),), {"mask": None})], ["first.a"])
    return stream.partial / PROGRESS


def altered(**changes: Any) -> Callable[[Path], None]:
    def alter(file: Path) -> None:
        torch.save(torch.load(file, weights_only=True) | changes, file)

    return alter


class Payload:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def cut(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(share * file.stat().st_size))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in range(100, len(data), 97):
        data[place] ^= 0xFF
    file.write_bytes(data)


def without(key: str) -> Callable[[Path], None]:
    def drop(file: Path) -> None:
        found = torch.load(file, weights_only=True)
        del found[key]
        torch.save(found, file)

    return drop


DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{f"cut at {share}": cut(share) for share in (0, 0.01, 0.5, 0.9, 0.999)},
    "flipped": flip,
    "text": lambda file: file.write_text("hello"),
    "pickle": lambda file: file.write_bytes(pickle.dumps({"hash": "it"})),
    "payload": lambda file: file.write_bytes(pickle.dumps(Payload(file.with_name("executed")))),
    "saved payload": lambda file: torch.save(Payload(file.with_name("executed")), file),
    "list": lambda file: torch.save([], file),
    "none": lambda file: torch.save(None, file),
    "extra": altered(more=1),
    **{f"no {key}": without(key) for key in ("hash", "done", "calls", "uncalibrated", "forms")},
    "done below": altered(done=-1),
    "done above": altered(done=3),
    "done true": altered(done=True),
    "done text": altered(done="1"),
    "hash": altered(hash=1),
    "calls": altered(calls={}),
    "call": altered(calls=[1]),
    "arguments": altered(calls=[([], {})]),
    "uncalibrated": altered(uncalibrated=[1]),
    "form": altered(forms={"a": {"in_features": 1}}),
    "form name": altered(forms={1: {}}),
    "form list": altered(forms={"a": []}),
}


def test_a_stream_goes_on(progress: Path, tmp_path: Path) -> None:
    stream = begin(tmp_path)
    assert (stream.done, stream.uncalibrated) == (1, ["first.a"])
    assert torch.equal(stream.calls[0][0][0], torch.ones(2, 3))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_progress_is_one_sentence(damage: str, progress: Path, tmp_path: Path) -> None:
    DAMAGES[damage](progress)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"progress\.pt is damaged\. Delete .*, add force") as no:
        begin(tmp_path)
    assert "\n" not in str(no.value)
    assert content(tmp_path) == before  # and so nothing was executed
    assert begin(tmp_path, anew=True).done == 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.99])
def test_a_damaged_shard_is_one_sentence(
    number: int, share: float | None, progress: Path, tmp_path: Path
) -> None:
    shard = sorted(progress.parent.glob("*.safetensors"))[number]
    if share is None:
        shard.unlink()
    else:
        cut(share)(shard)
    with pytest.raises(UserError, match="safetensors is missing or damaged. Delete"):
        begin(tmp_path)
    assert begin(tmp_path, anew=True).done == 0


def test_the_first_file_of_a_stream_is_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    write = PartialCheckpoint._write

    def watched(self: PartialCheckpoint, name: str, how: Any) -> None:
        seen.append(name)
        write(self, name, how)

    monkeypatch.setattr(PartialCheckpoint, "_write", watched)
    begin(tmp_path)
    assert seen == [PROGRESS]


def test_an_unfinished_save_from_memory_gives_way(tmp_path: Path) -> None:
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    (partial / UNFINISHED).write_text("")
    (partial / "model.safetensors").write_bytes(b"half")
    begin(tmp_path)
    assert os.listdir(partial) == [PROGRESS]


@pytest.mark.parametrize("limit", [0, 100, 1500])
def test_a_full_disk_keeps_what_is_finished(limit: int, progress: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    stream = begin(tmp_path)
    with small_files(limit), pytest.raises(RunError, match=r"cannot be written \(.*too large"):
        stream.add(nn.Linear(300, 3), [((torch.ones(900, 3),), {})], [])
    assert {name: data for name, data in content(tmp_path).items() if name in before} == before
    assert not list(tmp_path.rglob(".*"))
    assert begin(tmp_path).done == 1
