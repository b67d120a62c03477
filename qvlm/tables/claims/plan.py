"""What `qvlm claims` runs: the trainings that are there, and the sweeps of the design over them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm.tables.claims.design import (
    ASSUMED,
    METHODS,
    MODELS,
    UNCALIBRATED,
    Design,
    least_detectable,
)
from qvlm.validation import refused

FOLDER = "experiments/trainings"  # where `make miniature SEED=n` writes to
TRAINED = "training.yaml"  # what a finished training leaves beside its weights


@dataclass(frozen=True)
class Training:
    """A training of a model.

    Attributes:
        model: Name of the model's YAML file.
        name: Name in records: that of the model, with the seed unless it is the shipped training.
        path: Folder of the weights, or None for the shipped ones.
    """

    model: str
    name: str
    path: Path | None = None


def find_trainings(folder: Path) -> dict[str, list[Training]]:
    """Finds the trainings of each model: the shipped one, and the finished ones of a folder.

    Args:
        folder: Folder that `make miniature SEED=n` writes to.
    """
    found = {model: [Training(model, model)] for model in MODELS}
    for model in MODELS:
        seeds = {}
        for path in folder.glob(f"{model}-seed*"):
            seed = re.fullmatch(rf"{model}-seed(\d+)", path.name)
            if seed and (path / TRAINED).is_file():
                seeds[int(seed[1])] = path
        found[model] += [Training(model, seeds[seed].name, seeds[seed]) for seed in sorted(seeds)]
    return found


def model_of(name: str) -> str:
    """Returns the model of a training by its name in records."""
    return re.sub(r"-seed\d+$", "", name)


def sweeps(design: Design, trainings: Mapping[str, Sequence[Training]]) -> list[list[str]]:
    """Returns the overrides of each sweep, draw by draw.

    Whatever has run when the sweeps are stopped then covers all trainings.

    Args:
        design: Design to run.
        trainings: Trainings of each model that are there.
    """
    found = []
    for draw in range(design.draws):
        for training in (one for each in trainings.values() for one in each):
            shared = ["experiment=claims", f"model={training.model}"]
            if training.path is not None:
                shared += [f"model.name={training.name}", f"model.path={training.path}"]
            shared.append(f"evaluation.limit={design.questions}")
            shared.append(f"calibration.seed={draw}")
            if draw == 0:
                found.append([*shared, "method=fp"])
            for bits, methods in METHODS.items():
                asked = methods + (UNCALIBRATED.get(bits, ()) if draw == 0 else ())
                found.append([*shared, f"bits={bits}", f"method={','.join(asked)}"])
    return found


def announcement(design: Design, trainings: Mapping[str, Sequence[Training]]) -> str:
    """Returns what the design is going to cost and able to see, in words."""
    reduced = {
        model: Design(design.questions, design.draws, len(found))
        for model, found in trainings.items()
    }
    there = " and ".join(f"{own.trainings} of {model}" for model, own in reduced.items())
    cells = sum(own.cells for own in reduced.values())
    hours = sum(own.hours(models=1) for own in reduced.values())
    lines = [
        f"{design.questions} questions x {design.draws} calibration draws x trainings ({there}): "
        f"{cells} cells, about {hours:.1f} hours of one core.",
    ]
    if missing := max(design.trainings - own.trainings for own in reduced.values()):
        lines.append(
            f"Up to {missing} of {design.trainings} trainings are missing: "
            f"`make miniature SEED={design.trainings - missing}` makes one of each model."
        )
    seen = [
        f"{least_detectable(reduced[model], assumed):.2f} points on {model} at {bits}"
        for (model, bits), assumed in ASSUMED.items()
    ]
    lines.append(f"Seen with a power of 80 %: {', '.join(seen)}.")
    return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """What `qvlm claims` runs.

    Attributes:
        announcement: What it is going to cost and able to see.
        sweeps: Overrides of each sweep.
        others: Overrides of every cell.
        estimate: Whether the announcement is all that is wanted.
    """

    announcement: str
    sweeps: list[list[str]]
    others: list[str]
    estimate: bool


def plan(words: Sequence[str]) -> Plan:
    """Divides the words of the command between the design and its cells.

    Args:
        words: `questions=N`, `draws=N`, `trainings=FOLDER` and `estimate=true` are the design's,
            and all others are overrides of every cell.

    Raises:
        UserError: If a number of the design is wrong.
    """
    own: dict[str, str] = {}
    others = []
    for word in words:
        name, _, value = word.partition("=")
        if name in ("questions", "draws", "trainings", "estimate"):
            own[name] = value
        else:
            others.append(word)
    numbers = {name: _number(name, own[name]) for name in ("questions", "draws") if name in own}
    design = Design(**numbers)
    trainings = find_trainings(Path(own.get("trainings", FOLDER)).expanduser())
    if own.get("estimate", "false") not in ("true", "false"):
        raise refused("estimate", own["estimate"], "one of: true, false")
    return Plan(
        announcement(design, trainings),
        sweeps(design, trainings),
        others,
        own.get("estimate") == "true",
    )


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise refused(name, text, "a whole number")
    return int(text)
