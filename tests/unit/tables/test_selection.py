"""A table shows comparable records only, and names those that it sets aside."""

from pathlib import Path

from qvlm.records.record import find_records
from qvlm.tables.table2 import build
from tests.helpers.pages import section, table2_page
from tests.helpers.records import make_record


def test_the_newest_record_of_a_cell_is_shown(runs: Path) -> None:
    old = make_record(runs, name="a-new-name", accuracy=10, finished="2026-01-01T00:00:00+00:00")
    new = make_record(runs, name="a-name", accuracy=50, finished="2026-02-01T00:00:00+00:00")
    assert set(build([old, new])["run"]) == set(build([new, old])["run"]) == {"a-name"}
    notes = section(table2_page(runs), "## Records not shown")
    assert "(`a-new-name`): a-name is the newer record of this cell" in notes


def test_a_quick_try_is_not_mixed_in(runs: Path) -> None:
    for method, bits in (("FP", "FP"), ("RTN", "W4A4"), ("RTN", "W6A6")):
        make_record(runs, method, bits)
    make_record(runs, name="try", n=5, finished="2026-09-01", evaluation={"limit": 5})
    make_record(runs, bits="FP", name="try-fp", n=5, finished="2026-09-01", evaluation={"limit": 5})
    make_record(
        *(runs, "AWQ"),
        name="other",
        quantizer={"weight": {"granularity": "per_channel"}, "p": 0.5},
    )
    frame = build(find_records(runs))
    assert set(frame["run"]).isdisjoint({"try", "try-fp", "other"})
    assert set(frame[frame["class"] == "Avg"]["n"]) == {300}
    notes = section(table2_page(runs), "## Records not shown")
    assert "(`try`): another setting: evaluation.limit is 5, not null" in notes
    assert "(`try-fp`): another setting: evaluation.limit is 5, not null" in notes
    assert "quantizer.weight.granularity is per_channel, not per_group" in notes


def test_retrained_weights_supersede_the_old_ones_together(runs: Path) -> None:
    for bits in ("FP", "W6A6", "W4A4"):
        make_record(runs, bits=bits, weights="old", name=f"old-{bits}")
    make_record(runs, bits="W4A4", weights="new", name="new", finished="2026-02-01")
    assert set(build(find_records(runs))["run"]) == {"new"}
    assert (
        section(table2_page(runs), "## Records not shown").count("new has newer weights or data")
        == 3
    )


def test_the_usual_parameters_of_a_method_are_shown(runs: Path) -> None:
    for bits in ("W6A6", "W4A4"):
        make_record(runs, "AWQ", bits, name=f"usual-{bits}", parameters={"grid": 20})
    make_record(runs, "AWQ", name="unusual", finished="2027-01-01", parameters={"grid": 3})
    assert set(build(find_records(runs))["run"]) == {"usual-W6A6", "usual-W4A4"}
    notes = section(table2_page(runs), "## Records not shown")
    assert "(`unusual`): other parameters than most of its method: grid is 3, not 20" in notes


def test_rows_follow_the_paper(runs: Path) -> None:
    methods = ["Q-VLM", "Zebra", "Layer-wise", "QLoRA", "AWQ", "RTN"]
    for method in methods:
        make_record(runs, method, n=10)
    for bits in ("W2A4", "W6A6", "W8A8", "FP"):
        make_record(runs, bits=bits, n=10)
    frame = build(find_records(runs))
    assert list(frame["bits"].unique()) == ["FP", "W8A8", "W6A6", "W4A4", "W2A4"]
    order = ["RTN", "AWQ", "QLoRA", "Layer-wise", "Q-VLM", "Zebra"]
    assert list(frame[frame["bits"] == "W4A4"]["method"].unique()) == order


def test_a_cell_with_other_parameters_alone_is_left_out_and_named(runs: Path) -> None:
    """Under the method's name it would pass for the method of the other cells."""
    for bits in ("W8A8", "W6A6"):
        make_record(runs, "AWQ", bits, name=f"usual-{bits}", parameters={"grid": 20})
    make_record(runs, "AWQ", "W4A4", name="unusual", parameters={"grid": 1})
    assert set(build(find_records(runs))["run"]) == {"usual-W8A8", "usual-W6A6"}
    notes = section(table2_page(runs), "## Records not shown")
    assert "(`unusual`): other parameters than most of its method: grid is 1, not 20" in notes
