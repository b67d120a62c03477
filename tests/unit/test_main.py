"""`python -m qvlm` is the command line, and makes each page without `make`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qvlm import __main__ as routes
from qvlm import cli
from qvlm.command import program
from qvlm.routes import ROUTES
from qvlm.tables.claims.plan import plan

ROOT = Path(__file__).resolve().parents[2]
# Commands without a target in the Makefile, and why.
WITHOUT_TARGET = {
    "eval": "it needs the name of a task",
    "lm-eval": "it needs lm-eval's own words",
    "diff": "it needs two runs",
    "export": "it needs a checkpoint",
    "gate": "it needs a run",
    "prove": "it needs a checkpoint",
    "workspace": "it needs an account and a package of its own",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What the routes call, instead of calling it."""
    made: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(sys, "argv", ["/anywhere/bin/qvlm"])

    def called(name: str, arguments: list[str]) -> int:
        made.append((name, list(arguments)))
        return 3 if "fails" in arguments else 0

    monkeypatch.setattr(cli, "main", lambda arguments: called("run", arguments))
    monkeypatch.setattr(
        routes,
        "import_module",
        lambda name: SimpleNamespace(main=lambda arguments: called(name, arguments), plan=plan),
    )
    return made


def test_a_table_is_swept_and_then_made(calls: list[tuple[str, list[str]]]) -> None:
    assert routes.main(["table2", "scale=paper", "launcher=joblib"]) == 0
    assert calls == [
        ("run", ["-m", "experiment=table2", "scale=paper", "launcher=joblib"]),
        (
            "qvlm.tables.table2",
            [
                "--runs=results/paper/runs",
                "--out=results/paper",
                "--command=qvlm table2 scale=paper launcher=joblib",
            ],
        ),
        (
            "qvlm.report.__main__",
            [
                "--results=results/paper",
                "--command=qvlm table2 scale=paper launcher=joblib",
            ],
        ),
    ]


def test_the_makefile_names_itself(calls: list[tuple[str, list[str]]]) -> None:
    assert routes.main(["table4", "--command=make table4", "results_dir=mine"]) == 0
    assert [arguments[1] for name, arguments in calls if name == "run"] == [
        f"experiment={name}" for name in ("table4", "table4_exact")
    ]
    assert calls[-2][1] == ["--runs=mine/runs", "--out=mine", "--command=make table4"]
    assert calls[-1][1] == ["--results=mine", "--command=make table4"]


def test_the_claims_run_their_design(
    calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["questions=50", "draws=2", f"trainings={tmp_path}", "results_dir=mine"]
    assert routes.main(["claims", *words]) == 0
    assert "50 questions x 2 calibration draws x trainings (1 of" in capfd.readouterr().out
    ran = [arguments for name, arguments in calls if name == "run"]
    assert len(ran) == 2 * (2 * 2 + 1)  # models, draws x bit widths and full precision
    for arguments in ran:
        assert arguments[:2] == ["-m", "experiment=claims"]
        assert {"evaluation.limit=50", "results_dir=mine"} <= {*arguments}
        assert not {*words[:3]} & {*arguments}
    command = f"--command=qvlm claims {' '.join(words)}"
    assert calls[-2][1] == ["--runs=mine/runs", "--out=mine", command]

    calls.clear()
    assert routes.main(["claims", "estimate=true"]) == 0
    assert "hours of one core" in capfd.readouterr().out
    assert routes.main(["claims", "draws=many"]) == 2
    assert capfd.readouterr().err == "error: draws=many is not a whole number.\n"
    assert calls == []


def test_what_is_committed_is_added_to(
    calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["add=true", f"results_dir={tmp_path}"]
    assert routes.main(["table2-real", *words]) == 0
    assert calls[0][1] == ["-m", "experiment=table2_real", words[1]]  # nothing is committed yet
    assert "--add" not in calls[1][1]
    calls.clear()
    committed = tmp_path / "answers" / "table2_real"
    committed.mkdir(parents=True)
    assert routes.main(["table2-real", *words]) == 0
    assert calls[0][1] == ["-m", "experiment=table2_real", words[1], f"committed={committed}"]
    assert "--add" in calls[1][1]
    assert len(calls) == 2  # without records, no report
    (tmp_path / "runs").mkdir()
    assert routes.main(["table2-real", *words]) == 0
    assert calls[-1][0] == "qvlm.report.__main__"
    assert f"--command=qvlm table2-real {' '.join(words)}" in calls[1][1]
    calls.clear()
    assert routes.main(["table4", "add=true"]) == 2
    assert capfd.readouterr().err.startswith("error: add=true is not possible for table4,")
    assert calls == []


@pytest.mark.parametrize("name", ["table2", "claims"])
def test_a_wrong_folder_of_results_is_one_sentence(
    name: str, calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert routes.main([name, "scale=nope"]) == 2
    assert capfd.readouterr().err.startswith("error: scale=nope is not a known option.")
    assert calls == []


def test_a_failed_sweep_makes_no_page(calls: list[tuple[str, list[str]]]) -> None:
    assert routes.main(["table4", "fails"]) == 3
    assert len(calls) == 1


def test_the_other_routes(calls: list[tuple[str, list[str]]]) -> None:
    assert routes.main(["fit", "--budget", "6"]) == 0
    assert routes.main(["table4-scale"]) == 0
    assert routes.main(["preflight", "scale=paper"]) == 0
    assert routes.main(["method=rtn"]) == 0
    assert routes.main([]) == 0
    assert calls == [
        ("qvlm.planning.footprint", ["--budget", "6"]),
        ("qvlm.tables.table4_scale.__main__", []),
        ("run", ["-m", "experiment=table2", "preflight=true", "scale=paper"]),
        ("run", ["method=rtn"]),
        ("run", ["-m", "experiment=demo"]),
        ("qvlm.report.__main__", ["--results=results/demo", "--command=qvlm demo"]),
    ]


def test_tasks_are_a_run_with_short_names(
    calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["include_path=mine", "limit=5", "num_fewshot=2", "chat_template=true", "method=awq"]
    assert routes.main(["eval", "-m", "task=arc_easy,piqa", *words]) == 0
    assert calls == [
        (
            "run",
            [
                *("-m", "tasks.names=[arc_easy,piqa]", "tasks.include_path=mine"),
                *("evaluation.limit=5", "tasks.num_fewshot=2", "tasks.chat_template=true"),
                "method=awq",
            ],
        )
    ]
    for words in (["limit=5"], ["task="], ["task=,"], ["tasks.names=[]"]):
        assert routes.main(["eval", *words]) == 2
        assert capfd.readouterr().err.startswith("error: task is not given. Give task=NAME")
    assert len(calls) == 1
    assert routes.main(["eval", "--help"]) == 0
    assert calls[-1] == ("run", ["--help"])


def test_an_unknown_option_is_refused_before_the_sweep(
    calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert routes.main(["table1", "--nope"]) == 2
    assert capfd.readouterr().err.startswith("error: --nope is not an option of table1.")
    assert routes.main(["table1", "--help"]) == 0
    assert "usage: qvlm table1 [OVERRIDE ...]" in capfd.readouterr().out
    assert calls == []


@pytest.mark.parametrize("name", ROUTES)
def test_the_makefile_calls_every_route(name: str) -> None:
    targets = (ROOT / "Makefile").read_text().split("\n\n")
    found = [target for target in targets if re.match(rf"{name}: (install|real)\b", target)]
    assert bool(found) is (name not in WITHOUT_TARGET)
    recipe = "".join(found)
    assert not found or "$(call route,$@" in recipe or "python -m qvlm $@" in recipe


@pytest.mark.parametrize("name", ROUTES)
def test_every_route_is_a_command(name: str) -> None:
    route = ROUTES[name]
    assert [bool(route.module), bool(route.overrides), bool(route.keys)].count(True) == 1
    if route.module:
        assert callable(routes.import_module(route.module).main)
    for experiment in route.experiments:
        assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").is_file()


def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/anywhere/bin/qvlm"])
    assert routes.main(["--help"]) == 0
    shown = capfd.readouterr().out
    assert "qvlm -m experiment=table2 " in shown
    for name, route in ROUTES.items():
        assert f"  qvlm {name:<15} {route.does}\n" in shown


def test_a_demo_says_that_it_is_one(
    calls: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert routes.main([]) == 0
    assert "This was a demonstration" in capfd.readouterr().out
    assert routes.main(["demo", "fails"]) == 3
    assert routes.main(["method=rtn"]) == 0
    assert capfd.readouterr().out == ""
    assert calls[0] == ("run", ["-m", "experiment=demo"])


COMPLETE = """
eval "$(qvlm -sc install=bash)"
export COMP_LINE={line!r} COMP_POINT={point}
COMP_CWORD={word}
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
SCRIPT = f"#!{sys.executable}\nimport sys\nfrom qvlm.__main__ import main\nsys.exit(main())\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("qvlm tab", {name for name in ROUTES if name.startswith("tab")}),
        ("qvlm model=mini_", {"model=mini_llava", "model=mini_moe_llava"}),
        ("qvlm method=rtn bits=w6", {"bits=w6a6"}),
    ],
)
def test_a_shell_completes(line: str, offers: set[str], tmp_path: Path) -> None:
    (tmp_path / "qvlm").write_text(SCRIPT)
    (tmp_path / "qvlm").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", COMPLETE.format(line=line, point=len(line), word=len(line.split()) - 1)],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert {*done.stdout.split()} == offers, done.stderr


@pytest.mark.parametrize(
    ("started", "said"),
    [
        ("/usr/local/bin/qvlm", "qvlm"),
        ("/somewhere/qvlm/__main__.py", "python -m qvlm"),
        ("run.py", "python run.py"),
    ],
)
def test_messages_name_what_was_started(
    started: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program() == said


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["run.py", "--help"], ["-m", "qvlm", "--help"], ["-m", "qvlm", "fit", "--help"]]
)
def test_a_reader_that_leaves_is_no_traceback(words: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() in (0, 1)


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_importing_the_package_asks_for_huge_pages(given: str | None, expected: str) -> None:
    option = "THP_MEM_ALLOC_ENABLE"
    environment = {name: value for name, value in os.environ.items() if name != option}
    if given is not None:
        environment[option] = given
    said = f"import qvlm, os, sys; print(os.environ['{option}'], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{expected} False\n"
