"""Every way in which a row can be wrong gives one sentence, and what can be mended is mended."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from qvlm.data.images import decode, to_rgb
from qvlm.data.prompts import LETTERS, Prompting
from qvlm.data.scienceqa import COLUMNS, load_scienceqa
from qvlm.data.validation import FEATURES, OPTIONAL_TEXTS, validated
from qvlm.errors import UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.evaluation.task import documents, score

MODES = {
    "RGB": "PNG",
    "RGBA": "PNG",
    "L": "PNG",
    "P": "PNG",
    "1": "PNG",
    "CMYK": "JPEG",
    "YCbCr": "TIFF",
    "LAB": "TIFF",
    "I;16": "PNG",
    "I": "TIFF",
    "F": "TIFF",
}


def encoded(mode: str = "RGB") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new(mode, (32, 32)).save(buffer, MODES[mode])
    return {"bytes": buffer.getvalue(), "path": None}


def row(**changes: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(FEATURES, ""),
        "image": encoded(),
        "question": "Which word is a noun?",
        "choices": ["rock", "run", "is"],
        "answer": 0,
        "grade": "grade3",
        "subject": "language science",
        **changes,
    }


def check(*rows: dict[str, Any], folder: Path | None = None) -> datasets.Dataset:
    return validated(rows, lambda index: f"file.parquet, row {index}", folder)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("question", None, "the value is null. Give a text."),
        ("question", 5, "5 is not a text"),
        ("question", "\ud800", ".* is not valid Unicode"),
        ("hint", ["a"], r"\['a'\] is not a text. Give a text, or null"),
        ("choices", None, "the value is null. Give a list of 1 to 10 texts"),
        ("choices", "yes", "'yes' is not a list"),
        ("choices", [], "the list has 0 choices"),
        ("choices", list("abcdefghijk"), "the list has 11 choices. .* letters A to J"),
        ("choices", ["a", None], "in the list, the value is null"),
        ("choices", ["a", 7], "in the list, 7 is not a text"),
        ("answer", None, "the value is null. Give the index of the right choice, 0 to 2."),
        ("answer", 3, "3 is not the index of one of 3 choices"),
        ("answer", -1, "-1 is not the index"),
        ("answer", "A", "'A' is not an index"),
        ("answer", True, "True is not an index"),
        ("answer", float("nan"), "nan is not an index"),
        ("image", {"bytes": b"no image", "path": None}, r"it does not decode \("),
        ("image", {"bytes": encoded()["bytes"][:60], "path": None}, r"it does not decode \("),
        ("image", {"bytes": None, "path": None}, "it has no content"),
        ("image", {"bytes": None, "path": "https://x/a.png"}, "it has no content"),
        ("image", "a.png", "'a.png' is not an image"),
    ],
)
def test_a_fault_is_one_sentence_with_row_and_column(column: str, value: Any, said: str) -> None:
    with pytest.raises(
        UserError, match=f"file.parquet, row 1, column '{column}': {said}"
    ) as refusal:
        check(row(), row(**{column: value}))
    assert "\n" not in str(refusal.value)


def test_optional_texts_that_are_null_read_as_empty() -> None:
    data = check(row(**dict.fromkeys(OPTIONAL_TEXTS)))
    assert {data[0][column] for column in OPTIONAL_TEXTS} == {""}
    assert Prompting().target(data[0]) == Prompting().target(row())
    assert "None" not in Prompting().prompt(data[0])


def test_a_whole_number_that_pandas_made_a_float_is_an_index() -> None:
    assert check(row(answer=2.0))[0]["answer"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_can_be_saved_as_png(mode: str) -> None:
    image = check(row(image=encoded(mode)))[0]["image"]
    assert image.size == (32, 32)
    image.save(io.BytesIO(), "PNG")
    assert image.convert("RGB").mode == "RGB"


def test_one_odd_image_leaves_the_others_as_they_are() -> None:
    data = check(row(), row(image=encoded("CMYK")), row(image=None))
    kept = data.cast_column("image", datasets.Image(decode=False))
    assert kept[0]["image"]["bytes"] == encoded()["bytes"]
    assert data[1]["image"].mode == "RGB"
    assert data[2]["image"] is None


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 32768, 65535], np.uint16, [0, 128, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 100.0, 255.0], np.float32, [0, 100, 255]),
        ([float("nan"), float("inf"), -5.0], np.float32, [0, 255, 0]),
        ([0, 200, 70000], np.int32, [0, 1, 255]),
    ],
)
def test_wide_values_are_scaled_rather_than_cut(
    values: list[float], kind: type, expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], dtype=kind))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_what_decodes_is_what_the_data_set_gives() -> None:
    content = encoded("P")["bytes"]
    assert (
        decode(content).mode == check(row(image={"bytes": content, "path": None}))[0]["image"].mode
    )


@pytest.mark.parametrize("count", [6, 10])
@pytest.mark.parametrize("format", ["QCM-LEA", "QCM-LEPA", "CQM-A"])
def test_ten_choices_have_letters(count: int, format: str) -> None:
    problem = check(row(choices=list("klmnopqrst")[:count], answer=count - 1))[0]
    prompting = Prompting(format)
    assert f"({LETTERS[count - 1]}) " in prompting.prompt(problem)
    answer = prompting.target(problem).removesuffix("</s>")
    assert prompting.parse(answer, count) == count - 1
    assert prompting.parse(LETTERS[count - 1], count) == count - 1


def test_a_grade_that_is_none_counts_in_neither_class() -> None:
    grades = ["grade3", "grade12", "kindergarten", None, "grade", "gradeX", "grade 3"]
    data = check(*(row(grade=grade, image=None) for grade in grades))
    docs = documents(data, Prompting(), "wrong", 0)["test"]

    frame = pd.DataFrame([score(doc, ["A"])["predictions"] for doc in docs])
    classes = class_metrics(frame.astype({"prediction": "Int64"}))
    assert [classes[name]["n"] for name in ("G1-6", "G7-12", "Avg")] == [1, 1, len(grades)]


@pytest.mark.parametrize("column", ["question", "hint", "lecture", "solution", "choices"])
@pytest.mark.parametrize("format", ["QCM-LEA", "QCM-LEPA", "CQM-A"])
def test_an_image_token_in_a_text_is_taken_out_of_prompt_and_target(
    column: str, format: str
) -> None:
    text = "Write <image> first."
    value = [text, "run", "is"] if column == "choices" else text
    problem = check(row(**{column: value}))[0]
    prompting = Prompting(format)
    assert (prompting.prompt(problem) + prompting.target(problem)).count("<image>") == 1


@pytest.mark.parametrize(
    ("choices", "said"),
    [("yes", "'yes' is not a list"), ([1, 2], "in the list, 1 is not a text")],
)
def test_columns_of_another_type_are_faults_of_rows(
    tmp_path: Path, choices: Any, said: str
) -> None:
    rows = [{column: row()[column] for column in COLUMNS} | {"choices": choices}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=f"test.parquet, row 0, column 'choices': {said}"):
        load_scienceqa(str(tmp_path), "test")
