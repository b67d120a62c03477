"""The page of measured lines, a pure function of `gpu.csv`."""

from collections.abc import Iterator

import pandas as pd

from qvlm.markdown import bullets, table
from qvlm.tables.gpu.goals import goals
from qvlm.tables.gpu.revisions import revision_of
from qvlm.tables.gpu.whole_models import whole_models

_TASK = ["model", "form", "batch", "setting"]
_TITLES = {
    "limits": "### Limits of the card, measured",
    "correctness": "### Products against float64",
    "tile": "### Products of a decoder layer of LLaVA-13B",
    "model": "### Whole models",
    "overlap": "### Overlapping launches",
    "vision": "### One image through tower and projector",
    "miniature": "### Miniatures, GPU against CPU",
    "method": "### Methods on a 13B",
}
_NOTES = {
    "correctness": "*bound* is the rounding error that `qvlm.packing.accumulation_bound` derives. "
    "*cases* counts the shapes and numbers of rows.",
    "tile": "The setting names the product, the bits of the weight, and the largest number of rows "
    "that it serves: 1, 16 and 316 rows were measured. *tile* holds outputs, chunks or rows, warps "
    "and pipeline stages, and is the fastest that was tried.",
    "overlap": "A launch may begin before the previous one has ended (programmatic dependent "
    "launch). It fetches weights until the output of the previous launch is complete.",
    "miniature": "*batch* is the number of problems that are answered together.",
    "method": "*batch* is the number of calibration samples. The methods ran on a few layers. "
    "*all layers* is extrapolated from the mean time of a layer of each kind.",
}


def page(lines: pd.DataFrame, command: str) -> str:
    """Returns the page of all measured lines.

    Args:
        lines: Rows of `gpu.csv`, all columns as text.
        command: Command that regenerates the page.
    """
    if lines.empty:
        return "# On a GPU\n\nNo GPU was measured.\n"
    parts = ["# On a GPU", _introduction(), _sources(lines, command)]
    for card, some in lines.groupby("card", sort=False):
        parts += [f"## {card}", *goals(some), *_sections(some)]
    return "\n\n".join(parts) + "\n"


def _introduction() -> str:
    return (
        "Models have the true architectures and random weights, because time and memory do not "
        "depend on their values. All forms, bf16 included, run in the same decoder, which replays "
        "CUDA graphs (`qvlm/packing/decoder`), so that a ratio compares the products. A ratio is "
        "the time or the memory of bf16 divided by that of the form. A ratio of *decoding* is the "
        "speed of the form divided by that of bf16. Above 1, the form is better than bf16."
    )


def _sources(lines: pd.DataFrame, command: str) -> str:
    """Returns how the page is made, and which lines come from which versions."""
    notes = [f"Command: `{command}`", f"Cards: {', '.join(lines['card'].unique())}"]
    for versions, some in lines.groupby("versions", sort=False):
        count = f"{len(some)} lines of gpu.csv" if len(some) < len(lines) else "All lines"
        note = f"{count}: {versions}."
        if not revision_of(str(versions)):
            note += " These lines do not record the revision of qvlm."
        notes.append(f"{note} They hold {', '.join(_contents(some))}.")
    return bullets(notes)


def _contents(lines: pd.DataFrame) -> list[str]:
    """Returns what lines concern: their sections, and the forms of each model."""
    plain = [name for name in dict.fromkeys(lines["section"]) if name != "model"]
    whole = lines[lines["section"] == "model"]
    return plain + [
        f"{model} ({', '.join(dict.fromkeys(some['form']))})"
        for model, some in whole.groupby("model", sort=False)
    ]


def _sections(lines: pd.DataFrame) -> Iterator[str]:
    """Yields the sections of a card."""
    for section, title in _TITLES.items():
        some = lines[lines["section"] == section]
        if some.empty:
            continue
        yield title
        if section in _NOTES:
            yield _NOTES[section]
        if section == "model":
            yield from whole_models(some, lines[lines["section"] == "vision"])
        else:
            yield _plain_table(some)


def _plain_table(some: pd.DataFrame) -> str:
    """Returns a table with a row per task and a column per measure. Empty columns are left out."""
    wide = some[some["measure"] != "seconds of this task"]
    shown = (wide["value"] + " " + wide["unit"].replace("1", "")).str.strip()
    head = [name for name in _TASK if (wide[name] != "").any()]
    measures = list(dict.fromkeys(wide["measure"]))
    rows = []
    for key, part in wide.groupby(_TASK, sort=False):
        found = dict(zip(part["measure"], shown[part.index], strict=True))
        task = dict(zip(_TASK, key, strict=True))
        rows.append(
            [*(str(task[name]) for name in head), *(found.get(name, "") for name in measures)]
        )
    return table([*head, *measures], rows, left=max(1, len(head)))
