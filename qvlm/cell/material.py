"""What a cell evaluates on, in the one form that its line needs: problems, text, or tasks.

The line asks for batches to calibrate on and to prove the bits on, for the evaluation, and for what
a comparison with full precision needs of the model before it is quantized.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import datasets
from torch import Tensor

from qvlm.cell import inputs, references, text
from qvlm.cell.identity import Cell
from qvlm.config.schema import RunConfig
from qvlm.evaluation.adapter import Watch
from qvlm.evaluation.divergence import Reference, answer_passages
from qvlm.evaluation.evaluator import Evaluation, evaluate
from qvlm.evaluation.tasks import evaluate_tasks, load_tasks, require_readable
from qvlm.evaluation.text import SavedStates, evaluate_text
from qvlm.models.loaded import LoadedModel
from qvlm.packing import kernels_used
from qvlm.quantization import batch_by_length

PROOF_PROBLEMS = 16

Batches = list[dict[str, Tensor]]
"""Keyword arguments of the model's forward, one mapping per call."""


class Material(Protocol):
    """What a cell evaluates on."""

    @property
    def problems(self) -> datasets.Dataset | None:
        """Problems that are answered, or None for text and tasks."""
        ...

    @property
    def compares(self) -> bool:
        """Whether the evaluation compares with full precision, and so needs `refer`."""
        ...

    @property
    def referred(self) -> bool:
        """Whether `compare` has something to add to the evaluation."""
        ...

    def calibration(self) -> tuple[Batches, list[int]]:
        """Draws batches to calibrate on, and returns which rows of their split they are."""
        ...

    def proof(self) -> Batches:
        """Makes batches to count levels on."""
        ...

    def refer(self, cell: Cell) -> None:
        """Takes what a comparison needs of the model in full precision, while it is that."""
        ...

    def evaluate(self, cell: Cell, answers: Path | None, watch: Watch | None) -> Evaluation:
        """Evaluates the model as it is now; `answers` is a folder to resume from."""
        ...

    def compare(self, evaluation: Evaluation) -> Evaluation:
        """Adds the comparison with full precision to an evaluation."""
        ...


def load_material(config: RunConfig, loaded: LoadedModel) -> Material:
    """Loads what a cell evaluates on.

    Raises:
        UserError: If it cannot be loaded.
    """
    if config.tasks.names:
        return _Tasks(config, loaded)
    return _Texts(config, loaded) if config.on_text else _Problems(config, loaded)


def calibration_batches(config: RunConfig, loaded: LoadedModel) -> tuple[Batches, list[int]]:
    """Draws the batches to calibrate on; see `Material.calibration`.

    Raises:
        UserError: If the split has too few rows.
    """
    if config.on_text:
        return text.draw_rows(config, loaded)
    samples, ids = inputs.draw_calibration(config, loaded.reads_images)
    return batch_by_length(loaded, samples, config.calibration.batch_size), ids


class _Problems:
    """Problems in ScienceQA's schema, of which a model without a tower gets those without image."""

    def __init__(self, config: RunConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.loaded = loaded
        self.problems = inputs.load_problems(config, loaded.reads_images)
        self.compares = inputs.compared_problems(config) > 0
        self._reference: Reference | None = None

    @property
    def referred(self) -> bool:
        return self._reference is not None

    def calibration(self) -> tuple[Batches, list[int]]:
        return calibration_batches(self.config, self.loaded)

    def proof(self) -> Batches:
        size = self.config.calibration.batch_size
        some = [self.problems[row] for row in range(min(PROOF_PROBLEMS, len(self.problems)))]
        return [
            self.loaded.encode(some[start : start + size], with_target=True)
            for start in range(0, len(some), size)
        ]

    def refer(self, cell: Cell) -> None:
        count = min(inputs.compared_problems(self.config), len(self.problems))
        passages = answer_passages(self.loaded, [self.problems[row] for row in range(count)])
        size = self.config.calibration.batch_size
        file = references.file_of(self.config, cell.files_hashed, passages)
        self._reference = Reference(self.loaded, passages, size, file)

    def evaluate(self, cell: Cell, answers: Path | None, watch: Watch | None) -> Evaluation:
        options: dict[str, Any] = asdict(self.config.evaluation)
        for option in ("limit", "window", "kl_problems"):  # the problems are limited already
            del options[option]
        options["watch"] = watch
        if self.config.packed:
            options["observe"] = kernels_used
        return evaluate(
            self.loaded, self.problems, seed=self.config.seed, answers=answers, **options
        )

    def compare(self, evaluation: Evaluation) -> Evaluation:
        assert self._reference is not None
        compared = evaluation.with_divergence(self._reference.divergence(self.loaded))
        self._reference.keep()
        return compared


class _Texts:
    """Documents, whose tokens are predicted. The evaluation itself compares token by token."""

    problems = None
    compares = True
    referred = False

    def __init__(self, config: RunConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.loaded = loaded
        self.windows = text.score_windows(config, loaded, text.load_texts(config))
        self._reference: SavedStates | None = None

    def calibration(self) -> tuple[Batches, list[int]]:
        return calibration_batches(self.config, self.loaded)

    def proof(self) -> Batches:
        return text.proof_rows(self.windows, self.loaded)

    def refer(self, cell: Cell) -> None:
        files = cell.files_hashed
        self._reference = text.reference_of(self.config, files, self.loaded, self.windows)

    def evaluate(self, cell: Cell, answers: Path | None, watch: Watch | None) -> Evaluation:
        if self._reference is None:  # full precision itself, or a model that was packed before
            self.refer(cell)
        observe = kernels_used if self.config.packed else None
        is_reference = self.config.full_precision
        found = evaluate_text(self.loaded, self.windows, self._reference, observe, is_reference)
        if self._reference is not None:
            self._reference.keep()
        return found

    def compare(self, evaluation: Evaluation) -> Evaluation:
        return evaluation


class _Tasks:
    """Tasks of lm-eval. The bits are proven on some of the batches to calibrate on."""

    problems = None
    compares = False
    referred = False

    def __init__(self, config: RunConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.loaded = loaded
        options = config.tasks
        self.tasks = load_tasks(
            options.names,
            options.include_path,
            options.num_fewshot,
            _settings(config),
            {"folder": options.folder},
        )
        require_readable(loaded, self.tasks)

    def calibration(self) -> tuple[Batches, list[int]]:
        return calibration_batches(self.config, self.loaded)

    def proof(self) -> Batches:
        few: Batches = []
        for batch in self.calibration()[0]:
            if sum(len(other["input_ids"]) for other in few) < PROOF_PROBLEMS:
                few.append(batch)
        return few

    def refer(self, cell: Cell) -> None:
        raise NotImplementedError("tasks are not compared with full precision")

    def evaluate(self, cell: Cell, answers: Path | None, watch: Watch | None) -> Evaluation:
        return evaluate_tasks(
            self.loaded,
            self.tasks,
            self.config.evaluation.batch_size,
            self.config.evaluation.limit,
            self.config.seed,
            self.config.tasks.chat_template,
            answers,
            kernels_used if self.config.packed else None,
        )

    def compare(self, evaluation: Evaluation) -> Evaluation:
        return evaluation


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings of generation that a user gave in place of a task's own."""
    evaluation, settings = config.evaluation, dict[str, Any]()
    if evaluation.max_new_tokens is not None:
        settings["max_gen_toks"] = evaluation.max_new_tokens
    if evaluation.temperature > 0:
        settings |= {"do_sample": True, "temperature": evaluation.temperature}
    return settings
