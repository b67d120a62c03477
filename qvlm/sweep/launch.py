"""Builds the launcher that a configuration names, and runs the cells of a sweep with it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from hydra.utils import get_object
from omegaconf import OmegaConf
from tqdm import tqdm

from qvlm.errors import UserError
from qvlm.records.locks import Held, find_owner
from qvlm.sweep.job import Job, Launcher, Outcome
from qvlm.sweep.progress import SweepProgress
from qvlm.validation import plain_parameters

if TYPE_CHECKING:  # importing it imports PyTorch
    from qvlm.cell.identity import Cell

LATER = "going on with the others, and back to it at the end"


def build(node: Mapping[str, Any]) -> Launcher:
    """Makes the launcher that `_target_` names, with the options beside it.

    Raises:
        UserError: if `_target_` is not a launcher, or a value is refused.
        OmegaConfBaseException: for a value of a wrong type, or an option that it does not have.
    """
    try:
        target = get_object(node["_target_"])
        schema = OmegaConf.structured(target)
        if not callable(getattr(target, "launch", None)):
            raise TypeError("it has no launch(jobs)")
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"launcher._target_={node.get('_target_')} is not a launcher ({reason}). Give the "
            "import path of a dataclass like those of qvlm.sweep."
        ) from error
    plain_parameters("launcher", node)
    options = {key: value for key, value in node.items() if key != "_target_"}
    typed = OmegaConf.merge(OmegaConf.create({"launcher": schema}), {"launcher": options})
    return cast(Launcher, OmegaConf.to_object(typed.launcher))


def launch(
    launcher: Launcher, cells: Sequence["Cell"], progress: SweepProgress | None = None
) -> list[Outcome]:
    """Runs the cells that are not recorded, and returns the outcome of each cell, in order.

    Args:
        launcher: Launcher that runs them.
        cells: Cells of one batch of a sweep.
        progress: Bar over the whole sweep; None for one over these cells.
    """
    with nullcontext(progress) if progress else SweepProgress(cells) as bar:
        outcomes = {}
        for index, cell in enumerate(cells):
            if (outcome := _find(cell)) is not None:
                outcomes[index] = outcome
                if not isinstance(outcome, Held):
                    bar.done(cell, computed=False)
        left = [index for index in range(len(cells)) if index not in outcomes]
        for position, outcome in launcher.launch([Job(cells[i]) for i in left]) if left else ():
            outcomes[left[position]] = outcome
            if isinstance(outcome, Held):
                tqdm.write(f"{outcome}; {LATER}")
            else:
                bar.done(cells[left[position]])
    return [outcomes[index] for index in range(len(cells))]


def _find(cell: "Cell") -> Outcome | None:
    """The outcome of a cell that needs no job: it is recorded, or another process computes it."""
    try:
        if cell.is_recorded():
            tqdm.write(f"reused {cell.result}")
            return cell.result
    except UserError as error:
        return error
    owner = find_owner(cell.path)
    if owner is None:
        return None
    held = Held(cell.path, owner)
    tqdm.write(f"{held}; {LATER}")
    return held
