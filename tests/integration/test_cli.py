"""What people type, and what they are told when it is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qvlm import __version__
from qvlm.cell import checks, inputs, method, pipeline
from qvlm.cell.identity import Cell, resolve
from qvlm.cli import main
from qvlm.config.schema import RunConfig
from qvlm.errors import RunError, UserError
from qvlm.sweep import local
from tests.helpers.configs import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder, where everything that is written would show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


class Runs:
    """Stands in for the pipeline and remembers the cells that reach it."""

    def __init__(self) -> None:
        self.cells: list[RunConfig] = []
        self.fails: Callable[[RunConfig], BaseException | None] = lambda config: None

    def __call__(self, cell: Cell) -> Path:
        config = cell.config
        self.cells.append(config)
        if error := self.fails(config):
            raise error
        return Path(self.names[-1])

    @property
    def names(self) -> list[str]:
        return [f"{c.model.name}-{c.method_name}-{c.bits.label}" for c in self.cells]


def unidentified(config: RunConfig) -> Cell:
    """A cell that is never recorded."""
    return Cell(resolve(config), "0" * 64, {}, "", {})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr(pipeline, "run_cell", fake)
    monkeypatch.setattr(local, "cores", lambda: 1)  # so that sweeps run in this process
    monkeypatch.setattr(Cell, "of", unidentified)
    return fake


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model=foo", ["model=foo", "mini_llava", "mini_moe_llava"]),
        ("method=foo", ["method=foo", "fp", "rtn"]),
        ("bits=w5a5", ["bits=w5a5", "w4a4", "w2a4"]),
        ("experiment=foo", ["experiment=foo", "table2"]),
        ("tracking=loud", ["tracking=loud", "offline", "online", "off"]),
        ("hydra/launcher=foo", ["hydra/launcher=foo", "basic"]),
        ("sed=1", ["sed", "seed", "results_dir"]),
        ("+foo=1", ["foo", "seed"]),
        ("++foo=1", ["foo", "seed"]),
        ("quantizer.foo=1", ["quantizer.foo", "vision_tower"]),
        ("+quantizer.weight.foo=1", ["quantizer.weight.foo", "group_size"]),
        ("method.foo=1", ["method.foo", "RTN"]),
        ("+method.foo=1", ["method.foo", "RTN"]),
        ("method._target_=no.such.Method", ["method._target_", "no.such.Method"]),
        ("method._target_=pathlib.Path", ["method._target_", "quantize"]),
        ("calibration.samples=many", ["calibration.samples", "many", "Integer"]),
        ("calibration.samples=-1", ["calibration.samples", "-1"]),
        ("quantizer.vision_tower=maybe", ["quantizer.vision_tower", "maybe", "bool"]),
        ("quantizer.weight=5", ["quantizer.weight", "5"]),
        ("quantizer.weight.granularity=per_row", ["weight", "per_row", "per_group"]),
        ("quantizer.language.granularity=per_group", ["language", "per_channel_group"]),
        ("quantizer.vision.group_size=0", ["vision", "group_size"]),
        ("quantizer.p=-1", ["p=-1"]),
        ("model.prompt_format=none", ["model", "QCM-LEA"]),
        ("model.conversation=none", ["model", "vicuna_v1"]),
        ("model.path=nowhere", ["model.path", "nowhere"]),
        ("device=tpu", ["device", "tpu", "cpu"]),
        ("results_dir=/proc/nowhere", ["results_dir", "/proc/nowhere"]),
        ("seed=${nothing}", ["nothing"]),
        ("data=folder", ["data.source"]),
        ("model", ["model", "key=value"]),
        ("bits=w4a4 stray", ["stray", "key=value"]),
        ("tabel2", ["tabel2", "neither a command nor an override", "--help"]),
        ("bits=[", ["bits=["]),
        ("method=null", ["method=null"]),
        ("~calibration.samples", ["calibration.samples"]),
        ("method=rtn,fp", ["method=rtn,fp", "-m"]),
        ("--foo", ["--foo", "--help"]),
        ("--cfg nothing", ["--cfg", "job"]),
        ("--resolve", ["--resolve"]),
        ("-m --cfg job", ["--cfg", "--multirun"]),
        ("--config-dir nowhere", ["nowhere"]),
        ("-m method=rtn,foo", ["method=foo", "rtn"]),
        ("-m +foo=1,2", ["foo", "seed"]),
        ("-m calibration.samples=8,-1", ["calibration.samples", "-1"]),
        ("-m method=awq,rtn save_packed=one", ["save_packed", "a folder of its own"]),
        (f"-m model.path={ROOT}/conf method=rtn,fp device=cpu,tpu", ["device", "tpu"]),
        ("-m experiment=table2 bits=w4a4,w9a9", ["bits=w9a9", "w4a4"]),
        ("-m hydra.sweeper.params={modell:a}", ["modell", "model"]),
    ],
)
def test_bad_input_is_one_sentence(
    line: str,
    words: list[str],
    elsewhere: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "compute", None)  # nothing gets as far as that
    assert main(line.split(" ")) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert os.listdir(elsewhere) == []


def test_the_traceback_is_there_on_demand(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(["model=foo"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "MissingConfigException" in err
    assert err.splitlines()[-1].startswith("error: model=foo is not a known option.")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    assert main(["model=foo"]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_the_version_is_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qvlm {__version__}\n"


def test_help_and_configuration_are_shown(
    elsewhere: Path, capfd: pytest.CaptureFixture[str], runs: Runs
) -> None:
    assert main(["--help"]) == 0
    shown = capfd.readouterr().out
    (methods,) = (line for line in shown.splitlines() if line.startswith("method: "))
    assert {"fp", "rtn"} <= set(methods.removeprefix("method: ").split(", "))
    assert " -m experiment=table2" in shown
    assert main(["--cfg", "job", "bits=w6a6"]) == 0
    assert "weights: 6" in capfd.readouterr().out
    assert runs.cells == []
    assert os.listdir(elsewhere) == []


def test_the_plain_command_runs_the_default_cell(elsewhere: Path, runs: Runs) -> None:
    assert main([]) == 0
    assert runs.names == ["mini_llava-rtn-W4A4"]
    assert main(["model=mini_moe_llava", "method=rtn", "bits=w6a6"]) == 0
    assert runs.names[1:] == ["mini_moe_llava-rtn-W6A6"]
    assert os.listdir(elsewhere) == []


def test_a_sweep_runs_full_precision_first(elsewhere: Path, runs: Runs) -> None:
    assert main(["-m", "method=rtn,fp", "bits=w4a4"]) == 0
    assert [(c.method_name, c.full_precision) for c in runs.cells] == [("fp", True), ("rtn", False)]
    assert os.listdir(elsewhere) == []


def test_a_sweep_has_a_name(runs: Runs) -> None:
    assert main(["-m", "method=rtn,awq", "bits=w4a4"]) == 0
    assert {cell.group for cell in runs.cells} == {"method-rtn-awq_bits-w4a4"}
    runs.cells.clear()
    assert main(["-m", "method=rtn,awq", "group=mine"]) == 0
    assert {cell.group for cell in runs.cells} == {"mine"}


def test_a_sweep_runs_each_cell_once(runs: Runs) -> None:
    assert main(["-m", "method=rtn,fp", "bits=w6a6,fp,w4a4", "seed=0,1"]) == 0
    assert [cell.full_precision for cell in runs.cells] == [True] * 2 + [False] * 4
    assert {cell.seed for cell in runs.cells[:2]} == {0, 1}


def test_overrides_stand_on_both_sides_of_an_option(runs: Runs) -> None:
    assert main(["method=rtn,fp", "-m", "bits=w4a4"]) == 0
    assert runs.names == ["mini_llava-fp-FP", "mini_llava-rtn-W4A4"]


def test_a_reader_that_leaves_ends_a_run_in_one_sentence(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda config: BrokenPipeError(32, "Broken pipe")
    before = os.dup(1)
    try:
        assert main([]) == 1
    finally:
        os.dup2(before, 1)
        os.close(before)
    err = capfd.readouterr().err
    assert err.startswith("error: the reader of the output has gone")
    assert err.count("\n") == 1


def test_what_the_system_refuses_is_one_sentence(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda config: OSError(28, "No space left on device", "file")
    assert main([]) == 1
    assert capfd.readouterr().err == "error: file cannot be used (No space left on device)\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("a lot"),
        RuntimeError("x: can't allocate memory: y"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_full_memory_is_one_sentence(
    error: Exception, runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda config: error
    assert main(["-m", "bits=w4a4"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: memory ran out (")
    assert err.count("\n") == 1


def test_a_home_folder_is_expanded_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    options = ["model.path", "model.vision_tower", "data.source", "results_dir", "save_packed"]
    assert main([*(f"{option}=~/x" for option in options)]) == 0
    (config,) = runs.cells
    assert {config.model.path, config.model.vision_tower, config.data.source} == {"/home/ada/x"}
    assert {config.results_dir, config.save_packed} == {"/home/ada/x"}
    assert config.tracking.dir == "/home/ada/x/wandb"


def test_the_experiment_is_the_table(runs: Runs) -> None:
    assert main(["-m", "experiment=table2"]) == 0
    first, rest = runs.cells[:2], runs.cells[2:]
    models = {"mini_llava", "mini_moe_llava"}
    assert {cell.model.name for cell in first} == models
    assert all(cell.full_precision for cell in first)
    wanted = {(model, "rtn", bits) for model in models for bits in ("W6A6", "W4A4")}
    assert {(c.model.name, c.method_name, c.bits.label) for c in rest} >= wanted
    assert len(rest) == len({(c.model.name, c.method_name, c.bits.label) for c in rest})
    assert all(cell.group == "table2" for cell in runs.cells)
    runs.cells.clear()
    assert main(["experiment=table2", "model=mini_llava", "bits=w4a4"]) == 0  # -m is implied
    assert {cell.model.name for cell in runs.cells} == {"mini_llava"}
    assert {cell.bits.label for cell in runs.cells if not cell.full_precision} == {"W4A4"}


def test_a_sweep_checks_all_cells_before_the_first(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check(config: RunConfig) -> Cell:
        if config.bits.label == "W4A4":
            raise UserError("not this one")
        return unidentified(config)

    monkeypatch.setattr(Cell, "of", check)
    assert main(["-m", "method=fp,rtn", "bits=w6a6,w4a4"]) == 2
    assert runs.cells == []
    assert capfd.readouterr().err == "error: not this one\n"


def test_quantized_cells_wait_for_full_precision(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda c: UserError("weights are truncated") if c.full_precision else None
    assert main(["-m", "method=rtn,fp", "model=mini_llava,mini_moe_llava"]) == 2
    assert all(cell.full_precision for cell in runs.cells)
    assert capfd.readouterr().err == "error: weights are truncated\n"


def test_a_failed_cell_does_not_stop_the_others(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(config: RunConfig) -> Exception | None:
        return (
            RunError(f"layer of {config.bits.label} is NaN") if config.bits.weights != 8 else None
        )

    runs.fails = fails
    assert main(["-m", "method=rtn", "bits=w6a6,w8a8,w4a4"]) == 1
    assert len(runs.cells) == 3
    err = capfd.readouterr().err
    assert err.splitlines() == ["error: layer of W6A6 is NaN", "error: layer of W4A4 is NaN"]


def test_what_breaks_on_the_way_is_one_sentence(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda config: RunError("the input of layer x is not finite")
    assert main([]) == 1
    assert capfd.readouterr().err == "error: the input of layer x is not finite\n"


def test_a_defect_keeps_its_traceback(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.fails = lambda config: ZeroDivisionError("a bug")
    for arguments in ([], ["-m", "bits=w4a4,w6a6"]):
        assert main(arguments) == 1
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert "ZeroDivisionError: a bug" in err
        assert "error: " not in err


@pytest.mark.parametrize("arguments", [[], ["-m", "bits=w4a4,w6a6"]])
def test_an_interrupt_is_one_sentence(
    arguments: list[str], runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.fails = lambda config: KeyboardInterrupt()
    assert main(arguments) == 130
    err = capfd.readouterr().err
    assert err.startswith("interrupted")
    assert err.count("\n") == 1
    assert len(runs.cells) == 1


def test_a_method_from_another_folder_is_found(elsewhere: Path, runs: Runs) -> None:
    (elsewhere / "mine" / "method").mkdir(parents=True)
    (elsewhere / "mine" / "method" / "coarse.yaml").write_text(
        "_target_: coarse_method.Coarse\nstep: 2\n"
    )
    (elsewhere / "mine" / "coarse_method.py").write_text(
        "class Coarse:\n"
        "    name = 'Coarse'\n"
        "    def __init__(self, step, extra=0):\n"
        "        self.step = step + extra\n"
        "    def quantize(self, walk):\n"
        "        raise NotImplementedError\n"
    )
    assert main(["--config-dir", "mine", "method=coarse", "method.extra=3"]) == 0
    (cell,) = runs.cells
    assert cell.method_name == "coarse"
    assert method.build_method(cell.method).step == 5  # type: ignore[attr-defined]
    assert method.method_file(cell.method) == elsewhere / "mine" / "coarse_method.py"
    with pytest.raises(UserError, match="Coarse. Choose one of: step, extra"):
        method.build_method({**cell.method, "other": 1})
    with pytest.raises(UserError, match="step"):
        method.build_method({"_target_": "coarse_method.Coarse"})


def test_devices_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert inputs.find_device("auto") == inputs.find_device("cpu") == "cpu"
    with pytest.raises(UserError, match="Choose one of: auto, cpu"):
        inputs.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert inputs.find_device("auto") == inputs.find_device("cuda") == "cuda:0"
    assert inputs.find_device("cuda:1") == "cuda:1"


def test_the_gpu_of_a_mac_is_for_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert inputs.find_device("mps") == "mps"
    checks.check_options(load("device=mps", "method=fp"))
    with pytest.raises(UserError, match="device=mps is not possible for a quantized model"):
        checks.check_options(load("device=mps"))


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ([], 64),  # as their published numbers were made
        (["model=llava_13b"], 1024),
        (["model=moe_llava"], 64),
        (["model=moe_llava", "model.prompt_format=QCM-LEPA"], 1024),
        (["model=llava_13b", "evaluation.max_new_tokens=7"], 7),
        (["evaluation.max_new_tokens=7"], 7),
    ],
)
def test_answers_are_as_long_as_their_format_needs(overrides: list[str], tokens: int) -> None:
    config = inputs.settle_evaluation(load(*overrides))
    assert config.evaluation.max_new_tokens == tokens


def test_a_mistake_is_answered_without_the_heavy_imports(elsewhere: Path) -> None:
    """The real script, from another folder: a mistyped option must not wait for PyTorch."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['run.py', 'model=foo']; sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'pandas', 'wandb'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr.startswith(
        "error: model=foo is not a known option. Choose one of: hf, llava_13b"
    )
    assert os.listdir(elsewhere) == []
