"""Verdicts on the paper's claims follow from the records by rule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qvlm.errors import UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.records.record import Record
from qvlm.tables import claims
from qvlm.tables.claims.analysis import COMPARISONS, gather, verdict
from qvlm.tables.claims.catalog import OWN
from qvlm.tables.claims.components import Estimate
from qvlm.tables.claims.design import MODELS, Assumptions, Design, least_detectable
from qvlm.tables.claims.plan import TRAINED, plan
from qvlm.tables.labels import QVLM
from tests.helpers.pages import cells
from tests.helpers.records import make_record

QUESTIONS = 800
Make = Callable[..., Record]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a record of the design from the share of right answers."""
    runs = tmp_path_factory.mktemp("runs")
    bases: dict[tuple[str, str], Record] = {}

    def record(name: str, method: str, draw: int, share: float, bits: str = "W4A4") -> Record:
        if (name, method) not in bases:
            place = f"{name}-{method}"
            bases[name, method] = make_record(
                runs, method, bits, model=name, n=QUESTIONS, name=place
            )
        base = bases[name, method]
        rng = np.random.default_rng([hash_of(name), hash_of(method), draw])
        predictions = base.predictions.copy()
        predictions["correct"] = rng.random(QUESTIONS) < share
        calibration = {**base.config.get("calibration", {}), "seed": draw}
        config = {**base.config, "group": "claims", "calibration": calibration}
        metrics = {**base.metrics, "classes": class_metrics(predictions)}
        return replace(base, predictions=predictions, config=config, metrics=metrics)

    return record


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:7], "big")


def row(text: str, start: str, model: str = "mini_llava", bits: str = "W4A4") -> dict[str, str]:
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    (found,) = (
        line
        for line in lines
        if line[0].startswith(start) and line[1:3] == [bits, model] and len(line) == len(lines[0])
    )
    return dict(zip(lines[0], found, strict=True))


def table_of(text: str) -> str:
    return text.partition("## Where the uncertainty")[0]


@pytest.mark.parametrize(
    ("low", "high", "paper", "words"),
    [
        (0.2, 3.0, 2.0, "holds"),
        (0.2, 3.0, None, "holds"),
        (-3.0, -0.1, 2.0, "refuted: the opposite"),
        (-3.0, -0.1, None, "refuted: the opposite"),
        (-0.5, 0.9, 2.0, "refuted: under half of the paper's"),
        (0.2, 0.9, 2.0, "refuted: ahead, but under half of the paper's"),
        (-0.5, 0.9, None, "undecided, smaller than 0.9"),
        (-1.5, 1.1, 2.0, "undecided, smaller than 1.5"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(
    low: float, high: float, paper: float | None, words: str
) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 9.0, {}), paper) == words


def test_a_newer_cell_of_another_setting_does_not_take_a_place(make: Make) -> None:
    records = [
        make("mini_llava", method, draw, 0.8) for method in (QVLM, "AWQ") for draw in range(2)
    ]
    other = {**records[0].run["influences"], "quantizer": {"ranges": "minmax"}}
    run = {**records[0].run, "influences": other, "finished": "2027-01-01"}
    strange = replace(records[0], path=records[0].path.with_name("strange"), run=run)
    found = gather([strange, *records])
    assert {*map(id, found.records.values())} == {*map(id, records)}
    (left,) = found.left_out
    assert left.record is strange
    assert left.reason.startswith("another setting: quantizer.p is null, not 0.5; quantizer.ranges")


def test_the_page_compares_methods_over_trainings_and_draws(make: Make) -> None:
    names = ["mini_llava", "mini_llava-seed1", "mini_llava-seed2"]
    shares = {QVLM: 0.9, "AWQ": 0.4, "RTN": 0.9, "QLoRA": 0.95}
    records = [
        make(name, method, draw, share)
        for name in names
        for draw in range(4)
        for method, share in shares.items()
    ]
    text = claims.page(records, "make claims")
    table = table_of(text)
    ahead = row(table, "Q-VLM beats AWQ")
    own = {
        (r.model, r.config["calibration"]["seed"]): 100 * r.predictions["correct"].mean()
        for r in records
        if r.method == QVLM
    }
    other = {
        (r.model, r.config["calibration"]["seed"]): 100 * r.predictions["correct"].mean()
        for r in records
        if r.method == "AWQ"
    }
    expected = np.mean([own[key] - other[key] for key in own])
    assert float(ahead["difference"]) == pytest.approx(expected, abs=0.006)
    assert ahead["verdict"] == "holds"
    assert row(table, "Q-VLM beats QLoRA")["verdict"] == "refuted: the opposite"
    assert row(table, "Q-VLM helps at all")["verdict"].startswith("undecided, smaller than")
    assert row(table, "CDM helps")["verdict"] == "not measured"
    assert row(table, "Q-VLM beats AWQ", "mini_moe_llava")["difference"] == "not measured"
    assert "mini_llava: 800 questions of 20000, 4 draws of 5, 3 trainings of 3." in text
    assert "cover questions, draws and trainings" in text
    assert "mini_moe_llava: not measured." in text
    assert " 3 x 4 |" in text


def test_each_training_is_shown_by_itself(make: Make) -> None:
    one = [make("mini_llava", method, draw, 0.8) for method in ("RTN", QVLM) for draw in range(3)]
    assert "After each training" not in claims.page(one, "make claims")
    sister = [make("mini_llava-seed1", method, 0, share) for method, share in SISTER.items()]
    text = claims.page([*one, *sister], "make claims")
    part = text.partition("## After each training")[2].partition("## ")[0]
    header, *rows = (cells(line) for line in part.splitlines() if line.startswith("|"))
    assert header == ["method", "mini_llava", "mini_llava-seed1"]
    found = {line[0]: line[1:] for line in rows}
    right = {record.method: 100 * record.predictions["correct"].mean() for record in sister}
    assert found["RTN"] == [
        f"{100 * one[0].predictions['correct'].mean():.2f}",
        f"{right['RTN']:.2f}",
    ]
    ahead = right[QVLM] - right["RTN"]
    assert found[QVLM][1].startswith(f"{right[QVLM]:.2f} ({ahead:+.1f}, ")
    assert found["AWQ"][0] == "not measured"
    assert "Trainings with fewer draws, which are shown by themselves: 1." in text


SISTER = {"RTN": 0.8, QVLM: 0.6, "AWQ": 0.7}


def test_our_own_claims_are_a_family_of_their_own(make: Make) -> None:
    shares = {"RoCo": 0.8, "RoCo, per token": 0.9, "AWQ": 0.7, QVLM: 0.8}
    records = [
        make("mini_llava", name, draw, share) for name, share in shares.items() for draw in range(4)
    ]
    text = claims.page(records, "make claims")
    assert row(table_of(text), "RoCo beats AWQ")["verdict"] == "holds"
    assert row(table_of(text), "RoCo, per token, beats static")["verdict"] == "holds"
    assert row(table_of(text), "RoCo beats QLoRA")["verdict"] == "not measured"
    assert row(table_of(text), "Q-VLM beats AWQ")["verdict"] == "holds"
    # Its draws are its own: it is calibrated, unlike other methods with ranges per token.
    alone = [r for r in records if r.method != "RoCo, per token" or r.config["calibration"]["seed"]]
    page = claims.page(alone, "make claims")
    assert row(table_of(page), "RoCo, per token, beats static")["verdict"] == "not measured"
    own = COMPARISONS[OWN[0]]
    assert own == len(OWN) * len(MODELS) != COMPARISONS[claims.CLAIMS[0]]


def test_missing_trainings_and_draws_are_said(make: Make) -> None:
    records = [make("mini_llava", method, 0, 0.8) for method in (QVLM, "AWQ")]
    text = claims.page(records, "make claims")
    assert "1 draws of 5, 1 trainings of 3" in text
    assert "say nothing about other trainings or other draws" in text
    errors = [line for line in text.splitlines() if " 1 x 1 |" in line]
    assert errors
    assert all(cells(line)[4:6] == ["not measured"] * 2 for line in errors)


def test_what_is_not_complete_in_every_training_is_not_analyzed(make: Make) -> None:
    """Two trainings with two draws are more than one training with three."""
    records = [make("mini_llava", m, draw, 0.8) for m in (QVLM, "AWQ") for draw in range(3)]
    records += [make("mini_llava-seed1", m, d, 0.8) for m in (QVLM, "AWQ") for d in range(2)]
    records += [make("mini_llava-seed1", QVLM, 2, 0.8)]
    assert " 2 x 2 |" in claims.page(records, "make claims")


@pytest.mark.parametrize(("draws", "shape"), [(1, "1 x 3"), (2, "2 x 2"), (3, "2 x 3")])
def test_the_most_cells_are_analyzed(make: Make, draws: int, shape: str) -> None:
    """A training that has only begun does not take the other's draws out of the analysis."""
    records = [make("mini_llava", m, draw, 0.8) for m in (QVLM, "AWQ") for draw in range(3)]
    records += [make("mini_llava-seed1", m, d, 0.8) for m in (QVLM, "AWQ") for d in range(draws)]
    assert f" {shape} |" in claims.page(records, "make claims")


def test_a_method_without_calibration_answers_alike_in_every_draw(make: Make) -> None:
    records = [make("mini_llava", QVLM, draw, 0.8) for draw in range(3)]
    records.append(make("mini_llava", "ZeroQuant-V2, per token", 0, 0.5))
    text = claims.page(records, "make claims")
    assert row(table_of(text), "Q-VLM beats per-token")["verdict"] == "holds"
    assert " 1 x 3 |" in text


def test_a_record_without_proof_is_refused_and_named(make: Make) -> None:
    records = [make("mini_llava", method, 0, 0.8) for method in (QVLM, "AWQ")]
    layers = [{**layer, "weight_levels": 300} for layer in records[0].layers]
    records[0] = replace(records[0], layers=layers)
    text = claims.page(records, "make claims")
    assert row(table_of(text), "Q-VLM beats AWQ")["verdict"] == "not measured"
    assert f"`{records[0].name}`: " in text
    assert "300 weight values per scale" in text


def test_records_of_other_pages_are_not_analyzed(make: Make) -> None:
    records = [make("mini_llava", method, 0, 0.8) for method in (QVLM, "AWQ")]
    others = [replace(r, config={**r.config, "group": "table2"}) for r in records]
    assert claims.concerned(others) == []
    assert claims.concerned([*records, *others]) == records


def test_no_records_are_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(["--runs", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err


def test_the_command_writes_the_page_and_names_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_record(runs)
    assert claims.main(["--runs", str(runs), "--out", str(out), "--command", "make claims"]) == 0
    text = (out / "claims.md").read_text()
    assert capsys.readouterr().out == text
    assert "Command: `make claims`" in text


def test_what_the_paper_says_is_read_from_its_tables() -> None:
    printed = [None if c.points is None else round(c.points, 2) for c in claims.CLAIMS]
    # 89.70 - 88.87, 80.78 - 78.64, 89.70 - 87.57, ... by hand from the paper.
    expected = [0.83, 2.14, 2.13, 2.87, 0.73, 1.13, 0.82, 0.69, 1.71, None, None]
    assert printed == expected


def test_the_least_detectable_effect_of_one_cell_is_that_of_a_paired_test() -> None:
    """z of 97.5 % and of 80 % over the error of a mean of -100, 0 and 100."""
    found = least_detectable(Design(4000, 1, 1), Assumptions(0.1, 0.5, 0.5), 1)
    assert found == pytest.approx((1.96 + 0.8416) * 100 * (0.1 / 4000) ** 0.5, rel=1e-3)


def test_more_of_anything_makes_a_smaller_effect_visible() -> None:
    assumed = Assumptions(0.1, 0.5, 0.5)
    base = least_detectable(Design(4000, 3, 3), assumed)
    for more in (Design(8000, 3, 3), Design(4000, 5, 3), Design(4000, 3, 5)):
        assert least_detectable(more, assumed) < base
    assert least_detectable(Design(4000, 3, 3), Assumptions(0.1, 1.0, 0.5)) > base
    assert least_detectable(Design(4000, 3, 3), assumed, 1) < base
    # Without other trainings nothing is said about them, so nothing is added for them.
    assert least_detectable(Design(4000, 3, 1), Assumptions(0.1, 9.0, 0.5)) < 3


def finished(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / TRAINED).write_text("model: mini_llava\n")
    return path


def test_the_plan_runs_draw_by_draw_over_the_trainings_that_are_finished(tmp_path: Path) -> None:
    path = finished(tmp_path, "mini_llava-seed10")
    (tmp_path / "mini_llava-seed2").mkdir()  # not finished
    made = plan(["questions=500", "draws=2", f"trainings={tmp_path}", "threads=1"])
    assert made.others == ["threads=1"]
    assert not made.estimate
    draws = [word for sweep in made.sweeps for word in sweep if "calibration.seed" in word]
    assert draws == sorted(draws)
    assert all("evaluation.limit=500" in sweep for sweep in made.sweeps)
    sister = [sweep for sweep in made.sweeps if "model.name=mini_llava-seed10" in sweep]
    assert all(f"model.path={path}" in sweep for sweep in sister)
    assert len(sister) == 5  # full precision, and two bit widths in each of two draws
    per_token = [sweep for sweep in made.sweeps if any("zeroquant" in word for word in sweep)]
    assert all("calibration.seed=0" in sweep for sweep in per_token)
    counted = sum(
        len(word.removeprefix("method=").split(","))
        for sweep in made.sweeps
        for word in sweep
        if word.startswith("method=")
    )
    assert counted == Design(500, 2, 2).cells + Design(500, 2, 1).cells
    cells = f"trainings (2 of mini_llava and 1 of mini_moe_llava): {counted} cells"
    assert cells in made.announcement
    assert "Up to 2 of 3 trainings are missing: `make miniature SEED=1`" in made.announcement


def test_the_announcement_comes_before_anything_runs(tmp_path: Path) -> None:
    for model in MODELS:
        for seed in (1, 2):
            finished(tmp_path, f"{model}-seed{seed}")
    made = plan([f"trainings={tmp_path}", "estimate=true"])
    assert made.estimate
    trainings = "trainings (3 of mini_llava and 3 of mini_moe_llava)"
    size = f"20000 questions x 5 calibration draws x {trainings}: 402 cells"
    assert size in made.announcement
    assert "are missing" not in made.announcement
    assert made.announcement.count("points on") == 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("questions=many", "questions=many is not a whole number"),
        ("questions=30000", "questions=30000 is not"),
        ("draws=0", "draws=0 is not"),
        ("estimate=yes", "estimate=yes is not one of: true, false"),
    ],
)
def test_a_design_that_cannot_be_is_the_users_error(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan([word])


def test_a_cell_with_other_parameters_is_no_draw_of_its_method(make: Make) -> None:
    """It is newer than the cell of the design, whose place it would take."""
    records = [make("mini_llava", method, 0, 0.8) for method in ("AWQ", QVLM)]
    influences = {**records[0].run["influences"], "method": {"n_grid": 1}}
    odd = replace(records[0], run={**records[0].run, "influences": influences, "finished": "2099"})
    other_draw = make("mini_llava", "AWQ", 1, 0.8)
    found = gather([*records, other_draw, odd])
    assert found.records["mini_llava", "W4A4", "AWQ", 0] is records[0]
    (left,) = found.left_out
    assert left.record is odd
    assert left.reason.startswith("other parameters than most of its method: ")
