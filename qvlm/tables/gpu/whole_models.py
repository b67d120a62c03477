"""The tables of whole models: a row per form, with its ratios to bf16."""

from collections.abc import Iterator

import pandas as pd

from qvlm.markdown import table
from qvlm.tables.gpu.forms import BF16, FORMS, QUESTIONS, WITH_IMAGE
from qvlm.tables.gpu.revisions import differences

Values = dict[tuple[str, str], str]
_RANKED = [BF16, *(form.name for form in FORMS)]


def whole_models(lines: pd.DataFrame, vision: pd.DataFrame) -> Iterator[str]:
    """Yields a table for each model, number of sequences and prompt.

    Args:
        lines: Lines of whole models.
        vision: Lines of tower and projector, for the time of a question with an image.
    """
    images = {
        (str(model), str(form)): float(value)
        for model, form, measure, value in vision[["model", "form", "measure", "value"]].itertuples(
            index=False
        )
        if measure == "image"
    }
    for key, part in lines.groupby(["model", "batch", "setting"], sort=False):
        model, batch, setting = map(str, key)
        many = "one question at a time" if batch == "1" else f"{batch} questions at a time"
        yield f"**{model}, {many}, tokens of prompt and answer: {setting}**"
        yield _table(part, int(batch), setting, {f: images.get((model, f)) for f in _RANKED})
        yield from differences(part)


def _table(part: pd.DataFrame, batch: int, setting: str, images: dict[str, float | None]) -> str:
    """Returns the table of the forms that were measured in one setting."""
    values: Values = {
        (str(form), str(measure)): str(value)
        for form, measure, value in part[["form", "measure", "value"]].itertuples(index=False)
    }
    units = dict(zip(part["measure"], part["unit"], strict=True))
    prefills = [name for name in dict.fromkeys(part["measure"]) if name.startswith("prefill")]
    shown = [*prefills, "token", "decoding", "weights", "peak memory"]
    head = ["form"]
    for measure in shown:
        head.append(f"{measure}, {units.get(measure, '')}")
        if measure != "peak memory":
            head.append("ratio")
    is_mix = len(prefills) == 2
    if is_mix:
        head.append(f"hours for {QUESTIONS:,} questions")
    rows = []
    for form in sorted({form for form, _ in values}, key=_RANKED.index):
        row = [form]
        for measure in shown:
            row.append(values.get((form, measure), ""))
            if measure != "peak memory":
                row.append(_ratio(values, form, measure))
        if is_mix:
            answer = int(setting.rpartition(" ")[2])
            row.append(_hours(values, form, prefills, answer, batch, images[form]))
        rows.append(row)
    return table(head, rows)


def _ratio(values: Values, form: str, measure: str) -> str:
    """Returns how many times better a form is than bf16, or nothing if one was not measured."""
    own, full = (float(values.get((name, measure), 0)) for name in (form, BF16))
    if not own or not full:
        return ""
    return f"{own / full if measure == 'decoding' else full / own:.2f}"


def _hours(
    values: Values, form: str, prefills: list[str], answer: int, batch: int, image: float | None
) -> str:
    """Returns the hours for ScienceQA's test split, of which some questions have an image."""
    if image is None:
        return ""
    with_image, without = (float(values[form, name]) for name in prefills)
    read = WITH_IMAGE * (image * batch + with_image) + (1 - WITH_IMAGE) * without
    answered = answer * float(values[form, "token"])
    return f"{QUESTIONS / batch * (read + answered) / 3.6e6:.3f}"
