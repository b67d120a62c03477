"""What a stranger's `qvlm.json` says is typed data, or is refused in one sentence."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qvlm.cell.checks import check_options
from qvlm.cell.identity import Cell, code_version, resolve
from qvlm.cell.method import Applied, method_of
from qvlm.cell.settled import read_settled, require_agreement
from qvlm.errors import UserError
from qvlm.packing import read_origin
from qvlm.records.strict import MOST_BYTES
from tests.helpers.configs import load
from tests.helpers.origins import make_origin, write_json

pytestmark = pytest.mark.slow

WHOLE = asdict(make_origin())


class Payload:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def changed(place: str, value: Any) -> dict[str, Any]:
    """A valid content with one value replaced; the last key of the place may be new."""
    content: dict[str, Any] = copy.deepcopy(WHOLE)
    inner = content
    *path, last = place.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    return content


def without(place: str) -> dict[str, Any]:
    content = changed(place, None)
    inner: Any = content
    *path, last = place.split(".")
    for key in path:
        inner = inner[key]
    del inner[last]
    return content


def refusal(folder: Path) -> str:
    """The sentence that every door to the folder gives."""
    sentences = set()
    config = load(f"model.packed={folder}", f"results_dir={folder}/results")
    for door in (resolve, Cell.of, lambda config: require_agreement(config, ["method=awq"])):
        with pytest.raises(UserError) as refused:
            door(config)
        sentences.add(str(refused.value))
    (sentence,) = sentences
    assert "\n" not in sentence
    assert sentence.endswith("Give a folder that python run.py save_packed=FOLDER wrote.")
    return sentence


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    write_json(tmp_path, WHOLE)
    assert asdict(read_origin(tmp_path)) == WHOLE
    config = resolve(load(f"model.packed={tmp_path}", "method=awq", "seed=3", "bits=w8a8"))
    assert (config.method_name, config.bits.label, config.seed) == ("rtn", "W4A4", 3)
    assert config.model.packed == str(tmp_path)
    check_options(config)


@pytest.mark.parametrize("loader", ["pandas.read_pickle", "torch.load", "joblib.load"])
@pytest.mark.parametrize("nested", [False, True])
def test_no_class_of_the_file_is_built(loader: str, nested: bool, tmp_path: Path) -> None:
    marker, pickled = tmp_path / "executed", tmp_path / "payload.pkl"
    pickled.write_bytes(pickle.dumps(Payload(marker)))
    argument = {"pandas.read_pickle": "filepath_or_buffer", "torch.load": "f"}
    node = {"_target_": loader, argument.get(loader, "filename"): str(pickled)}
    if loader == "torch.load":
        node["weights_only"] = False  # type: ignore[assignment]
    if nested:
        node = {"_target_": "qvlm.methods.rtn.RTN", "other": [{"deep": node}]}  # type: ignore[dict-item]
    write_json(tmp_path, changed("options.method", node))
    config = load(f"model.packed={tmp_path}", f"results_dir={tmp_path}/results")
    if nested:
        assert "options.method.other[0].deep._target_" in refusal(tmp_path)
    else:  # it is a name to record, which nothing imports
        settled = resolve(config)
        check_options(settled)
        assert isinstance(method_of(settled), Applied)
        assert method_of(settled).name == "RTN"
        assert code_version(settled) == code_version(settled)
    assert not marker.exists()
    pickle.loads(pickled.read_bytes())
    assert marker.exists()  # the payload is one


def test_no_module_of_the_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_json(tmp_path, changed("options.method", {"_target_": "evil.Evil"}))
    settled = resolve(load(f"model.packed={tmp_path}"))
    check_options(settled)
    code_version(settled)
    assert not marker.exists()


@pytest.mark.parametrize(
    "place",
    ["options.model.path", "options.model.name", "hash", "method", "options.method.x", "report.a"],
)
@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "a ${seed}", "${oc.env:SECRET,b}"])
def test_nothing_is_interpolated(
    place: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "the secret")
    write_json(tmp_path, changed(place, text))
    assert "is an interpolation" in refusal(tmp_path)
    write_json(tmp_path, changed("report", {text: 1}))
    assert "the secret" not in refusal(tmp_path)


@pytest.mark.parametrize("place", ["model.name", "method_name", "model.stands_for"])
@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", ".hidden", "", "a b", "x" * 65, "a\n"])
def test_names_are_names(place: str, name: str, tmp_path: Path) -> None:
    write_json(tmp_path, changed(f"options.{place}", name))
    assert f"options.{place}" in refusal(tmp_path)


def leaves(value: Any, place: str = "") -> list[str]:
    """The places of all values that a schema declares."""
    if not isinstance(value, dict) or place in ("options.method", "report"):
        return [place]
    inner = [leaves(item, f"{place}.{key}" if place else key) for key, item in value.items()]
    return [place] * bool(place) + [leaf for found in inner for leaf in found]


@pytest.mark.parametrize("place", leaves(WHOLE))
def test_every_part_is_there_and_of_its_type(place: str, tmp_path: Path) -> None:
    write_json(tmp_path, without(place))
    refusal(tmp_path)
    for value in ([{}], {"a": 1}, 10**400, 1.5, "\0", True, "a"):
        write_json(tmp_path, changed(place, value))
        with suppress(UserError):  # any other exception is a failure
            read_settled(tmp_path)
            own: Any = WHOLE
            for key in place.split("."):
                own = own[key]
            accepted = {type(None): (str, int), float: (float, int)}.get(type(own), (type(own),))
            assert type(value) in accepted, value


CONTENTS: dict[str, Callable[[], str | bytes]] = {
    "list": lambda: "[]",
    "number": lambda: "5",
    "null": lambda: "null",
    "text": lambda: '"a"',
    "empty": lambda: "",
    "object": lambda: "{}",
    "half": lambda: json.dumps(WHOLE)[:-9],
    "two": lambda: json.dumps(WHOLE) * 2,
    "bytes": lambda: b"\xff\xfe\x00",
    "surrogate": lambda: json.dumps(changed("method", "\ud800")),
    "deep": lambda: "[" * 100_000,
    "nan": lambda: json.dumps(changed("report", {"a": float("nan")})),
    "infinite": lambda: json.dumps(changed("report", {"a": 1})).replace('"a": 1', '"a": 1e999'),
    "digits": lambda: json.dumps(changed("hash", 7)).replace("7", "7" * 9999),
    "bits of a number": lambda: json.dumps(changed("report", {"a": 2**63})),
    "huge": lambda: json.dumps(changed("hash", "a" * MOST_BYTES)),
    "repeated": lambda: json.dumps(WHOLE)[:-1] + ', "hash": "1"}',
    "repeated inside": lambda: json.dumps(WHOLE).replace('"crop"', '"crop", "image_fit": "pad"'),
    "extra": lambda: json.dumps({**WHOLE, "more": 1}),
    "extra inside": lambda: json.dumps(changed("options.bits.more", 1)),
    "old": lambda: json.dumps(without("version")),
    "new": lambda: json.dumps(changed("version", 99)),
    "full precision": lambda: json.dumps(
        changed("options.bits", {"weights": None, "activations": None})
    ),
    "method of full precision": lambda: json.dumps(
        changed("options.method", {"_target_": "qvlm.methods.full_precision.FullPrecision"})
    ),
    "bits": lambda: json.dumps(changed("options.bits.weights", 99)),
    "no target": lambda: json.dumps(changed("options.method", {})),
    "target": lambda: json.dumps(changed("options.method", {"_target_": "os.system('x')"})),
    "fit": lambda: json.dumps(changed("encoding.image_fit", "stretch")),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_anything_else_gets_one_sentence(content: str, tmp_path: Path) -> None:
    made = CONTENTS[content]()
    (tmp_path / "qvlm.json").write_bytes(made if isinstance(made, bytes) else made.encode())
    assert "qvlm.json" in refusal(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["qvlm.json"]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "dangling"])
def test_what_is_not_a_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "qvlm.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "dangling":
        file.symlink_to("nowhere")
    assert "has no readable qvlm.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method=awq", "has method_name=rtn"),
        ("bits=w8a8", "has bits=w4a4"),
        ("bits.weights=8", "has bits.weights=4"),
        ("bits=fp", "has bits=w4a4"),
        ("model=mini_moe_llava", "has model.name=mini_llava"),
        ("model.dtype=bfloat16", "has model.dtype=float64"),
        ("quantizer.p=3", "has quantizer.p=2.0"),
        ("calibration.samples=3", "has calibration.samples=64"),
        ("method_name=mine", "has method_name=rtn"),
        ("+method.extra=3", "has method.extra=null"),
    ],
)
def test_options_that_contradict_it_are_refused(
    override: str, sentence: str, tmp_path: Path
) -> None:
    write_json(tmp_path, WHOLE)
    words = [f"model.packed={tmp_path}", override]
    with pytest.raises(UserError) as refused:
        require_agreement(load(*words), words)
    assert str(refused.value).startswith(f"{override} is not how {tmp_path} was made, which")
    assert sentence in str(refused.value)


def test_options_that_agree_with_it_or_are_defaults_are_accepted(tmp_path: Path) -> None:
    write_json(tmp_path, WHOLE)
    words = [f"model.packed={tmp_path}", "method=rtn", "bits=w4a4", "model=mini_llava", "seed=5"]
    words += ["evaluation.limit=3", "model.path=mini_llava", "calibration.samples=64"]
    require_agreement(load(*words), words)  # raises nothing
    require_agreement(load(words[0], "bits=w8a8"), words[:1])  # as a default would be
    with pytest.raises(UserError):  # and where it was asked for
        require_agreement(load(words[0], "bits=w8a8"), [words[0], "bits=w8a8"])
