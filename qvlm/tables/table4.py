"""Table 4 on the miniatures: what a packed model costs, beside what it answers.

`make table4` runs the cells of `experiment=table4`, whose accuracy comes from packed execution and
whose checkpoints lie in `<results>/packed`, and then this, which measures each of them.

- Time, side by side in one process: full precision and every packed model of one architecture
  answer the same questions, one question at a time, in turn, `--repeats` times. A ratio compares
  two models within a repeat; its spread is that of the repeats.
- Agreement: on how many questions of the whole split packed execution chose the same answer as
  simulated and as exact execution, where such a cell is recorded too, and on which it did not.
- Memory, in a fresh process per model that loads it and answers the same questions: the resident
  set at most, or what the allocator held at most on a GPU.

Full precision is bfloat16, 16 bits as in the paper. It writes `table4.csv` and `table4.md`. Left
out: simulated execution, whose time and memory say nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from qvlm.cell.inputs import find_device
from qvlm.data.scienceqa import PUBLISHED_QUESTIONS, load_scienceqa
from qvlm.errors import RunError, UserError
from qvlm.models.load import load_model
from qvlm.models.loaded import LoadedModel
from qvlm.packing import ORIGIN, kernels_used, read_origin, weight_bytes
from qvlm.planning.footprint import GIB
from qvlm.records.provenance import revision_in_words, surroundings
from qvlm.records.record import Record, find_records
from qvlm.runtime.stages import MIB, Stages
from qvlm.tables.command import write_files
from qvlm.tables.cost import COLUMNS, in_fresh_process, spread
from qvlm.tables.markdown import bullets, table
from qvlm.tables.published import label, published
from qvlm.tables.report import stands_for
from qvlm.tables.selection import FULL_PRECISION, execution, fault, is_draw, select

NOT_PACKED = ("simulated", "exact")


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        record: its cell, which has its accuracy.
        folder: of its checkpoint; an embedded miniature's name for full precision.
        device: where it runs.
        others: the cells of the same method and bits, not packed, by their execution.
    """

    record: Record
    folder: str
    device: str
    others: Mapping[str, Record] = field(default_factory=dict)

    def disagreements(self) -> dict[str, list[str]]:
        """By execution, the questions that it answers otherwise, where all of them were asked."""
        own = self.record.predictions.set_index("question_id")["prediction"].fillna(-1)
        found = {}
        for name, record in self.others.items():
            other = record.predictions.set_index("question_id")["prediction"].fillna(-1)
            if own.index.equals(other.index):
                found[name] = [str(question) for question in own.index[own != other]]
        return found

    def load(self) -> LoadedModel:
        """The model as it is measured: all that is not packed in bfloat16."""
        return load_model(self.folder, self.record.model, device=self.device, dtype="bfloat16")


@dataclass(frozen=True)
class Seconds:
    """What the questions of one repeat took together, and the tokens of their answers."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0

    @property
    def all(self) -> float:
        """From the picture to the last token."""
        return self.vision + self.prefill + self.decode

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.vision + other.vision,
            self.prefill + other.prefill,
            self.decode + other.decode,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class Alone:
    """A model in a process of its own: bytes of the process before it, at most, of its weights."""

    before: float
    peak: float
    weights: int
    kernels: dict[str, int]


@torch.no_grad()
def ask(loaded: LoadedModel, problem: Mapping[str, Any], longest: int) -> Seconds:
    """Times the greedy answer to one problem, of at most `longest` tokens."""
    model = loaded.model
    batch = loaded.encode([problem])
    ids = batch["input_ids"]

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = now()
    embedded = model.get_input_embeddings()(ids)
    if "pixel_values" in batch:
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        embedded[ids == model.config.image_token_id] = torch.cat(tuple(features))
    seen = now()
    cache = DynamicCache()
    step: Callable[..., Any] = partial(model.__call__, past_key_values=cache, logits_to_keep=1)
    token: Tensor = step(inputs_embeds=embedded).logits.argmax(2)
    read = now()
    tokens = 1
    while token.item() != loaded.tokenizer.eos_token_id and tokens < longest:
        token = step(input_ids=token).logits.argmax(2)
        tokens += 1
    return Seconds(seen - begun, read - seen, now() - read, tokens)


def side_by_side(
    subjects: Sequence[Subject], problems: Sequence[Mapping[str, Any]], repeats: int, longest: int
) -> list[list[Seconds]]:
    """For each model, the seconds of each repeat; a repeat before them warms up."""
    models = [subject.load() for subject in subjects]
    found: list[list[Seconds]] = [[] for _ in subjects]
    for repeat in tqdm(range(repeats + 1), subjects[0].record.model, disable=None):
        for loaded, times in zip(models, found, strict=True):
            seconds = sum((ask(loaded, problem, longest) for problem in problems), Seconds())
            if repeat:
                times.append(seconds)
    return found


def alone(subject: Subject, problems: Sequence[Mapping[str, Any]], longest: int) -> Alone:
    """Loads a model, has it answer, and watches the memory of the process."""
    before = 0.0 if subject.device != "cpu" else psutil.Process().memory_info().rss
    with Stages(subject.record.name, 1) as stages, stages.stage("answer"):
        loaded = subject.load()
        for problem in problems:
            ask(loaded, problem, longest)
    cost = stages.costs["answer"]
    peak = cost.get("gpu_peak_mib", cost["peak_mib"]) * MIB
    return Alone(before, peak, weight_bytes(loaded.model), kernels_used(loaded.model))


def find_subjects(results: Path, device: str) -> dict[str, list[Subject]]:
    """By model: full precision, then every packed checkpoint whose cell is recorded and proven.

    Raises:
        UserError: if there is none, or a model's full precision was not recorded.
    """
    records = find_records(results / "runs")
    by_hash = {record.run["hash"]: record for record in records}
    found: dict[str, list[Subject]] = {}
    for folder in sorted(path.parent for path in (results / "packed").glob(f"*/{ORIGIN}")):
        record = by_hash.get(read_origin(folder)["hash"])
        reason = "its cell is not recorded" if record is None else fault(record, {})
        if record is None or reason:
            print(f"warning: refused {folder}: {reason}", file=sys.stderr)
            continue
        found.setdefault(record.model, []).append(Subject(record, str(folder), device))
    if not found:
        raise UserError(
            f"--results: {results} holds no packed models; give the folder that "
            "python run.py -m experiment=table4 writes"
        )
    others = {name: _cells(records, name) for name in NOT_PACKED}
    for model, subjects in found.items():
        full = others["simulated"].get((model, FULL_PRECISION, FULL_PRECISION))
        if full is None:
            raise UserError(f"{model} has no record in full precision: run experiment=table4")
        for index, subject in enumerate(subjects):
            key = (model, subject.record.bits, subject.record.method)
            alike = {name: cells[key] for name, cells in others.items() if key in cells}
            subjects[index] = replace(subject, others=alike)
        subjects.sort(key=lambda s: (-int(s.record.bits.partition("A")[2]), s.record.method))
        subjects.insert(0, Subject(full, full.config["model"]["path"], device))
    return found


def _cells(records: Sequence[Record], name: str) -> dict[tuple[str, ...], Record]:
    """The proven cells of an execution, by model, bits and method."""
    shown = select(records, lambda r: execution(r) == name and not is_draw(r)).shown
    return {(record.model, record.bits, record.method): record for record in shown}


def measure(subjects: Sequence[Subject], given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: those of the CSV, and under other names what only the page shows."""
    data = subjects[0].record.config["data"]
    questions: datasets.Dataset = load_scienceqa(
        data["source"], data["split"], given.questions, data["seed"]
    )
    problems = [questions[row] for row in range(len(questions))]
    longest = subjects[0].record.config["evaluation"]["max_new_tokens"]
    memory = [in_fresh_process(alone, subject, problems, longest) for subject in subjects]
    times = side_by_side(subjects, problems, given.repeats, longest)
    rows = []
    for subject, own, seconds in zip(subjects, memory, times, strict=True):
        record = subject.record
        ratios = [full.all / mine.all for full, mine in zip(times[0], seconds, strict=True)]
        middle = {
            part: statistics.median(getattr(repeat, part) for repeat in seconds) / len(problems)
            for part in ("all", "vision", "prefill", "decode")
        }
        rows.append(
            {
                **dict(model=record.model, bits=record.bits, method=record.method),
                **dict(device=subject.device, threads=torch.get_num_threads()),
                "seconds_per_question": middle["all"],
                **{f"{part}_s": middle[part] for part in ("vision", "prefill", "decode")},
                "tokens_per_s": statistics.median(s.tokens / s.decode for s in seconds),
                "peak_memory_gib": own.peak / GIB,
                "weight_gib": own.weights / GIB,
                "accuracy": record.metrics["classes"]["Avg"]["accuracy"],
                "memory_ratio": memory[0].peak / own.peak,
                "speed_ratio": statistics.median(ratios),
                **dict(speed_ratio_low=min(ratios), speed_ratio_high=max(ratios)),
                "extrapolated": False,
                **_paper(record),
                "ratios": ratios,
                "weights": own.weights,
                "weight ratio": memory[0].weights / own.weights,
                "before": own.before,
                "kernels": own.kernels,
                "disagreements": subject.disagreements(),
                "run": record.run,
                "n": record.metrics["classes"]["Avg"]["n"],
            }
        )
    return rows


def _paper(record: Record) -> dict[str, Any]:
    """What the paper prints for the model that this one stands for."""
    model = stands_for(record)
    if model is None:
        return {}
    printed = published("table4")
    same = printed["model"].eq(model) & printed["bits"].eq(record.bits)
    found = printed[same & printed["method"].eq(record.method)].to_dict("records")
    if not found:
        return {}
    (row,) = found
    return {
        "paper_model": label(model),
        "paper_hours": row["time_hours"],
        "paper_memory_gib": row["memory_gib"],
        "paper_accuracy": row["accuracy"],
    }


def _agreement(row: Mapping[str, Any], other: str) -> str:
    """The share of questions with the answer of another execution, or that nobody compared."""
    if other not in row["disagreements"]:
        return ""
    return f"{100 * (1 - len(row['disagreements'][other]) / row['n']):.2f} %"


def page(rows: Sequence[Mapping[str, Any]], given: argparse.Namespace, device: str) -> str:
    """The Markdown page."""
    parts = [
        "# Table 4: what packed models cost\n\n"
        "Packed execution: the codes themselves are multiplied, no floating-point copy is kept. "
        f"{given.questions} questions, one at a time, all models of a kind in turn, "
        f"{given.repeats} repeats; seconds are medians, the speed-up is that within a repeat: "
        "median (lowest to highest), above 1 is faster than full precision. Full precision is "
        f"bfloat16. *hours* is the time of {PUBLISHED_QUESTIONS:,} questions at this speed. "
        "Peak memory is that of a "
        "fresh process, whose libraries alone take what stands in the last column; at this size "
        "they are nearly all of it, and the weights tell more. Accuracy in percent, of the packed "
        "model on all questions of the test split; that of full precision is float32's. *as "
        "simulated*: questions with the answer of simulated execution, whose sums float32 rounds; "
        "*as exact*: with that of the same cell simulated in float64; where these were recorded."
        "\n\n"
        "Rows that begin with *paper* are what the paper prints for a larger model on a GPU."
    ]
    header = [
        *("bits", "method", "s/question", "vision", "prefill", "decoding", "tokens/s", "hours"),
        *(
            "speed-up",
            "weights MiB",
            "smaller",
            "peak GiB",
            "accuracy",
            *(f"as {other}" for other in NOT_PACKED),
            "without model GiB",
        ),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for row in (row for row in rows if row["model"] == model):
            own = [
                *(row["bits"], row["method"], f"{row['seconds_per_question']:.4f}"),
                *(f"{row[part + '_s']:.4f}" for part in ("vision", "prefill", "decode")),
                f"{row['tokens_per_s']:.0f}",
                f"{row['seconds_per_question'] * PUBLISHED_QUESTIONS / 3600:.3f}",
                spread(row["ratios"]),
                f"{row['weights'] / MIB:.2f}",
                f"{row['weight ratio']:.2f}x",
                f"{row['peak_memory_gib']:.3f}",
                f"{row['accuracy']:.2f}",
                *(_agreement(row, other) for other in NOT_PACKED),
                f"{row['before'] / GIB:.3f}",
            ]
            lines.append(own)
            if "paper_model" in row:
                printed = [""] * len(header)
                printed[0] = row["bits"]
                printed[1] = f"paper, {row['paper_model']}: {row['method']}"
                printed[header.index("hours")] = f"{row['paper_hours']:g}"
                printed[header.index("peak GiB")] = f"{row['paper_memory_gib']:g}"
                printed[header.index("accuracy")] = f"{row['paper_accuracy']:.2f}"
                lines.append(printed)
        parts.append(f"## {model}\n\n{table(header, lines, left=2)}")
    for other in NOT_PACKED:
        differing = [
            f"{row['model']}, {row['bits']}, {row['method']}: {', '.join(questions)}"
            for row in rows
            if (questions := row["disagreements"].get(other))
        ]
        if differing:
            title = f"## Questions that {other} execution answers otherwise"
            parts.append(f"{title}\n\n{bullets(differing)}")
    parts.append(
        "## What it took to make them\n\n"
        "Search is what the method looked for itself, quantization all of it, on the machine and "
        "beside whatever else it did when the cell was computed.\n\n"
        + table(
            ["model", "bits", "method", "search, s", "candidates", "quantization, s", "peak MiB"],
            [
                [
                    *(row["model"], row["bits"], row["method"]),
                    f"{row['run']['report']['search_seconds']:.1f}",
                    str(row["run"]["report"]["candidates"]),
                    f"{row['run']['stages']['quantize']['seconds']:.1f}",
                    f"{row['run']['stages']['quantize']['peak_mib']:.0f}",
                ]
                for row in rows
                if "quantize" in row["run"]["stages"]
            ],
            left=3,
        )
    )
    kernels = [
        f"{row['model']} {row['bits']} {row['method']} "
        + ", ".join(f"{name} {calls}" for name, calls in sorted(row["kernels"].items()))
        for row in rows
        if row["kernels"]
    ]
    about = surroundings()
    machine, versions = about["hardware"], about["versions"]
    parts.append(
        bullets(
            [
                "Command: `make table4`",
                f"Calls of packed products for these questions: {'; '.join(kernels)}",
                f"Device: {device}; {machine['cpu']}, {torch.get_num_threads()} threads, "
                f"{machine['memory_gib']} GiB"
                + (f"; {machine['gpu']}" if device != "cpu" else "; GPU: not measured"),
                f"Questions behind each accuracy: {sorted({row['n'] for row in rows})}",
                f"Versions: python {versions['python']}, torch {versions['torch']}, transformers "
                f"{versions['transformers']}",
                f"Revision: {revision_in_words(about['git'])}",
            ]
        )
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="runs and packed")
    parser.add_argument("--out", type=Path, help="where to write (default: --results)")
    parser.add_argument("--questions", type=int, default=16, help="asked in each repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    out = given.out or given.results
    try:
        if given.questions < 1 or given.repeats < 1:
            raise UserError("--questions, --repeats: give at least 1")
        device = find_device(given.device)
        found = find_subjects(given.results, device)
        rows = [row for subjects in found.values() for row in measure(subjects, given)]
        text = page(rows, given, device)
        frame = pd.DataFrame([{key: row.get(key) for key in COLUMNS} for row in rows])
        csv = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_files({out / "table4.csv": csv, out / "table4.md": text})
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
