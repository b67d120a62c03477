"""The file that keeps what full precision predicts is of one model, its code, and the texts."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qvlm.cell import references
from qvlm.config.compose import compose
from qvlm.evaluation.likelihood import Passage

PASSAGES = [Passage([1, 2, 3], 2), Passage([4, 5], 1, [Image.new("RGB", (2, 2))])]
HASHES = {"model": "abc"}


def test_cells_of_one_model_share_a_file_whatever_their_method(tmp_path: Path) -> None:
    configs = [
        compose([f"results_dir={tmp_path}", "model=mini_llava", *own])
        for own in (["method=rtn", "bits=w4a4"], ["method=awq", "bits=w6a6"])
    ]
    first, second = (references.file_of(config, HASHES, PASSAGES) for config in configs)
    assert first == second
    assert first.parent == tmp_path / "references"


def test_another_text_image_weight_or_code_has_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([f"results_dir={tmp_path}", "model=mini_llava", "method=rtn"])
    other_type = replace(config, model=replace(config.model, dtype="float32"))
    text, picture = PASSAGES
    given = [
        (config, HASHES, PASSAGES),
        (config, {"model": "abd"}, PASSAGES),
        (other_type, HASHES, PASSAGES),
        (config, HASHES, [replace(text, ids=[1, 2, 4]), picture]),
        (config, HASHES, [replace(text, scored=1), picture]),
        *(
            (config, HASHES, [text, replace(picture, images=[Image.new(mode, size, color)])])
            for mode, size, color in (
                ("RGB", (2, 2), "red"),
                ("RGB", (4, 1), "black"),
                ("I;16", (2, 2), 300),
                ("I;16", (2, 2), 60_000),
            )
        ),
    ]
    found = {references.file_of(*each) for each in given}
    monkeypatch.setattr(references, "code_version", lambda method: "another")
    found.add(references.file_of(config, HASHES, PASSAGES))
    assert len(found) == len(given) + 1
