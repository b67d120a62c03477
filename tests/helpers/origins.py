"""A valid `qvlm.json`, for tests that damage it or need any."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvlm.cell.settled import Settled
from qvlm.packing import Encoding, Origin
from qvlm.packing.origin import VERSION
from tests.helpers.configs import load


def make_origin(**changes: Any) -> Origin:
    """The origin of a cell of mini_llava, RTN, W4A4, whose hash is "0"."""
    parts: dict[str, Any] = {
        "version": VERSION,
        "hash": "0",
        "method": "RTN",
        "options": asdict(Settled.of(load("bits=w4a4"))),
        "expected": [],
        "calibration_ids": [],
        "uncalibrated": [],
        "report": {"search_seconds": 0.0, "candidates": 0, "details": {}},
        "files": [],
        "encoding": Encoding("crop", "<image>", True),
    }
    return Origin(**parts | changes)


def write_json(folder: Path, content: object) -> None:
    """Writes a `qvlm.json` of any content."""
    (folder / "qvlm.json").write_text(json.dumps(content))
