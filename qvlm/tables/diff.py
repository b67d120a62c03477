"""`python -m qvlm diff RUN RUN`: why two runs differ, and in which answers.

A run is the folder of a record, or a file of committed answers. The command compares what
identifies the records (configuration, code, weights and data), what they ran on (versions,
hardware), what their layers prove, and their answers, question by question. Of runs on plain text
and on tasks it compares the measures.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qvlm.command import run_command
from qvlm.data.prompts import LETTERS
from qvlm.errors import UserError
from qvlm.evaluation.metrics import mcnemar, paired_difference
from qvlm.evaluation.scores import scores
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.answers import SUFFIX, UNPARSABLE, letters_of, read_one
from qvlm.tables.report import number, p_value, paired_interval, signed
from qvlm.validation import shown

# Parts of run.json, by the title under which they are compared.
_PARTS = {
    "Configuration": ("influences",),
    "Code": ("code", "git"),
    "Weights and data": ("files_hashed",),
    "Versions": ("versions",),
    "Hardware": ("hardware", "device", "threads", "processes", "kernels"),
    "Calibration": ("calibration", "uncalibrated"),
}
_LONGEST = 12  # hexadecimal digits of a hash that are shown


def explain(first: Record, second: Record, most: int | None = None) -> str:
    """Returns what differs between two runs, as Markdown.

    Args:
        first: One run.
        second: Another run.
        most: Number of questions to list; None lists all.
    """
    same = first.run["hash"] == second.run["hash"]
    parts = [
        f"# {first.name} and {second.name}",
        "Both are records of the same cell." if same else "They are records of different cells.",
    ]
    equal = []
    for title, keys in _PARTS.items():
        sides = ({key: record.run.get(key) for key in keys} for record in (first, second))
        rows = _unlike(*sides)
        if rows:
            parts += [f"## {title}", table(["", "first", "second"], rows, left=3)]
        else:
            equal.append(title)
    if equal:
        parts.insert(2, f"The same in both: {', '.join(equal).lower()}.")
    layers = _layers(first, second)
    if layers:
        parts += ["## Proof of bits", layers]
    if first.kind == second.kind == "problems":
        parts += ["## Answers", *_answers(first, second, most)]
    else:
        parts += ["## Measures", _measures(first, second)]
    return "\n\n".join(parts)


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each value that two nested mappings do not share."""
    first, second = _flat(a), _flat(b)
    return [
        [key, _shown(first.get(key)), _shown(second.get(key))]
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, str):
        hexadecimal = len(value) >= 40 and set(value) <= set("0123456789abcdef")
        return value[:_LONGEST] if hexadecimal else value
    if value is None:
        return "-"
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _layers(first: Record, second: Record) -> str:
    """Returns the table of the layers whose levels differ, or ""."""
    sides = [{row["layer"]: row for row in record.layers} for record in (first, second)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        levels = [
            f"{side[name]['weight_levels']} / {side[name]['input_levels']}" if name in side else "-"
            for side in sides
        ]
        if levels[0] != levels[1]:
            rows.append([name, *levels])
    return table(["layer, levels of weights / inputs", "first", "second"], rows) if rows else ""


def _measures(first: Record, second: Record) -> str:
    """Returns the table of what two runs measured that are not both on problems."""
    sides = [_measured(record) for record in (first, second)]
    names = dict.fromkeys([*sides[0], *sides[1]])
    rows = [[name, *(side.get(name, "-") for side in sides)] for name in names]
    return table(["measure", "first", "second"], rows)


def _measured(record: Record) -> dict[str, str]:
    if record.kind == "tasks":
        found = scores(record.metrics["tasks"]["results"])
        return {f"{task}, {metric}": f"{value:.6g}" for task, metric, value, _ in found}
    if record.kind == "text":
        text = record.metrics["text"]
        known = [name for name in ("perplexity", "kl", "agreement") if text.get(name) is not None]
        return {name: f"{text[name]['value']:.6g}" for name in known}
    return {"accuracy, %": number(record.metrics["classes"]["Avg"]["accuracy"])}


def _answers(first: Record, second: Record, most: int | None) -> list[str]:
    """Returns the comparison of the answers to the questions that both were asked."""
    sides = []
    for record in (first, second):
        frame = record.predictions.assign(letter=list(letters_of(record)))
        sides.append(frame.set_index("question_id"))
    if not all(side.index.is_unique for side in sides):
        raise UserError("A run has a question twice, so its answers cannot be compared.")
    shared = sides[0].index.intersection(sides[1].index)
    a, b = (side.loc[shared] for side in sides)
    sizes = [len(side) for side in sides]
    if not len(shared) or list(a["answer"]) != list(b["answer"]):
        return [f"The two were not asked the same questions ({sizes[0]} and {sizes[1]})."]
    differing = a["letter"] != b["letter"]
    difference = paired_difference(a["correct"], b["correct"])
    test = mcnemar(a["correct"], b["correct"])
    neither = differing & ~a["correct"] & ~b["correct"]
    unparsable = ((side["letter"] == UNPARSABLE).sum() for side in (a, b))
    share = 100 * differing.mean()
    sentences = [
        f"Questions asked of both: {len(shared)}"
        + ("" if sizes == [len(shared)] * 2 else f", of {sizes[0]} and {sizes[1]}"),
        f"Accuracy: {100 * a['correct'].mean():.2f} and {100 * b['correct'].mean():.2f} %, "
        f"difference {signed(difference.difference)} points ({paired_interval(difference)})",
        f"Answers that differ: {int(differing.sum())} ({share:.2f} %)",
        f"Right in the first only: {test.only_a}, in the second only: {test.only_b}, in neither "
        f"though they differ: {int(neither.sum())} "
        f"(exact McNemar test, p = {p_value(test.p_value)})",
        f"Unparsable: {' and '.join(str(int(count)) for count in unparsable)}",
    ]
    parts = [bullets(sentences)]
    rows = _rows(a[differing], b[differing])
    if rows:
        parts.append(table(["question", "skill", "first", "second", "right"], rows[:most], left=2))
    if most is not None and len(rows) > most:
        parts.append(f"{len(rows) - most} more differ. `--all` lists them.")
    return parts


def _rows(a: pd.DataFrame, b: pd.DataFrame) -> list[list[str]]:
    skills = a["skill"] if "skill" in a else [""] * len(a)
    return [
        [str(question), str(skill), own, other, LETTERS[right]]
        for question, skill, own, other, right in zip(
            a.index, skills, a["letter"], b["letter"], a["answer"], strict=True
        )
    ]


def load(path: Path) -> Record:
    """Reads a run.

    Args:
        path: Folder of a record, or a file of committed answers.

    Raises:
        UserError: If there is no such run.
        RunError: If it is damaged.
    """
    if path.is_dir():
        return Record.load(path)
    if path.is_file() and path.name.endswith(SUFFIX):
        return read_one(path)
    raise UserError(
        f"{path} is not a run. Give the folder of a record, such as results/runs/NAME, or a file "
        "of results/answers."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qvlm diff", description="Says why two runs differ, and in which answers."
    )
    parser.add_argument("first", type=Path, metavar="RUN", help="folder of a record")
    parser.add_argument("second", type=Path, metavar="RUN", help="another one")
    parser.add_argument("--all", action="store_true", help="list every answer that differs")

    def work(options: argparse.Namespace) -> None:
        most = None if options.all else 20
        print(explain(load(options.first), load(options.second), most))

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
