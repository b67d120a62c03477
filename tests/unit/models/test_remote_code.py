"""No checkpoint runs code: every way to load one is driven with a hostile folder."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvlm.errors import UserError
from qvlm.models import load_model
from qvlm.models.architectures import architecture
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.load import MINIATURES
from qvlm.models.packed import save_packed_model
from qvlm.packing import PackedLinear
from qvlm.quantization import QuantizationConfig, QuantSpec
from tests.helpers import standins

MARKER = "EXECUTED"
CLASSES = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    *("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"),
)


def make_hostile(folder: Path, marker: Path) -> None:
    """Puts code into a checkpoint and has every JSON file of it name that code."""
    code = f"open({str(marker)!r}, 'w').close()\n" + "".join(
        f"class {name}Evil:\n    pass\n" for name in CLASSES
    )
    for file in ("evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / file).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    names = {"AutoTokenizer": ["evil.AutoTokenizerEvil", "evil.AutoTokenizerEvil"]}
    hostile = {"auto_map": {name: f"evil.{name}Evil" for name in CLASSES} | names}
    for name in (
        *("config.json", "tokenizer_config.json", "preprocessor_config.json"),
        *("generation_config.json", "processor_config.json"),
    ):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "AutoTokenizerEvil"
        if name == "config.json":
            for part in ("text_config", "vision_config"):
                if part in content:
                    content[part] |= hostile
        file.write_text(json.dumps(content | hostile))


def write_own(folder: Path) -> dict[str, Any]:
    for file in (MINIATURES / "mini_llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return {}


def write_original(family: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        standin = standins.write(family, folder.parent / "made")
        for file in standin.folder.iterdir():
            file.rename(folder / file.name)
        return {} if standin.tower is None else {"vision_tower": str(standin.tower)}

    return write


def write_packed(folder: Path) -> dict[str, Any]:
    loaded = load_model("mini_llava", "packed")
    name = "model.language_model.layers.0.mlp.up_proj"
    spec = QuantSpec(4, "per_token")
    config = QuantizationConfig(weight=QuantSpec(4, "per_channel"), language=spec, vision=spec)
    pack_one(loaded.model, name, config)
    save_packed_model(loaded, folder, {"hash": "0"})
    return {}
