"""Draws a contact sheet of generated problems: `python -m qvlm.data.miniature.preview`.

Each skill has a row of a few problems: the image three times as large, question, hint, options with
a mark at the right one, and the reasoning that the model is tuned to write.
"""

import argparse
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from qvlm.data.miniature import SKILLS, SPLITS, stream
from qvlm.data.prompts import LETTERS

ZOOM, CARD, LINE, WRAP = 3, (360, 250), 13, 56


def card(problem: dict[str, Any]) -> Image.Image:
    """Draws one problem as an image of `CARD` pixels."""
    sheet = Image.new("RGB", CARD, "white")
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, CARD[0] - 1, CARD[1] - 1), outline="lightgray")
    top = 6
    if problem["image"] is not None:
        image = problem["image"]
        enlarged = image.resize([side * ZOOM for side in image.size], Image.Resampling.NEAREST)
        sheet.paste(enlarged, (6, top))
        pen.text((enlarged.width + 14, top), problem["grade"], fill="gray")
        top += enlarged.height + 6
    right = problem["answer"]
    options = [
        f"({LETTERS[i]}) {choice}{'  <-' if i == right else ''}"
        for i, choice in enumerate(problem["choices"])
    ]
    for text, color in (
        (problem["question"], "black"),
        (problem["hint"], "darkblue"),
        (" ".join(options), "darkgreen"),
        (f"{problem['lecture']} {problem['solution']}".strip(), "firebrick"),
    ):
        for line in textwrap.wrap(text, WRAP):
            pen.text((6, top), line, fill=color)
            top += LINE
    return sheet


def contact_sheet(split: str, per_skill: int) -> Image.Image:
    """Draws all skills of the generator, with `per_skill` problems in each row."""
    label = 16
    height = CARD[1] + label
    sheet = Image.new("RGB", (CARD[0] * per_skill, height * len(SKILLS)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, skill in enumerate(SKILLS.values()):
        pen.text((4, row * height + 2), f"{skill.name} ({skill.subject})", fill="black")
        for column, problem in enumerate(islice(stream(split, 0, [skill.name]), per_skill)):
            sheet.paste(card(problem), (column * CARD[0], row * height + label))
    return sheet


def main() -> None:
    """Writes the sheet and prints its path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/preview.png"))
    parser.add_argument("--split", choices=list(SPLITS), default="train")
    parser.add_argument("--per-skill", type=int, default=4)
    options = parser.parse_args()
    if options.per_skill < 1:
        parser.error(f"--per-skill: {options.per_skill} is too few. Give at least 1.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(options.split, options.per_skill).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
