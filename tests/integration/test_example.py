"""The example script runs from the float model to an answer about an image."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_it_ends_with_an_image_and_an_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/ask_a_picture.py", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "AWQ at W4A4: proven in 53 layers: True" in done.stdout
    full, packed = (
        line.partition(": ")[2]
        for line in done.stdout.splitlines()
        if line.startswith(("full precision: ", "packed, W4A4: "))
    )
    assert "The answer is" in full
    assert "The answer is" in packed
    with Image.open(tmp_path / "question.png") as image:
        assert min(image.size) > 500
