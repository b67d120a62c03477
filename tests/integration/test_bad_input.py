"""Whatever is wrong in what a person brings, they get one sentence and lose nothing.

The cases are generated: every option of the schema with the values that its kind refuses, paths,
words of the command line, and the files that a cell and a table read, each damaged in every way
that is listed. All of them run in this process, so that hundreds take seconds each hundred.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from qvlm.cell import pipeline
from qvlm.cli import main
from qvlm.config.schema import RunConfig
from qvlm.data.validation import COLUMNS, OPTIONAL_TEXTS
from qvlm.models.load import MINIATURES
from qvlm.tables import claims, table1, table2, table5
from tests.helpers.records import make_record

HUGE = 10**30
LONG = "x" * 300


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case runs in a folder of its own, offline, and gets no further than it is meant to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything in a folder, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        held = b""
        if path.is_symlink():
            held = os.readlink(path).encode()
        elif path.is_file():
            held = path.read_bytes()
        found[str(path.relative_to(folder))] = path.lstat().st_mode, held
    return found


def refused(
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    command: Callable[[list[str]], int] = main,
    codes: tuple[int, ...] = (2,),
) -> str:
    """Runs a command that has to be refused, and returns what it says.

    The files that were there are as they were, and there is no new one.
    """
    folder = Path.cwd()
    before = content(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = command(arguments)
        except SystemExit as ended:
            code = int(str(ended.code))
    said = capfd.readouterr().err
    assert "Traceback" not in said, said
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert len(said) < 1000, said
    assert code in codes, said
    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    assert set(after) == set(before)
    return said


# Options of the configuration ---------------------------------------------------------------------

WHOLE = ("-1", "1.5", "many", "{a:1}", str(HUGE))
FLOATS = ("-1", "inf", "nan", "many", "[1]")
SWITCHES = ("maybe", "2.5", "[true]")
NAMES = ("a/b", ".x", "..", "../up", '""', '"a b"', "a:b", '"a\\\\b"', '"é"', "x" * 65, "[a]")
# What no check of the configuration can know: names of other people's machines and accounts.
FREE = ("model.made_by", "tracking.project", "tracking.entity", "tracking.dir", "model.stands_for")
PATH_OPTIONS = ("model.path", "model.packed", "model.vision_tower", "data.source")
NAME_OPTIONS = ("model.name", "data.name", "method_name", "group")
# Names of a few choices, each with others that it refuses.
CHOICES = ("nope", "[rtn]")


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every option of the schema and its type."""
    types = get_type_hints(kind)
    for field in fields(kind):
        name, given = prefix + field.name, types[field.name]
        inner = next((one for one in get_args(given) if one is not type(None)), given)
        if is_dataclass(given):
            assert isinstance(given, type)
            yield from options(given, f"{name}.")
        elif name not in ("method", "launcher", "max_memory") and not name.startswith("scale."):
            yield name, inner


def bad_values() -> Iterator[str]:
    for name, kind in options(RunConfig):
        if name in NAME_OPTIONS:
            values: tuple[str, ...] = NAMES
        elif name in FREE or name in (*PATH_OPTIONS, "results_dir", "save_packed"):
            values = ("[1]",)
        elif kind is str:
            values = CHOICES
        else:
            values = {int: WHOLE, float: FLOATS, bool: SWITCHES}[kind]
        yield from (f"{name}={value}" for value in values)


def test_the_family_covers_the_schema() -> None:
    kinds = dict(options(RunConfig))
    assert set(kinds.values()) == {int, float, bool, str}
    assert {*FREE, *PATH_OPTIONS, *NAME_OPTIONS} <= set(kinds)


@pytest.mark.parametrize("override", [*bad_values()])
def test_a_bad_value_is_refused(override: str, capfd: pytest.CaptureFixture[str]) -> None:
    option = override.partition("=")[0]
    said = refused(capfd, ["execution=packed", override])  # without it no kernel is accepted
    assert option.rpartition(".")[2] in said


@pytest.mark.parametrize(
    "override",
    [
        *("threads=100000", "threads=1025", "evaluation.temperature=1e-300"),
        *("evaluation.temperature=1e9", f"seed={2**64}", f"data.seed={2**63}"),
        *(f"calibration.seed={2**70}", f"evaluation.limit={2**31}", "evaluation.limit=4001"),
        *("calibration.samples=8001", "evaluation.max_new_tokens=65537", "bits.weights=9"),
        *("bits.weights=1", "bits.activations=null", "bits.weights=null", "max_memory=[1GiB]"),
        *("device=mps:7", "device=cuda:99", "device=map:1", "kernel=triton", "method.foo=1"),
        *("method._target_=nope", "method={a:1}"),
        *("method=[1]", "bits=[1]", "quantizer=null", "evaluation=5", "~seed", "~model", "+foo=1"),
        *("seed=${oc.env:QVLM_NOPE}", "seed=${nope}", "seed=${seed}", "seed=${model}"),
        *("results_dir=${results_dir}", "seed=${nope:1}", "evaluate=false", "stream=true"),
        *("launcher=joblib", "launcher._target_=os.system", "launcher.jobs=2"),
        *("model.image_size=49", "model.conversation=phi", "data.published=true"),
        *("quantizer.weight.group_size=7", "quantizer.language.granularity=per_group"),
        *("scale=nope", "experiment=nope", "model=nope", "hydra/launcher=nope"),
    ],
)
def test_a_value_out_of_its_place_is_refused(
    override: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(capfd, ["tracking=off", override])


# Words of the command line ------------------------------------------------------------------------

WORDS = [
    *("stray", "=", "=1", "seed", "seed==1", "--nope", "-x", "--cfg", "--cfg nope", "--resolve"),
    *("--cfg job --package nope", "--cfg all --package nope", "--info nope", "-m --cfg job"),
    *("--config-dir nope", "--config-dir nope\0", "--config-name nope", "--config-path /nope"),
    *("-m seed=", "-m seed=1,x", "-m method=rtn,nope", "-m launcher=joblib launcher.jobs=0"),
    *("-m launcher=joblib launcher.jobs=x", "-m launcher=slurm launcher.hours=nan"),
    *("-m launcher=slurm launcher.gpus=-1", "-m launcher=nope", "-m save_packed=a method=rtn,awq"),
    *("hydra.mode=NOPE", "hydra.nope=1", "model@nope=mini_llava", "method=rtn,fp", "bits=["),
    *("seed=1 -m method=rtn stray", "method=nope -m bits=w4a4", "-m hydra.sweeper.params={a:1}"),
]


@pytest.mark.parametrize("line", WORDS)
def test_bad_words_are_refused(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, line.split(" "))


@pytest.mark.parametrize(
    "value", ["/tmp/a=b", "/tmp/a (1)", "/tmp/a#b", "/tmp/größe", "/tmp/a[b]", "/tmp/{a", "/t/'a"]
)
@pytest.mark.parametrize("option", ["data.source", "model.path"])
def test_a_value_that_needs_quotes_is_shown_with_them(
    option: str, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import shlex

    said = refused(capfd, [f"{option}={value}"])
    assert "Quote its value: " in said
    (quoted,) = shlex.split(said.partition("Quote its value: ")[2].strip().removesuffix("."))
    assert f"{value} is not a folder" in refused(capfd, [quoted])


# Paths --------------------------------------------------------------------------------------------

PLACES = ["", "missing", "./missing", "../missing", "/proc/nowhere/x", "file/x", "dangling", "loop"]
PLACES += ["loop/x", LONG, f"{LONG}/x", "a/" * 2100, "~nobody-here/x", "~/missing", "file"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
@pytest.mark.parametrize("option", PATH_OPTIONS)
def test_a_path_to_nothing_is_refused(
    option: str, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_places(tmp_path)
    values = {"data.source": ["method=fp"], "model.vision_tower": ["model=llava_13b"]}
    extra = values.get(option, [])
    if option == "model.vision_tower":
        extra = [*extra, "model.path=checkpoint"]
        shutil.copytree(MINIATURES / "mini_llava", tmp_path / "checkpoint")
    said = refused(capfd, [*extra, "tracking=off", f'{option}="{place}"'])
    assert option in said or "vision tower" in said


@pytest.mark.parametrize(
    "place", [place for place in PLACES if "missing" not in place], ids=lambda place: place[:20]
)
@pytest.mark.parametrize("option", ["results_dir", "save_packed"])
def test_a_folder_that_cannot_be_written_is_refused(
    option: str, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_places(tmp_path)
    said = refused(capfd, ["tracking=off", "evaluation.limit=2", f'{option}="{place}"'])
    assert option in said


def make_places(folder: Path) -> None:
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")


# Data ---------------------------------------------------------------------------------------------

TEXTS: tuple[Any, ...] = (5, 1.5, True, ["a"], {"a": "b"})
FAULTS: list[tuple[str, Any]] = [
    *(("question", value) for value in (None, *TEXTS)),
    *(
        ("choices", value)
        for value in (None, "yes", [], list("abcdefghijk"), ["a", None], ["a", 7])
    ),
    *(("choices", value) for value in ({"a": "b"}, 5, [["a"], ["b"]])),
    *(("answer", value) for value in (None, 2, -1, "A", True, 0.5, [0], HUGE, {})),
    *(("image", value) for value in (5, ["a"], "../../x.png", "/etc/passwd", "nope.png", {"a": 1})),
    *((column, value) for column in OPTIONAL_TEXTS for value in TEXTS[:1] + TEXTS[3:]),
]


def official(folder: Path, **changes: Any) -> Path:
    """A data set in its authors' layout, in whose second problem something is changed."""
    problem = {**dict.fromkeys(COLUMNS, ""), "question": "Which?", "choices": ["a", "b"]}
    problem |= {"answer": 0, "image": None, "grade": "grade2", "subject": "natural science"}
    problems = {"7": problem, "9": {**problem, **changes}}
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"train": ["7", "9"], "val": [], "test": ["7", "9"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


DATA = ["method=fp", "tracking=off", "data=official", "data.published=false", "data.source=data"]


@pytest.mark.parametrize(("column", "value"), FAULTS)
def test_a_bad_row_is_refused(
    column: str, value: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    official(tmp_path / "data", **{column: value})
    said = refused(capfd, DATA)
    assert f"problem 9, column '{column}'" in said


DAMAGE = ("", "{", "[]", "5", "null", '"x"', "{}", "\x00\x01", "[" * 100_000)


@pytest.mark.parametrize("text", DAMAGE, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json"])
def test_a_damaged_file_of_data_is_refused(
    name: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (official(tmp_path / "data") / name).write_text(text)
    refused(capfd, DATA)


@pytest.mark.parametrize("held", [b"", b"PAR1", b"no parquet at all", b"PAR1" * 100])
def test_a_damaged_parquet_file_is_refused(
    held: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.parquet").write_bytes(held)
    refused(capfd, ["method=fp", "tracking=off", "data=folder", "data.source=data"])


# Checkpoints --------------------------------------------------------------------------------------

NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
CHECKPOINT = ["method=fp", "tracking=off", "evaluation.limit=2", "model.path=checkpoint"]


@pytest.mark.parametrize("text", [None, *DAMAGE], ids=lambda text: repr(text and text[:8]))
@pytest.mark.parametrize("name", NEEDED_FILES)
def test_a_damaged_checkpoint_is_refused(
    name: str, text: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MINIATURES / "mini_llava", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / name
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    refused(capfd, CHECKPOINT)


VALUES: tuple[Any, ...] = (None, -1, 10**6, "many", [], {})
ENTRIES = ("model_type", "text_config", "vision_config")
ENTRIES += ("text_config.hidden_size", "text_config.num_hidden_layers", "text_config.vocab_size")
ENTRIES += ("vision_config.image_size", "vision_config.hidden_size")


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_config_of_another_model_is_refused(
    entry: str, value: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MINIATURES / "mini_llava", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    *parents, key = entry.split(".")
    inner = config[parents[0]] if parents else config
    inner[key] = value
    file.write_text(json.dumps(config))
    refused(capfd, CHECKPOINT)


@pytest.mark.parametrize("layer", [None, -6, 5, 10**6, "many", [], {}, [-2, 0]], ids=repr)
def test_a_layer_that_the_tower_does_not_have_is_refused(
    layer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MINIATURES / "mini_llava", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vision_feature_layer": layer}))
    refused(capfd, CHECKPOINT)


@pytest.mark.parametrize("size", [0, 7, 100, 5000, 1_000_000])
def test_truncated_weights_are_refused(
    size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MINIATURES / "mini_llava", tmp_path / "checkpoint")
    os.truncate(tmp_path / "checkpoint" / "model.safetensors", size)
    refused(capfd, CHECKPOINT)


# Records and locks --------------------------------------------------------------------------------

RECORD_FILES = ("run.json", "config.yaml", "metrics.json", "bits.json", "predictions.parquet")


@pytest.mark.parametrize("text", [None, *DAMAGE], ids=lambda text: repr(text and text[:8]))
@pytest.mark.parametrize("name", RECORD_FILES)
def test_a_damaged_record_stops_a_table(
    name: str, text: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path / "runs")
    file = record.path / name
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    said = refused(capfd, ["--runs", "runs", "--out", "out"], table2.main, (1,))
    assert str(record.path.name) in said


@pytest.mark.parametrize("command", [table1.main, table2.main, table5.main, claims.main])
@pytest.mark.parametrize(
    "arguments", [["--runs", "nope"], ["--runs", "file"], ["--runs", ""], ["--nope"], ["stray"]]
)
def test_a_table_of_nothing_is_refused(
    command: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(capfd, arguments, command)


@pytest.mark.parametrize("kind", ["folder", "full folder", "loop", "pipe"])
@pytest.mark.parametrize("sweep", [False, True])
def test_something_else_in_the_place_of_a_lock_is_one_sentence(
    kind: str,
    sweep: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from qvlm.cell.identity import Cell
    from qvlm.records.locks import lock_file
    from tests.helpers.configs import load

    monkeypatch.setattr(pipeline, "compute", None)  # nothing gets as far as that
    arguments = ["method=fp", "tracking=off"]
    lock = tmp_path / lock_file(Cell.of(load(*arguments)).path)
    lock.parent.mkdir(parents=True)
    if kind == "loop":
        lock.symlink_to(lock.name)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
        if kind == "full folder":
            (lock / "mine").write_text("mine")
    said = refused(capfd, ["-m", *arguments] if sweep else arguments, codes=(1,))
    assert "lock" in said
