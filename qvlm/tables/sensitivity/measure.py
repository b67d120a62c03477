"""Quantizes a model once and measures it in every state, each kept on disk as it is finished.

A killed command continues where it stopped: it quantizes the model again, which gives the same
codes, and measures the states that are missing. What is kept lies in `sensitivity` in the results
folder until the page is written.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import pandas as pd
from torch import nn
from tqdm import tqdm

from qvlm.cell import inputs, text
from qvlm.cell.identity import Cell
from qvlm.cell.material import calibration_batches, load_material
from qvlm.cell.method import build_method
from qvlm.config.schema import MAP, RunConfig
from qvlm.errors import RunError, UserError
from qvlm.evaluation.divergence import Reference, answer_passages
from qvlm.evaluation.evaluator import evaluate
from qvlm.evaluation.text import Window, evaluate_text, refer
from qvlm.models.loaded import LoadedModel
from qvlm.quantization import check_bits, expected_layers, measure_bits
from qvlm.records.environment import hardware, versions
from qvlm.records.files import explained, write_file
from qvlm.records.record import answers_folder
from qvlm.records.strict import build, read_json
from qvlm.tables.sensitivity.parts import State, states_of
from qvlm.tables.sensitivity.switch import KeepingWalk, quantized_only

FULL_PRECISION = "full_precision"  # name of what is kept of the model before it is quantized


@dataclass(frozen=True)
class Outcome:
    """What a state of the model made of each question, or of each document.

    Attributes:
        tokens: Number of scored tokens, [clusters].
        nats: Sum of the divergence from full precision over these tokens, [clusters].
        log_losses: Sum of their negative log-likelihood in nats, [clusters]; empty for questions.
        predictions: Letters that were answered, as indices or None, [questions answered].
        correct: Whether these answers are right, [questions answered].
    """

    tokens: list[int]
    nats: list[float]
    log_losses: list[float]
    predictions: list[int | None]
    correct: list[bool]


class _Reader(Protocol):
    """What a model in any state is measured on, beside itself in full precision."""

    def outcome(self) -> Outcome:
        """Measures the model as it is now."""
        ...


class _Questions:
    """Questions: the divergence on all expected answers, and the model's own answers to the first.

    Args:
        config: Configuration of the cell; `evaluation.kl_problems` questions are compared.
        loaded: Model in full precision.
        answers: Number of questions that are answered.
    """

    def __init__(self, config: RunConfig, loaded: LoadedModel, answers: int) -> None:
        problems = inputs.load_problems(config, loaded.reads_images)
        count = min(inputs.compared_problems(config), len(problems))
        passages = answer_passages(loaded, [problems[row] for row in range(count)])
        self.config, self.loaded = config, loaded
        self.reference = Reference(loaded, passages, config.calibration.batch_size)
        self.asked = problems.select(range(min(answers, len(problems))))

    def outcome(self) -> Outcome:
        found = self.reference.divergence(self.loaded)
        given = self._answers() if len(self.asked) else pd.DataFrame(_NO_ANSWERS)
        letters = [None if pd.isna(letter) else int(letter) for letter in given["prediction"]]
        correct = [bool(right) for right in given["correct"]]
        return Outcome(found.tokens.tolist(), found.nats.tolist(), [], letters, correct)

    def _answers(self) -> pd.DataFrame:
        options = self.config.evaluation
        try:
            return evaluate(
                self.loaded,
                self.asked,
                batch_size=options.batch_size,
                max_new_tokens=inputs.answer_length(self.config),
                unparsable=options.unparsable,
                seed=self.config.seed,
                temperature=options.temperature,
                progress=False,
            ).predictions
        except RunError as error:  # a part may break a model so far that it answers nothing
            raise RunError(f"{error}. To measure no answers, give --answers=0.") from error


_NO_ANSWERS: dict[str, list[bool]] = {"prediction": [], "correct": []}


class _Documents:
    """Documents, of which the first window is read: divergence and likelihood of its tokens.

    Args:
        config: Configuration of the cell; windows have `evaluation.window` tokens.
        loaded: Model in full precision.
    """

    def __init__(self, config: RunConfig, loaded: LoadedModel) -> None:
        first: dict[str, Window] = {}
        for window in text.score_windows(config, loaded, text.load_texts(config)):
            first.setdefault(window.document, window)
        self.loaded, self.windows = loaded, list(first.values())
        self.reference = refer(loaded, self.windows)

    def outcome(self) -> Outcome:
        found = evaluate_text(self.loaded, self.windows, self.reference).predictions
        tokens, nats, log_losses = (found[name].tolist() for name in ("tokens", "kl", "nll"))
        return Outcome(tokens, nats, log_losses, [], [])


def measure(cell: Cell, answers: int, folder: Path) -> tuple[Outcome, dict[State, Outcome]]:
    """Measures a model in full precision and in every state.

    Args:
        cell: Cell of the quantized model.
        answers: Number of questions that are answered; 0 for none.
        folder: Folder that keeps what is finished; see `kept_in`.

    Returns:
        What full precision made of the questions or documents, and what each state did.

    Raises:
        UserError: If checkpoint or data cannot be used.
        RunError: If the quantized model does not prove its bits.
    """
    config = cell.config
    device = inputs.find_device(config.device)
    inputs.settle(config, device)
    loaded = inputs.load(config, device)
    reader: _Reader = (
        _Documents(config, loaded) if config.on_text else _Questions(config, loaded, answers)
    )
    full = _kept(folder / f"{FULL_PRECISION}.json", reader.outcome)
    floats = _quantize(config, loaded)
    tower = inputs.quantization_config(config).vision_tower
    found: dict[State, Outcome] = {}
    states = states_of(loaded.model, list(floats), tower)
    for state in tqdm(states, desc="states", unit="state", disable=None):
        with quantized_only(loaded.model, floats, state.layers, state.operands):
            found[state] = _kept(folder / f"{state.name}.json", reader.outcome)
    return full, found


def require_switchable(config: RunConfig) -> None:
    """Refuses a cell whose linears cannot be switched.

    Raises:
        UserError: If it is in full precision, packed, streamed or spread over devices, or a number
            of questions is given that the command's own options replace.
    """
    if config.full_precision:
        raise UserError("bits=fp is not possible here: nothing is quantized. Give bits=w4a4.")
    if config.execution != "simulated":
        raise UserError(
            "execution is not simulated, and only simulated linears are switched. Leave out "
            "execution, save_packed, stream and model.packed."
        )
    if config.device == MAP:
        raise UserError("device=map is not possible here. Give one device, such as device=cuda.")
    for option in ("limit", "kl_problems"):
        if not config.on_text and getattr(config.evaluation, option) is not None:
            raise UserError(f"evaluation.{option} is not for this. Give --problems and --answers.")


def kept_in(cell: Cell, answers: int) -> Path:
    """Returns the folder for outcomes of this cell, on this kind of machine, with these packages.

    Args:
        cell: Cell of the quantized model.
        answers: Number of questions that are answered.
    """
    machine = hardware()
    place = {"answers": str(answers), "device": inputs.find_device(cell.config.device)}
    place |= {"cpu": machine["cpu"], "gpu": str(machine["gpu"])} | versions()
    path = Path(cell.config.results_dir) / "sensitivity" / cell.path.name
    return answers_folder(path, cell.hash, place)


def with_questions(config: RunConfig, problems: int, answers: int) -> RunConfig:
    """Returns the configuration that loads as many questions as are compared or answered."""
    if config.on_text:
        return config
    limit = max(problems, answers)
    evaluation = replace(config.evaluation, kl_problems=problems, limit=limit)
    return replace(config, evaluation=evaluation)


def _quantize(config: RunConfig, loaded: LoadedModel) -> dict[str, nn.Linear]:
    """Quantizes a model in place, proves its bits and returns its float linears by full name."""
    quantization = inputs.quantization_config(config)
    expected = expected_layers(loaded.model, quantization.vision_tower)
    proof = load_material(config, loaded).proof()
    walk = KeepingWalk(loaded.model, calibration_batches(config, loaded)[0], quantization)
    build_method(config.method).quantize(walk)
    failing = check_bits(measure_bits(loaded.model, expected, proof, quantization))
    if failing:
        raise RunError(f"{failing[0]} does not take {config.bits.label} values.")
    return {name: walk.floats[name] for name in expected}


def _kept(file: Path, measured: Callable[[], Outcome]) -> Outcome:
    """Reads an outcome from its file, or measures it and writes the file."""
    try:
        return build(Outcome, read_json(file))
    except (OSError, ValueError):  # absent, damaged, or of another version
        pass
    found = measured()
    with explained(f"results_dir: {file}", RunError):
        write_file(file, json.dumps(asdict(found)))
    return found
