"""`python -m qvlm gate RUN`: is this full-precision run the checkpoint of the paper?

A quantized row means something only if full precision is right. That accuracy lies in an interval
is a weak sign: LLaVA-v0-13B, another training, has 90.92 % on ScienceQA and LLaVA-v1.3-13B 91.09 %,
but they choose differently on 8.4 % of the questions. The published answers of the checkpoint allow
a sharper test, question by question: the share of questions on which the run chooses as published.

Thresholds. The published answers were sampled at temperature 0.2, and a run decodes greedily, so
even the right checkpoint does not agree everywhere.

- Sampling at temperature T takes the choice of probability c with c^(1/T) / (c^(1/T) +
  (1-c)^(1/T)), if there are two. At T = 0.2 and c = 0.69 that is 0.98: only questions on which the
  model is undecided can change. If the confidences of a calibrated model are 1, or uniform between
  1/2 and 1, then its share of wrong answers e fixes the expected share of changed answers: 0.27 e,
  which is 2.4 % for the 8.9 % of LLaVA-v1.3-13B.
- Measured on the miniatures, 4,000 questions of an earlier test split, greedy against one sample at
  temperature 0.2: mini_llava changed 3.0 % of its answers with 9.0 % wrong, mini_moe_llava 5.4 %
  with 13.6 % wrong. That is 0.33 e and 0.39 e, which gives 3.0 and 3.5 % for LLaVA-v1.3-13B.
- `EXPLAINED`: 3.5 % of changes, and three standard errors more for 4,241 questions, leave 95.6 %.
  Below that, sampling does not explain the difference, and the run is not believed.
- `BELIEVED`: at 98 % the run changes at most 84 answers. If these are as often for the better as
  for the worse, accuracy moves by at most 0.42 points (95 %), which is half of the smallest gain of
  Q-VLM over a baseline in the paper's Table 2 for this model (0.83 points). Such a run is believed.
- Between the two, the answer depends on how decided the checkpoint is, which nobody has measured.
  `--sampled RUN` settles it: a second run of the same checkpoint at temperature 0.2. Its agreement
  with the greedy run is what to expect of the published answers.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import NormalDist

import pandas as pd

from qvlm.command import run_command
from qvlm.errors import RunError, UserError
from qvlm.evaluation.metrics import CLASSES, PairedDifference, paired_difference, wilson
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.published_answers import BEHIND, CHECKPOINTS, published_predictions
from qvlm.tables.report import number, paired_interval, signed

TEMPERATURE = 0.2  # at which the published answers were sampled
BELIEVED = 98.0  # percent of the questions
EXPLAINED = 95.6
_REFUSED = 0.01  # share of right runs that the comparison with a sampled run refuses


@dataclass(frozen=True)
class ClassRow:
    """A class of questions in a run and in the published answers.

    Attributes:
        name: Name of the class.
        n: Number of questions.
        same: Number of questions with the published choice, or unparsable in both.
        accuracy: Accuracy of the run in percent.
        published: Accuracy of the published answers in percent.
        difference: Accuracy of the run minus the published one. The intervals of all classes hold
            together.
    """

    name: str
    n: int
    same: int
    accuracy: float
    published: float
    difference: PairedDifference

    @property
    def agreement(self) -> float:
        """Share of questions with the published choice, in percent."""
        return 100 * self.same / self.n

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.difference.low > 0 or self.difference.high < 0


def beside_published(record: Record, checkpoint: str) -> pd.DataFrame:
    """Joins the predictions of a record with the published answers.

    Questions are joined by the authors' ids where the record has them, else by their place in the
    test split. The right answers must be the same, which another order of the questions would not
    survive.

    Args:
        record: Record of a run on ScienceQA's test split, or on a part of it.
        checkpoint: One of `CHECKPOINTS`.

    Returns:
        The predictions of the record with two more columns: `published`, the published choice or
        missing, and `published_correct`.

    Raises:
        UserError: If the record has other questions than the published test split.
    """
    known = published_predictions(checkpoint)
    own = record.predictions
    named = "official_id" in own and own["official_id"].notna().all()
    key = "official_id" if named else "question_id"
    known = known.set_index(key)
    ids = own[key].astype(str)
    strange = ids[~ids.isin(known.index)]
    if len(strange) or ids.duplicated().any():
        first = strange.iloc[0] if len(strange) else ids[ids.duplicated()].iloc[0]
        raise UserError(
            f"{record.name}: {first} is not a question of ScienceQA's test split, or is there "
            "twice. Give a run with data=scienceqa or data=official, split test."
        )
    known = known.loc[ids.tolist()].reset_index()
    other = own["answer"].to_numpy() != known["answer"].to_numpy()
    if other.any():
        raise UserError(
            f"{record.name}: {other.sum()} questions have another right answer than published, the "
            f"first is {ids[other].iloc[0]}. Give a run on the published test split, in its order."
        )
    return own.reset_index(drop=True).assign(
        published=known["prediction"], published_correct=known["correct"]
    )


def class_rows(joined: pd.DataFrame) -> list[ClassRow]:
    """Compares a run with the published answers, class by class.

    Args:
        joined: Frame of `beside_published`.

    Returns:
        A row per class that has questions, Avg last.
    """
    members = {name: joined[of(joined)] for name, of in CLASSES.items()}
    members = {name: frame for name, frame in members.items() if len(frame)}
    return [
        ClassRow(
            name,
            len(frame),
            int(_same(frame["prediction"], frame["published"]).sum()),
            100 * float(frame["correct"].mean()),
            100 * float(frame["published_correct"].mean()),
            paired_difference(frame["correct"], frame["published_correct"], len(members)),
        )
        for name, frame in members.items()
    ]


def least_agreement(greedy: pd.DataFrame, sampled: pd.DataFrame) -> float:
    """Returns the least agreement with published answers that sampling explains, in percent.

    A greedy run agrees with its own sampled run on a share a of n questions. For the published
    answers, another sample, the share has the same expectation, and the difference of the two has
    a standard deviation of at most sqrt(2 a (1 - a) / n).

    Args:
        greedy: Predictions of the greedy run.
        sampled: Predictions of a run of the same checkpoint at temperature 0.2.

    Raises:
        UserError: If the two were not asked the same questions.
    """
    a, b = (frame.set_index("question_id")["prediction"] for frame in (greedy, sampled))
    if not a.index.sort_values().equals(b.index.sort_values()):
        raise UserError("--sampled: it was not asked the questions of RUN. Give such a run.")
    share = float(_same(a, b.loc[a.index]).mean())
    deviation = sqrt(2 * share * (1 - share) / len(a))
    return 100 * (share - NormalDist().inv_cdf(1 - _REFUSED) * deviation)


def verdict(agreement: float, questions: int, least: float | None = None) -> tuple[bool, str]:
    """Returns whether quantized rows may be believed, and why in one sentence.

    Args:
        agreement: Share of questions with the published choice, in percent.
        questions: Number of questions of the run.
        least: Result of `least_agreement`, or None without a sampled run.
    """
    whole = len(published_predictions(next(iter(CHECKPOINTS))))
    if questions < whole:
        return False, f"undecided: the run has {questions} of the {whole} questions"
    if agreement >= BELIEVED:
        return True, f"believed: {agreement:.2f} % agree, at least {BELIEVED:g} % are asked for"
    if least is not None:
        words = f"{agreement:.2f} % agree, and sampling explains any share from {least:.2f} %"
        return agreement >= least, f"{'' if agreement >= least else 'not '}believed: {words}"
    if agreement >= EXPLAINED:
        return False, (
            f"undecided: {agreement:.2f} % agree, less than {BELIEVED:g} %, which sampling may "
            "explain; run the checkpoint with evaluation.temperature=0.2 and give it as --sampled"
        )
    return False, (
        f"not believed: {agreement:.2f} % agree, and sampling leaves at least {EXPLAINED:g} %; "
        "look for a fault of checkpoint, prompt or images"
    )


def report(joined: pd.DataFrame, checkpoint: str) -> str:
    """Returns the comparison as text.

    Args:
        joined: Frame of `beside_published`.
        checkpoint: Checkpoint whose answers were published.
    """
    rows = class_rows(joined)
    lines = [
        [
            *(row.name, str(row.n), number(row.agreement), number(row.accuracy)),
            *(number(row.published), signed(row.difference.difference)),
            *(paired_interval(row.difference), "differs" if row.differs else ""),
        ]
        for row in rows
    ]
    header = ["class", "questions", "agree, %", "this run", "published", "difference"]
    changed = joined[~_same(joined["prediction"], joined["published"])]
    ours, theirs = changed["correct"], changed["published_correct"]
    low, high = wilson(int(joined["published_correct"].sum()), len(joined))
    notes = [
        f"Published answers: {CHECKPOINTS[checkpoint]}, sampled at temperature 0.2",
        f"The 95 % Wilson interval around their accuracy: {100 * low:.2f} to {100 * high:.2f}",
        f"Other choices: {len(changed)}, of which {int(ours.sum())} only this run has right, "
        f"{int(theirs.sum())} only the published answers, {int((~ours & ~theirs).sum())} neither",
        f"Unparsable: {int(joined['prediction'].isna().sum())} here, "
        f"{int(joined['published'].isna().sum())} as published",
    ]
    return f"{table([*header, '95 % interval', ''], lines)}\n\n{bullets(notes)}"


def _same(a: pd.Series, b: pd.Series) -> pd.Series:
    """Returns whether two series of choices are equal, an unparsable one to another."""
    first, second = (series.astype("Int64").fillna(-1) for series in (a, b))
    return (first == second).astype(bool)


def _full_precision(path: Path, checkpoint: str | None) -> tuple[Record, str]:
    """Loads a run, and finds the checkpoint that it is compared with."""
    record = Record.load(path)
    _require_problems(record)
    if not record.bit_widths.is_full_precision:
        raise UserError(f"{record.name} is not a run in full precision. Give the run of method=fp.")
    found = checkpoint or BEHIND.get(str(record.config["model"].get("stands_for")))
    if found is None:
        raise UserError(
            f"{record.name}: {record.model} is not a checkpoint with published answers. Give "
            f"--published with one of: {', '.join(CHECKPOINTS)}."
        )
    return record, found


def _require_problems(record: Record) -> None:
    if record.kind != "problems":
        raise UserError(
            f"{record.name} has no answers to problems, but is a run on {record.kind}. Give a run "
            "with data=scienceqa or data=official."
        )


def _require_sampled(sampled: Record, greedy: Record) -> None:
    """Refuses a run whose answers say nothing about how far sampling alone changes them."""
    _require_problems(sampled)
    own, other = (
        (record.run["files_hashed"].get("model"), record.run["influences"]["model"])
        for record in (sampled, greedy)
    )
    if own != other or not sampled.bit_widths.is_full_precision:
        raise UserError(
            "--sampled: it is not a run of the same model in full precision. Give such a run."
        )
    temperature = sampled.run["influences"]["evaluation"].get("temperature", 0.0)
    if temperature != TEMPERATURE:
        raise UserError(
            f"--sampled: it is a run at temperature {temperature:g}, and the published answers are "
            f"of {TEMPERATURE:g}. Give a run with evaluation.temperature={TEMPERATURE:g}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 only if quantized rows may be believed."""
    parser = argparse.ArgumentParser(
        prog="python -m qvlm gate",
        description="Compares a full-precision run with the checkpoint's published answers.",
    )
    parser.add_argument("run", type=Path, help="folder of the record, such as results/runs/NAME")
    parser.add_argument(
        "--published",
        metavar="CHECKPOINT",
        help=f"whose answers to compare with: {', '.join(CHECKPOINTS)} (default: the model's)",
    )
    parser.add_argument(
        "--sampled", type=Path, metavar="RUN", help="a run of the same model at temperature 0.2"
    )

    def work(options: argparse.Namespace) -> None:
        record, checkpoint = _full_precision(options.run, options.published)
        joined = beside_published(record, checkpoint)
        least = None
        if options.sampled:
            sampled = Record.load(options.sampled)
            _require_sampled(sampled, record)
            least = least_agreement(record.predictions, sampled.predictions)
        print(report(joined, checkpoint))
        average = class_rows(joined)[-1]
        believed, words = verdict(average.agreement, average.n, least)
        if not believed:
            raise RunError(f"Quantized rows are {words}.")
        print(f"\nQuantized rows may be {words}.")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
