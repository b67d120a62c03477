"""A sweep is named after what it sweeps over, and leaves out what is committed."""

from pathlib import Path

import pytest

from qvlm import cli
from qvlm.records.cells import cell_of, cells_in
from qvlm.records.record import find_records
from qvlm.sweep.plan import sweep_name
from qvlm.tables.answers import write_answers
from qvlm.validation import check_name


@pytest.mark.parametrize(
    ("combinations", "name"),
    [
        ([["method=rtn", "bits=w4a4"]], "cells"),
        ([["method=awq", "bits=w4a4"], ["method=qvlm", "bits=w4a4"]], "method-awq-qvlm_bits-w4a4"),
        ([["seed=0", "threads=1"], ["seed=1", "threads=1"]], "seed-0-1"),
        ([["quantizer.p=0.5"], ["quantizer.p=2"]], "quantizer.p-0.5-2"),
        ([["model.path=/a b"], ["model.path=/c"]], "model.path-a-b-c"),
        ([["+x=a"], ["+x=ä"]], "x-a"),
        ([["seed=0"], ["seed=0"]], "cells"),
    ],
)
def test_the_name_says_what_varies(combinations: list[list[str]], name: str) -> None:
    assert sweep_name(combinations) == name


def test_a_name_is_always_accepted() -> None:
    long = [[f"data.source=/very/long/path/{'x' * index}"] for index in range(90)]
    check_name("group", sweep_name(long))


def test_cells_whose_answers_are_committed_do_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def swept(seeds: str, *words: str) -> int:
        few = ("method=rtn", "data=miniature", "calibration.samples=2", "evaluation.limit=2")
        same = ("evaluation.kl_problems=0", "launcher=here", f"results_dir={tmp_path}")
        return cli.main(["-m", *few, *same, f"calibration.seed={seeds}", *words])

    assert swept("0") == 0
    (first,) = find_records(tmp_path / "runs")
    committed = tmp_path / "answers" / "page"
    write_answers(committed, [first])
    assert cells_in(committed) == {cell_of(first.run)}
    capfd.readouterr()
    assert swept("0,1", "force=true", f"committed={committed}") == 0
    assert "1 of 2 cells are left out: their answers are committed" in capfd.readouterr().out
    again, second = sorted(find_records(tmp_path / "runs"), key=lambda r: r.run["finished"])
    assert again.run == first.run  # not even by force
    assert cell_of(second.run) != cell_of(first.run)
    assert swept("0", f"committed={tmp_path}/none") == 2
    assert "is not a folder" in capfd.readouterr().err
