"""Questions as ScienceQA asks them: short, half of them without an image, with long answers.

Q-VLM's questions have 60 tokens of text on average, and 48 % of ScienceQA's test questions have an
image. The published answers of the paper's checkpoint have 205 tokens on average.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qvlm.data.sizes import PUBLISHED_QUESTIONS
from qvlm.markdown import table
from qvlm.tables.cost import median_and_range
from qvlm.tables.table4_scale.clock import Clock, QuestionTimes, ask

TEXT_TOKENS = 60
IMAGE_SHARE = 0.48
ANSWER_TOKENS = 205

NOTE = f"""\
Questions as ScienceQA asks them: {TEXT_TOKENS} tokens of text, {100 * IMAGE_SHARE:.0f} % with an
image, and answers of {ANSWER_TOKENS} tokens, which are averages of the test split and of the
published answers of the paper's checkpoint. Both kinds of question were timed side by side like
the ratios above, one at a time, and weighted by their shares. Every token of the answer counts as
much as the first ones after the prompt. Hours are for {PUBLISHED_QUESTIONS:,} questions."""


@dataclass(frozen=True)
class Mixture:
    """Times of both kinds of question.

    Attributes:
        with_image: Times of a question with an image.
        without_image: Times of a question of text alone; its `vision` is zero.
    """

    with_image: QuestionTimes
    without_image: QuestionTimes

    @property
    def question(self) -> float:
        """Seconds of the average question."""
        return IMAGE_SHARE * _seconds(self.with_image) + (1 - IMAGE_SHARE) * _seconds(
            self.without_image
        )


def _seconds(times: QuestionTimes) -> float:
    return times.vision + times.prefill + ANSWER_TOKENS * times.token


def ask_both(clock: Clock, image_tokens: int, tokens: int) -> Mixture:
    """Times a question with an image and one without.

    Args:
        clock: Clock of the model.
        image_tokens: Number of tokens of an image.
        tokens: Number of tokens of each answer that are timed.
    """
    return Mixture(
        ask(clock, image_tokens + TEXT_TOKENS, tokens),
        ask(clock, TEXT_TOKENS, tokens, image=False),
    )


def mixture_table(
    names: Sequence[str],
    full: Sequence[Sequence[Mixture]],
    own: Sequence[Sequence[Mixture]],
    rows: Sequence[Sequence[str]],
    paper_hours: Sequence[float | None],
) -> str:
    """Returns the table of average questions.

    Args:
        names: Headings of the first columns.
        full: Times in bf16 in each repeat, for each row.
        own: Times of the row's own form in each repeat.
        rows: First cells of each row.
        paper_hours: Hours that the paper prints for the row, or None.
    """
    lines = []
    for cells, before, repeats, hours in zip(rows, full, own, paper_hours, strict=True):
        seconds = statistics.median(each.question for each in repeats)
        ratios = [a.question / b.question for a, b in zip(before, repeats, strict=True)]
        parts = (
            statistics.median(each.with_image.vision + each.with_image.prefill for each in repeats),
            statistics.median(each.without_image.prefill for each in repeats),
            1 / statistics.median(each.with_image.token for each in repeats),
            1 / statistics.median(each.without_image.token for each in repeats),
            seconds,
            seconds * PUBLISHED_QUESTIONS / 3600,
        )
        lines.append(
            [
                *cells,
                *(f"{part:.2f}" for part in parts),
                median_and_range(ratios),
                "" if hours is None else f"{hours:.2f}",
            ]
        )
    header = [*names, "to first token s, image", "without", "tokens/s, image", "without"]
    header += ["s/question", "hours", "faster than bf16", "paper h"]
    return table(header, lines, left=3)
