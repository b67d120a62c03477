"""Sensitivity finds what was planted and resumes, and its page follows from its CSV."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from scipy.stats import ttest_1samp

from qvlm.cell import inputs
from qvlm.errors import RunError
from qvlm.evaluation.text import evaluate_text
from qvlm.tables.sensitivity import measure as measuring
from qvlm.tables.sensitivity.__main__ import main
from qvlm.tables.sensitivity.page import page
from qvlm.tables.sensitivity.plot import plot
from qvlm.tables.sensitivity.rows import COLUMNS, read
from qvlm.tables.verify import PAGES, check
from tests.helpers.configs import load
from tests.helpers.language_models import save_language_model, write_texts
from tests.helpers.problems import make_dataset, make_model, make_problems
from tests.helpers.sensitivity import planted_outcome, planted_rows

pytestmark = pytest.mark.slow

(PAGE,) = (page for page in PAGES if page.name == "sensitivity")
BROKEN_METHOD = "method._target_=tests.helpers.sensitivity.Breaks"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line for a tiny language model on tiny texts."""
    folder = tmp_path_factory.mktemp("tiny")
    texts, model = write_texts(folder / "texts"), save_language_model(folder / "model")
    return [
        *("model=smollm2", "model.name=tiny", f"model.path={model}", "device=cpu", "data=text"),
        *(f"data.source={texts}", "calibration.samples=4", "calibration.tokens=12", "bits=w8a8"),
    ]


def run(words: list[str], results: Path) -> int:
    """Runs the command, whose files lie in its results folder."""
    given = [*words, f"results_dir={results}", f"--out={results}", "--command=make sensitivity"]
    return main(sorted(given, key=lambda word: word.startswith("--")))  # overrides come first


def of(rows: pd.DataFrame, part: str, quantized: str = "alone", operands: str = "both") -> Any:
    """The one row of a state."""
    keys = {"part": part, "quantized": quantized, "operands": operands}
    (row,) = rows[(rows[list(keys)] == pd.Series(keys)).all(axis=1)].to_dict("records")
    return row


def test_a_broken_layer_shows_in_its_part_and_at_its_depth(
    words: list[str], tmp_path: Path
) -> None:
    assert run([*words, BROKEN_METHOD], tmp_path) == 0
    rows = pd.read_csv(tmp_path / "sensitivity.csv")
    whole = of(rows, "everything")["kl"]
    assert of(rows, "nothing")["kl"] < 1e-6 * whole
    for broken in ("MLP output", "decoder 1"):
        assert of(rows, broken)["kl"] > 0.7 * whole
        assert of(rows, broken, "all others")["saved"] > 0.7 * whole
        assert of(rows, broken)["perplexity"] != of(rows, "full precision")["perplexity"]
    for sound in ("attention", "attention output", "MLP", "decoder 0"):
        assert of(rows, sound)["kl"] < 0.2 * whole
        assert of(rows, sound, "all others")["saved"] < 0.2 * whole
    # The weight is broken, and not the input.
    assert of(rows, "MLP output", operands="weights")["kl"] > 0.7 * whole
    assert of(rows, "MLP output", operands="activations")["kl"] < 0.2 * whole
    assert not (rows["questions"] > 0).any()
    assert set(rows["split"]) == {"validation"}


def test_a_killed_command_goes_on_where_it_stopped(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return evaluate_text(*args, **kwargs)

    monkeypatch.setattr(measuring, "evaluate_text", counted)
    assert run(words, tmp_path / "a") == 130
    assert not (tmp_path / "a" / "sensitivity.csv").exists()
    assert run(words, tmp_path / "a") == 0
    resumed = calls - 6
    assert run(words, tmp_path / "b") == 0
    assert calls - 6 - resumed == resumed + 5  # the five that had been kept
    texts = [(tmp_path / name / "sensitivity.csv").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    assert not list((tmp_path / "a" / "sensitivity").iterdir())  # nothing is kept any more


def test_models_stand_side_by_side(words: list[str], tmp_path: Path) -> None:
    planted_rows("mini_llava").to_csv(tmp_path / "sensitivity.csv", index=False)
    for _ in range(2):  # rows of the same model are replaced
        assert run(words, tmp_path) == 0
    rows = read(tmp_path)
    assert rows is not None
    assert list(dict.fromkeys(rows["model"])) == ["mini_llava", "tiny"]
    assert not rows.duplicated(["model", "part", "quantized", "operands"]).any()
    assert (tmp_path / "sensitivity.md").read_text() == page(rows, "make sensitivity")
    assert (tmp_path / "sensitivity.png").read_bytes() == plot(rows)


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_questions_are_compared_and_the_first_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, problems = make_model(), make_dataset(make_problems(12))
    monkeypatch.setattr(inputs, "load_problems", lambda *args: problems)
    config = load("evaluation.kl_problems=9", "evaluation.max_new_tokens=1")
    reader = measuring._Questions(config, loaded, 8)
    full = reader.outcome()
    assert len(full.tokens) == 9
    assert full.nats == pytest.approx([0.0] * 9, abs=1e-9)
    assert (len(full.predictions), len(full.correct)) == (8, 8)
    answers = [problems[row]["answer"] for row in range(8)]
    assert full.correct == [a == b for a, b in zip(full.predictions, answers, strict=True)]
    loaded.model.model.language_model.layers[0].mlp.down_proj.weight.data *= 3
    assert min(reader.outcome().nats) > 0
    assert measuring._Questions(config, loaded, 0).outcome().predictions == []
    assert isinstance(reader.asked, datasets.Dataset)


def test_intervals_are_paired() -> None:
    rows = planted_rows()
    whole, alone = (planted_outcome(0.01 * count) for count in (3, 2))
    row = of(rows, "attention")
    means = np.array(alone.nats) / 10  # each question has ten tokens
    interval = ttest_1samp(means, 0).confidence_interval()
    assert (row["kl"], row["kl_low"], row["kl_high"]) == pytest.approx((means.mean(), *interval))
    apart = (np.array(whole.nats) - np.array(alone.nats)) / 10
    interval = ttest_1samp(apart, 0).confidence_interval()
    found = row["saved"], row["saved_low"], row["saved_high"]
    assert found == pytest.approx((apart.mean(), *interval))
    assert row["changed"] == pytest.approx(100 * 8 / 40)
    assert (row["accuracy"], row["difference"]) == pytest.approx((80.0, -20.0))
    assert row["changed_low"] < 20 < row["changed_high"]
    assert row["difference_low"] < -20 < row["difference_high"] < 0
    assert pd.isna(row["perplexity"])


def test_the_page_follows_from_the_csv(tmp_path: Path) -> None:
    rows = planted_rows()
    rows.to_csv(tmp_path / "sensitivity.csv", index=False)
    file = tmp_path / "sensitivity.md"
    assert check(PAGE, tmp_path) == []  # not made
    text = page(pd.read_csv(tmp_path / "sensitivity.csv"), "make sensitivity MODEL=NAME")
    file.write_text(text)
    assert check(PAGE, tmp_path) == []
    shown = f"{of(rows, 'attention')['kl']:.4f} "
    assert shown in text
    file.write_text(text.replace(shown, "9.9999 ", 1))
    (found,) = check(PAGE, tmp_path)
    assert found.printed.startswith("9.9999")
    (tmp_path / "sensitivity.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="does not have the columns"):
        check(PAGE, tmp_path)
    (tmp_path / "sensitivity.csv").unlink()
    with pytest.raises(RunError, match="is missing"):
        check(PAGE, tmp_path)
    assert list(rows.columns) == list(COLUMNS)


def test_no_labels_of_the_plot_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot(pd.concat([planted_rows("mini_llava"), planted_rows("mini_moe_llava")]))
    monkeypatch.undo()
    (figure,) = drawn
    assert len(figure.axes) == 2
    for panel in figure.axes:
        axes = (panel.xaxis, panel.yaxis)
        shown = [label for axis in axes for label in axis.get_ticklabels() if label.get_text()]
        texts = [*shown, panel.xaxis.label, panel.xaxis.offsetText, panel.title]
        boxes = [box for box in (text.get_window_extent() for text in texts) if box.width]
        assert len(boxes) >= 6
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    plt.close(figure)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bits=fp", "bits=fp is not possible here"),
        ("execution=packed", "execution is not simulated"),
        ("device=map", "device=map is not"),
        ("--problems=1", "--problems=1 is not"),
        ("--answers=-1", "--answers=-1 is not"),
        ("evaluation.limit=99", "evaluation.limit: 99 is not a number of documents"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, word], tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "sensitivity.csv").exists()


@pytest.mark.parametrize("option", ["evaluation.limit", "evaluation.kl_problems"])
def test_numbers_of_questions_are_options_of_the_command(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model=mini_llava", f"{option}=5"], tmp_path) == 2
    said = f"error: {option} is not for this. Give --problems and --answers.\n"
    assert capsys.readouterr().err == said
