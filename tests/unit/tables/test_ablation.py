"""The ablation of RoCo: each part against what it is added to, under both kinds of scales."""

from pathlib import Path

import pytest

from qvlm.records.record import Record
from qvlm.tables.ablation import ABLATION, OF_TOKENS, PARTS, TABLE, TOKEN
from qvlm.tables.selection import select
from tests.helpers.pages import cells
from tests.helpers.records import make_record

METHODS = ("FP", "RTN", "AWQ", "SmoothQuant", *PARTS, TOKEN, *OF_TOKENS)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return [
        make_record(
            tmp_path / "runs",
            method,
            "FP" if method == "FP" else "W4A4",
            accuracy=50.0 + 3 * index,
            name=f"mini_llava-{index}",
        )
        for index, method in enumerate(METHODS)
    ]


def test_rows_are_the_parts_in_the_order_in_which_they_are_added(records: list[Record]) -> None:
    page = TABLE.render(select(records, TABLE.wanted), "make ablation")
    shown = [cells(line)[0] for line in page.splitlines() if line.startswith("| **")]
    assert shown == [f"**{name}**" for name in ABLATION.methods]
    assert "AWQ" not in page and "paper" not in page
    assert "RoCo ahead" in page  # 12 points over QuaRot, planted


def test_every_part_is_compared_with_what_it_is_added_to() -> None:
    assert ("RoCo", "QuaRot") in ABLATION.pairs
    assert ("QuaRot", "GPTQ") in ABLATION.pairs
    assert ("RoCo, per token", TOKEN) in ABLATION.pairs
    assert {name for pair in ABLATION.pairs for name in pair} < {*ABLATION.methods}
