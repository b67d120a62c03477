"""A record whose layers or numbers prove nothing is refused, and the page says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvlm.records.record import find_records
from qvlm.tables.selection import select
from qvlm.tables.table2 import build
from tests.helpers.pages import section, table2_page
from tests.helpers.records import LAYERS, make_layers, make_record


def planted(change: dict[str, Any]) -> list[dict[str, Any]]:
    layers = make_layers("W4A4")
    layers[3] |= change
    return layers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_levels": 512}, "512 input values per scale, 16 allowed"),
        ({"weight_levels": 17}, "17 weight values per scale, 16 allowed"),
        ({"weight_levels": 0}, "weight never seen"),
        ({"w_bits": 8, "weight_levels": 200}, "8 bits per weight value"),
        ({"a_bits": 8}, "8 bits per input value"),
    ],
)
def test_a_row_whose_layers_exceed_its_bits_is_refused(
    runs: Path, change: dict[str, Any], reason: str
) -> None:
    make_record(runs, bits="FP")
    bad = make_record(runs, "AWQ", layers=planted(change))
    make_record(runs, "RTN")
    frame = build(find_records(runs))
    assert set(frame["method"]) == {"FP", "RTN"}
    text = table2_page(runs)
    assert f"(`{bad.name}`): {LAYERS[3]}: {reason}" in section(text, "## Refused rows")
    assert "AWQ" not in section(text, "## mini_llava")
    assert bad.name not in (runs.parent / "out" / "table2.csv").read_text()


def test_fewer_bits_than_claimed_are_accepted(runs: Path) -> None:
    make_record(runs, layers=planted({"w_bits": 2, "weight_levels": 4}))
    assert set(build(find_records(runs))["method"]) == {"RTN"}


def test_a_row_without_a_whole_proof_is_refused(runs: Path) -> None:
    make_record(runs, "RTN")
    make_record(runs, "AWQ", layers=[])
    make_record(runs, "QLoRA", layers=make_layers("W4A4")[:-2])
    refused = {left.record.method: left.reason for left in select(find_records(runs)).refused}
    assert refused["AWQ"] == "its proof of bits is empty"
    assert refused["QLoRA"].startswith(f"{LAYERS[3]}: missing from the proof, which mini_llava-")
    assert refused["QLoRA"].endswith("(and 1 more)")
    assert set(build(find_records(runs))["method"]) == {"RTN"}


def broken(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(classes: dict[str, Any]) -> None:
        classes[name][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken("IMG", "accuracy", float("nan")), "accuracy of class IMG is None"),
        (broken("SOC", "ci_high", float("inf")), "ci_high of class SOC is None"),
        (broken("NO", "accuracy", 130.0), "accuracy of class NO is 130.0"),
        (broken("Avg", "accuracy", 99.0), "do not follow from its predictions"),
        (lambda classes: classes.pop("G1-6"), "class G1-6 is missing"),
    ],
)
@pytest.mark.parametrize("bits", ["FP", "W4A4"])
def test_broken_numbers_are_refused(
    runs: Path, bits: str, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    make_record(runs, bits=bits, metrics=change)
    (left,) = select(find_records(runs)).refused
    assert reason in left.reason
    assert build(find_records(runs)).empty
    assert reason in section(table2_page(runs), "## Refused rows")


def test_an_older_record_never_stands_in_for_one_without_proof(runs: Path) -> None:
    make_record(runs, name="old", finished="2026-01-01")
    make_record(runs, name="new", finished="2026-02-01", layers=[])
    assert build(find_records(runs)).empty
