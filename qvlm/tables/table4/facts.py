"""What was measured for Table 4, as committed beside it, and the rows that follow from it.

The rows are a pure function of these facts and of records, so `make verify` makes them again.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm.planning.footprint import GIB
from qvlm.records.record import Record
from qvlm.tables.cost import paper_columns
from qvlm.tables.published import paper_model

NOT_PACKED = ("simulated",)  # the other executions that answers are compared with


@dataclass(frozen=True)
class RepeatTimes:
    """Seconds that the questions of one repeat took together.

    Attributes:
        vision: Seconds of the vision tower and the projector.
        prefill: Seconds of reading the prompts.
        decode: Seconds of generating the answers.
        tokens: Number of generated tokens.
    """

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0

    @property
    def all(self) -> float:
        """Seconds from the image to the last token."""
        return self.vision + self.prefill + self.decode

    def __add__(self, other: "RepeatTimes") -> "RepeatTimes":
        return RepeatTimes(
            self.vision + other.vision,
            self.prefill + other.prefill,
            self.decode + other.decode,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class Alone:
    """A model in a process of its own.

    Attributes:
        before: Resident bytes of the process without a model; 0 on a GPU.
        peak: Peak bytes of the process, or of the GPU's allocator, while the model answers.
        weights: Bytes of the model's weights.
        kernels: Number of calls of packed products, by kernel.
    """

    before: float
    peak: float
    weights: int
    kernels: dict[str, int]


@dataclass(frozen=True)
class Timed:
    """What was measured of one model.

    Attributes:
        run: Name of the record of its cell.
        others: Names of the records of the same method and bit widths that are not packed, by
            execution.
        repeats: Times of each repeat.
        alone: Memory of the model in a process of its own.
    """

    run: str
    others: dict[str, str]
    repeats: list[RepeatTimes]
    alone: Alone


@dataclass(frozen=True)
class Facts:
    """Everything that was measured for the page, and on what.

    Attributes:
        questions: Number of questions asked in each repeat.
        repeats: Number of timed repeats.
        device: Device on which the models ran.
        threads: Number of PyTorch's CPU threads.
        hardware: Processor, memory and GPU (see `qvlm.records.environment.hardware`).
        versions: Versions of Python and packages.
        revision: Commit of the code in words.
        models: Models of each architecture, full precision first.
    """

    questions: int
    repeats: int
    device: str
    threads: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    revision: str
    models: list[list[Timed]]


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    Attributes:
        record: Record of the cell.
        columns: Row of the CSV.
        ratios: Speed-up over full precision in each repeat.
        alone: Memory of the model.
        weight_ratio: Weight bytes of full precision over those of the model.
        disagreements: See `Subject.disagreements`.
    """

    record: Record
    columns: dict[str, Any]
    ratios: list[float]
    alone: Alone
    weight_ratio: float
    disagreements: dict[str, list[str]]


def disagreements(record: Record, others: Mapping[str, Record]) -> dict[str, list[str]]:
    """Returns the questions that a record answers differently from other executions.

    Args:
        record: Record of a packed cell.
        others: Records of the same method and bit widths, by execution.

    Returns:
        Question ids by execution. An execution that was not asked all of the same questions is
        absent.
    """
    own = record.predictions.set_index("question_id")["prediction"].fillna(-1)
    found = {}
    for name, other_record in others.items():
        other = other_record.predictions.set_index("question_id")["prediction"].fillna(-1)
        if own.index.equals(other.index):
            found[name] = [str(question) for question in own.index[own != other]]
    return found


def rows_of(facts: Facts, records: Mapping[str, Record]) -> list[Measured]:
    """Returns the rows of the table.

    Args:
        facts: What was measured.
        records: Records that the facts name, by name.

    Raises:
        KeyError: If a record is missing.
    """
    return [row for models in facts.models for row in _architecture(facts, models, records)]


def _architecture(
    facts: Facts, models: Sequence[Timed], records: Mapping[str, Record]
) -> list[Measured]:
    full = models[0]
    found = []
    for own in models:
        record = records[own.run]
        pairs = zip(full.repeats, own.repeats, strict=True)
        ratios = [reference.all / repeat.all for reference, repeat in pairs]
        columns = {
            **dict(model=record.model, bits=record.bits, method=record.method),
            **dict(device=facts.device, threads=facts.threads),
            **_time_columns(own.repeats, facts.questions),
            "peak_memory_gib": own.alone.peak / GIB,
            "weight_gib": own.alone.weights / GIB,
            "accuracy": record.metrics["classes"]["Avg"]["accuracy"],
            "memory_ratio": full.alone.peak / own.alone.peak,
            "speed_ratio": statistics.median(ratios),
            **dict(speed_ratio_low=min(ratios), speed_ratio_high=max(ratios)),
            "extrapolated": False,
            **paper_columns(paper_model(record), record.bits, record.method),
        }
        others = {name: records[other] for name, other in own.others.items()}
        ratio = full.alone.weights / own.alone.weights
        differing = disagreements(record, others)
        found.append(Measured(record, columns, ratios, own.alone, ratio, differing))
    return found


def _time_columns(repeats: Sequence[RepeatTimes], questions: int) -> dict[str, float]:
    """Returns the medians over the repeats, in seconds per question."""

    def median(part: str) -> float:
        return statistics.median(getattr(repeat, part) for repeat in repeats) / questions

    return {
        "seconds_per_question": median("all"),
        **{f"{part}_s": median(part) for part in ("vision", "prefill", "decode")},
        "tokens_per_s": statistics.median(repeat.tokens / repeat.decode for repeat in repeats),
    }
