"""From a float model to an answer about an image: quantize, prove, save and ask it.

    python examples/ask_a_picture.py [FOLDER]

It takes less than a minute on a laptop. FOLDER, by default examples/out, gets the packed model and
an image of the question with its answers.
"""

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm
from qvlm.data.prompts import LETTERS
from qvlm.data.scienceqa import load_scienceqa

LINE = 60  # letters of a line below the image


def main(out: Path) -> None:
    """Asks the first question of the test split that has an image."""
    problem = next(row for row in load_scienceqa("miniature", "test", 50) if row["image"])
    asked = [problem[name] for name in ("question", "choices", "image", "hint")]

    # 1. Full precision answers.
    model = qvlm.load("mini_llava", "device=cpu")
    answers = {"full precision": model.ask(*asked)}

    # 2. The weights and activations of every linear layer take 16 values per scale, and no more.
    qvlm.quantize(model, "awq", "w4a4")
    proof = qvlm.prove(model)
    print(f"{model.method} at {model.bits}: proven in {len(proof.layers)} layers: {proof.holds}")
    before = sum(tensor.nbytes for tensor in model.loaded.model.state_dict().values())

    # 3. The codes go to disk, two in a byte.
    qvlm.save(model, out / "packed")
    after = (out / "packed" / "model.safetensors").stat().st_size
    print(f"{before / 2**20:.1f} MiB simulated, {after / 2**20:.1f} MiB packed")

    # 4. transformers opens them, because qvlm is imported, and knows nothing else of it.
    packed = AutoModelForImageTextToText.from_pretrained(out / "packed")
    processor = AutoProcessor.from_pretrained(out / "packed")
    question, choices, image, hint = asked
    prompt = processor.prompt(question, choices, image=True, hint=hint)
    inputs = processor(images=image, text=prompt)
    tokens = packed.generate(**inputs, max_new_tokens=64, do_sample=False)
    tokens = tokens[:, inputs["input_ids"].shape[1] :]
    answers["packed, W4A4"] = processor.batch_decode(tokens, skip_special_tokens=True)[0]

    print(describe(problem, answers))
    draw(problem, answers, out / "question.png")
    print(f"wrote {out / 'question.png'}")


def describe(problem: dict[str, Any], answers: dict[str, str]) -> str:
    """Returns the question, its choices, the right one, and the answers."""
    choices = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"])]
    lines = [problem["question"], "  ".join(choices), f"right: {LETTERS[problem['answer']]}"]
    return "\n".join([*lines, *(f"{name}: {answer}" for name, answer in answers.items())])


def draw(problem: dict[str, Any], answers: dict[str, str], file: Path) -> None:
    """Draws the image of the question above the texts of `describe`."""
    figure, (above, below) = plt.subplots(2, figsize=(6, 6), height_ratios=[3, 2])
    above.imshow(problem["image"], interpolation="nearest")
    wrapped = [textwrap.fill(line, LINE) for line in describe(problem, answers).splitlines()]
    below.text(0, 1, "\n".join(wrapped), va="top", transform=below.transAxes)
    for axes in (above, below):
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "out")
