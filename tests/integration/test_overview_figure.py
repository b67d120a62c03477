"""The picture of the README is drawn from records, by its rule, or refused in one sentence."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from qvlm.data.scienceqa import load_scienceqa
from tests.helpers.records import make_record

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location(
    "overview_figure", ROOT / "experiments" / "overview_figure.py"
)
assert SPEC is not None
assert SPEC.loader is not None
figure = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figure)


def test_it_is_drawn_from_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "picture.png"
    make_record(runs, bits="FP", accuracy=100.0, n=120)
    make_record(runs, "RTN", accuracy=0.0, n=120)
    arguments = [f"--runs={runs}", f"--out={out}"]
    assert figure.main(arguments) == 2
    assert "--runs has no record of mini_llava with Q-VLM." in capsys.readouterr().err
    make_record(runs, "Q-VLM", accuracy=100.0, n=120)
    assert figure.main(arguments) == 0
    with Image.open(out) as image:
        assert image.size[0] > 1000
    problems = load_scienceqa("miniature", "test", 120)
    problem, given = figure.choose(figure.answers_of(figure.find_records(runs)))
    skills = [row["skill"] for row in problems]
    assert problem["question_id"] == f"test-{skills.index(figure.SKILL)}"
    assert {method: bool(answer["correct"]) for method, answer in given.items()} == {
        "FP": True,
        "RTN": False,
        "Q-VLM": True,
    }


def test_the_chart_shows_the_table() -> None:
    table = pd.read_csv(ROOT / "results" / "table2.csv", keep_default_na=False)
    axes = figure.pyplot.figure().add_axes((0, 0, 1, 1))
    figure.draw_chart(axes, table)
    rows = table[(table["class"] == "Avg") & (table["bits"] == "W4A4")]
    drawn = sorted(
        round(x, 2) for line in axes.lines if len(line.get_xdata()) > 2 for x in line.get_xdata()
    )
    everywhere = rows.groupby("method").filter(lambda own: len(own) == len(figure.MODELS))
    assert drawn == sorted(everywhere["accuracy"])
