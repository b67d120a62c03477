"""Where the cells of a results folder keep what full precision makes of their texts.

The folder is a pure cache: a cell that finds nothing there computes it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvlm.config.schema import RunConfig
from qvlm.data.images import to_rgb
from qvlm.evaluation.likelihood import Passage
from qvlm.records.provenance import code_version

FOLDER = "references"


def file_of(
    config: RunConfig, files_hashed: Mapping[str, str], passages: Sequence[Passage]
) -> Path:
    """Returns the file for a model in full precision and some passages.

    Args:
        config: Configuration of the cell.
        files_hashed: Hashes that identify the model; see `Cell`.
        passages: Passages, their images decoded.
    """
    model = config.model
    identity = hashlib.sha256()
    code = code_version(None)  # what runs whatever the method
    kind = [code, files_hashed, model.dtype, model.expert_capacity, model.image_fit]
    identity.update(json.dumps(kind, sort_keys=True).encode())
    for passage in passages:
        sizes = [image.size for image in passage.images]
        identity.update(json.dumps([passage.ids, passage.scored, sizes]).encode())
        for image in passage.images:
            identity.update(to_rgb(image).tobytes())
    name = f"{model.name}-{identity.hexdigest()[:16]}.safetensors"
    return Path(config.results_dir) / FOLDER / name
