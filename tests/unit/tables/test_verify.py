"""A page is checked against its committed answers, and one changed digit is found and named."""

import gzip
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvlm.config.schema import influences
from qvlm.errors import RunError, UserError
from qvlm.records.record import Record
from qvlm.tables import claims, table1, table2, table5
from qvlm.tables.answers import FACTS, SUFFIX, folder_of, read_answers, write_answers
from qvlm.tables.command import keep_answers, write_files
from qvlm.tables.differences import Difference, differences
from qvlm.tables.labels import CDM, ERROR_PROXY, VEO
from qvlm.tables.rerun import compare, configuration, rerun
from qvlm.tables.table4.facts import Alone, Facts, RepeatTimes, Timed
from qvlm.tables.table4.page import texts_of
from qvlm.tables.verify import PAGES, check, main
from tests.helpers.configs import load
from tests.helpers.records import make_layers, make_record

pytestmark = pytest.mark.slow

ACCURACY = {"RTN": 60.0, "AWQ": 55.0, "QLoRA": 62.0, "Layer-wise": 64.0, "Q-VLM": 70.0}
ACCURACY |= {CDM: 66.0, VEO: 65.0, ERROR_PROXY: 63.0}
(TABLE2,) = (page for page in PAGES if page.name == "table2")
PARTS = ("scale", "model", "data", "quantizer", "calibration", "evaluation", "tracking", "method")
COMMANDS = {
    module.__name__.rpartition(".")[2]: module for module in (table1, table2, table5, claims)
}

TABLE4 = ("table4.md", "table4.csv")


def _make_table4(runs: Path, results: Path) -> None:
    """Writes Table 4 as its command does, of times that nobody measured."""
    names = [f"mini_llava-{cell}-00000000" for cell in ("fp-fp", "awq-w4a4", "q-vlm-w4a4")]
    records = {name: Record.load(runs / name) for name in names}
    others = [{}, {"simulated": names[2]}, {"simulated": names[2]}]
    models = [
        Timed(
            name,
            other,
            [RepeatTimes(0.1 * k, 0.25, 1.5 / index, 7 + k) for k in (1, 2, 3)],
            Alone(5e8, 6.5e8 / index, 3_000_000 // index, {"native": 40 * index}),
        )
        for index, (name, other) in enumerate(zip(names, others, strict=True), 1)
    ]
    hardware = {"cpu": "Some CPU", "memory_gib": 16.0, "gpu": None}
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
    facts = Facts(16, 3, "cpu", 2, hardware, versions, "0123", [models])
    texts = texts_of(facts, records, "make table4")
    write_files({results / name: text for name, text in texts.items()})
    keep_answers(results, "table4", list(records.values()), asdict(facts))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results: every page of these records, with its answers."""
    results = tmp_path_factory.mktemp("made") / "results"
    runs = results / "runs"
    for model in ("mini_llava", "mini_moe_llava"):
        make_record(runs, bits="FP", model=model, accuracy=90.0, generated=True, n=200)
    for seed, (method, accuracy) in enumerate(ACCURACY.items()):
        make_record(runs, method, accuracy=accuracy, seed=seed, generated=True, n=200)
    for draw, method in ((0, "FP"), (0, "AWQ"), (1, "AWQ"), (0, "Q-VLM"), (1, "Q-VLM")):
        bits, seed = ("FP", 90) if method == "FP" else ("W4A4", draw + 2 * (method == "AWQ"))
        calibration = {"split": "train", "samples": 3, "seed": draw}
        planted = dict(name=f"claims-{method}-{draw}", group="claims", calibration=calibration)
        make_record(runs, method, bits, seed=seed, n=200, generated=True, **planted)
    _make_table4(runs, results)
    make_record(runs, "AWQ", name="older", finished="2025", generated=True, n=200)
    make_record(runs, "ZeroQuant", layers=[], generated=True, n=200)
    for name, module in COMMANDS.items():
        said = ["--runs", str(runs), "--out", str(results), "--command", f"make {name}"]
        assert module.main(said) == 0
    shutil.rmtree(runs)  # what is committed is enough
    return results


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "results"))


def test_every_page_follows_from_its_answers(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--results", str(made)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in (*COMMANDS, "table4"):
        assert f"{name}: every value follows from its answers" in out
        assert (made / f"{name}.md").is_file()
    assert "older" in (made / "table2.md").read_text()


def digits(name: str, text: str) -> list[int]:
    """The positions of some digits in the rows of a file's tables, from its first to its last."""
    rows = r"(?<=\n).*,.*$" if name.endswith(".csv") else r"^\| .*\|$"
    found = [
        line.start() + digit.start()
        for line in re.finditer(rows, text, re.M)
        for digit in re.finditer(r"[0-9]", line[0])
        if digit.start() > line[0].find("|", 2)  # the first cell names the row
    ]
    return found[:: max(1, len(found) // 40)]


@pytest.mark.parametrize(
    "name",
    ["table1.md", "table1.csv", "table2.md", "table2.csv", "table5.md", "claims.md", *TABLE4],
)
def test_one_changed_digit_is_found(made: Path, name: str) -> None:
    text = (made / name).read_text()
    (page,) = (page for page in PAGES if page.name == Path(name).stem)
    computed = page.render(made, f"make {page.name}")[name]
    places = digits(name, text)
    assert len(places) >= 30
    for place in places:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        (found,) = differences(name, changed, computed)
        line = text[:place].count("\n") + 1
        assert found.place.startswith(f"{name}, line {line}, row "), found
        assert found.printed != found.computed


def test_a_difference_names_page_row_column_and_both_values(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = results / "table2.md"
    text = file.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| **AWQ**"))
    value = row.split("|")[4].strip()
    assert re.fullmatch(r"[0-9]+\.[0-9][0-9]", value)
    cells = row.split("|")
    cells[4] = cells[4].replace(value, "12.34")
    file.write_text(text.replace(row, "|".join(cells), 1))
    assert main(["--results", str(results)]) == 1
    out, err = capsys.readouterr()
    assert "table1: every value follows" in out
    line = text[: text.index(row)].count("\n") + 1
    expected = f"table2.md, line {line}, row **AWQ**, column SOC: 12.34 is printed, {value} follows"
    assert f"  {expected}" in out
    assert err == f"error: 1 value differs, the first in {expected}\n"


def test_a_page_without_answers_is_not_taken_on_trust(results: Path) -> None:
    shutil.rmtree(folder_of(results, "table2"))
    (found,) = check(TABLE2, results)
    assert str(found).endswith("a page without committed answers is printed, nothing follows")
    (results / "table2.md").unlink()
    assert check(TABLE2, results) == []


def test_facts_that_no_page_wrote_are_refused(results: Path) -> None:
    (page,) = (page for page in PAGES if page.name == "table4")
    file = folder_of(results, "table4") / FACTS
    text = file.read_text()
    for a, b in (("1.5", "2.5"), ("40", "41"), ("Some CPU", "Another")):
        assert a in text
        file.write_text(text.replace(a, b, 1))
        assert check(page, results), a
    for a, b in (('"device"', '"devise"'), ("fp-fp", "fp-none"), ("1.5", '"x"')):
        file.write_text(text.replace(a, b, 1))
        with pytest.raises(RunError, match="make the page anew"):
            check(page, results)


def test_an_answer_that_was_changed_changes_the_page(results: Path) -> None:
    folder = folder_of(results, "table2")
    one, other = (folder / f"mini_llava-{m}-w4a4-00000000.json.gz" for m in ("awq", "qlora"))
    one.write_bytes(other.read_bytes())
    assert check(TABLE2, results)


def test_a_page_of_another_wording_is_written_anew(results: Path) -> None:
    file = results / "table2.md"
    text = file.read_text()
    file.write_text(text.replace("accuracy in percent", "accuracy"))
    assert check(TABLE2, results)
    assert main(["--results", str(results), "--write"]) == 0
    assert file.read_text() == text


def test_lines_cells_and_ends_are_compared() -> None:
    page = "# A\n\n| a | b |\n| :- | -: |\n| x | 1 |\n|  | 2 |\n"
    assert differences("p.md", page, page) == []
    assert differences("p.md", page, page.replace("2", "3")) == [
        Difference("p.md, line 6, row x, column b", "2", "3")
    ]
    assert differences("p.md", page, page + "more\n") == [
        Difference("p.md, line 7", "nothing", "more")
    ]
    assert differences("p.md", page, page.replace("| x | 1 |\n", "")) != []
    assert differences("p.md", page, page[:-1]) != []
    table = "a,b,c,d\nx,y,z,1\n"
    assert differences("t.csv", table, table.replace("1", "2")) == [
        Difference("t.csv, line 2, row x y z, column d", "1", "2")
    ]
    assert differences("t.csv", table, "a,b,c,d\n") == [
        Difference("t.csv, line 2", "x, y, z, 1", "nothing")
    ]


def test_records_that_cannot_be_kept_leave_no_answers(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs.parent / "out"
    make_record(runs, "RTN", generated=True)
    assert table2.main(["--runs", str(runs), "--out", str(out)]) == 0
    assert folder_of(out, "table2").is_dir()
    make_record(runs, "AWQ")
    capsys.readouterr()
    assert table2.main(["--runs", str(runs), "--out", str(out)]) == 0
    assert "its problems are not generated" in capsys.readouterr().err
    assert not folder_of(out, "table2").exists()


def test_answers_are_compared_question_by_question(runs: Path) -> None:
    first = make_record(runs, "RTN", generated=True, layers=make_layers("W4A4"))
    again = make_record(runs.parent / "again", "RTN", generated=True)
    assert compare(first, again) == []
    again.predictions.loc[7, "prediction"] = (again.predictions["prediction"][7] + 1) % 2
    (found,) = compare(first, again)
    assert found.place == f"{first.name}, question test-7"
    shorter = make_record(runs.parent / "shorter", "RTN", generated=True, n=100)
    assert compare(first, shorter)[0].printed == "300 questions"


def test_only_methods_of_this_package_are_run_anew(runs: Path) -> None:
    record: Record = make_record(runs, "RTN", generated=True)
    with pytest.raises(RunError, match=r"methods\.RTN is not a method of this package"):
        configuration(record, "results")


def test_only_embedded_models_are_run_anew(runs: Path, tmp_path: Path) -> None:
    """The weights of others are not in the package, and a random choice must not meet them."""
    one = make_record(runs, "RTN", model="smollm2_llava", generated=True)
    sister = make_record(runs, "AWQ", model="mini_llava-seed1", generated=True)
    sister.config["model"]["path"] = "trainings/mini_llava-seed1"
    del one.config["model"]["path"]
    write_answers(tmp_path, [one, sister])
    with pytest.raises(UserError, match="no committed answers of an embedded model"):
        rerun([tmp_path], 2)


def test_every_committed_cell_can_be_run_anew() -> None:
    """Options that are younger than a cell have their defaults. One cell of each set of options."""
    answers = Path(__file__).parents[3] / "results" / "answers"
    configs = {}
    for path in sorted(answers.glob(f"*/*{SUFFIX}")):
        config = json.loads(gzip.decompress(path.read_bytes()))["config"]
        if "path" in config["model"]:  # otherwise its checkpoint is in a folder of one machine
            configs.setdefault(str({part: [*(config.get(part) or [])] for part in PARTS}), config)
    assert len(configs) > 5
    for config in configs.values():
        record: Any = SimpleNamespace(name="committed", config=config)
        assert configuration(record, "elsewhere").model.name == config["model"]["name"]


def test_the_configuration_of_a_cell_is_kept(runs: Path, tmp_path: Path) -> None:
    config = load("method=rtn", "evaluation.limit=60", "device=cpu", f"results_dir={tmp_path}")
    planted = make_record(runs, "RTN", generated=True)
    planted = replace(planted, config={**asdict(config), "seed": 0})
    write_answers(tmp_path / "answers", [planted])
    (committed,) = read_answers(tmp_path / "answers")
    again = configuration(committed, "elsewhere")
    assert again.results_dir == "elsewhere"
    assert influences(again) == influences(config)
    del committed.config["model"]["path"]
    with pytest.raises(RunError, match="its checkpoint is not known here"):
        configuration(committed, "elsewhere")
