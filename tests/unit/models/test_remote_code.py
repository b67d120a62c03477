"""No checkpoint runs code: every way to load one is driven with a hostile folder."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, dynamic_module_utils

from qvlm.data import miniature
from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.methods.rtn import RTN
from qvlm.models import LoadedModel, load_model
from qvlm.models.load import MINIATURES
from qvlm.models.packed import save_packed_model
from qvlm.packing import pack_model
from qvlm.quantization import QuantizationConfig, QuantSpec, Walk
from tests.helpers import standins
from tests.helpers.origins import make_origin

pytestmark = pytest.mark.slow

CLASSES = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    *("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"),
)
FILES = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("generation_config.json", "processor_config.json"),
)


def make_hostile(folder: Path, marker: Path) -> None:
    """Puts code into a folder that writes a marker file, and has every JSON file name it."""
    code = f"open({str(marker)!r}, 'w').close()\n" + "".join(
        f"class {name}Evil:\n    pass\n" for name in CLASSES
    )
    for file in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(code)
    hostile = {"auto_map": {name: f"evil.{name}Evil" for name in CLASSES}}
    hostile["auto_map"]["AutoTokenizer"] = ["evil.AutoTokenizerEvil"] * 2  # type: ignore[assignment]
    for name in FILES:
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        parts = [content[part] for part in ("text_config", "vision_config") if part in content]
        for part in (content, *parts):
            part |= hostile
        file.write_text(json.dumps(content))


def write_own(folder: Path, name: str = "mini_llava") -> dict[str, Any]:
    for file in (MINIATURES / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return {}


def write_original(family: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        standin = standins.write(family, folder.parent / "made")
        for file in standin.folder.iterdir():
            file.rename(folder / file.name)
        conversation = {"moe_llava": "stablelm", "moe_llava_phi2": "phi", "moe_llava_qwen": "qwen"}
        return {
            "vision_tower": standin.tower and str(standin.tower),
            "prompting": Prompting("CQM-A", conversation.get(family, "vicuna_v1")),
        }

    return write


def quantized() -> LoadedModel:
    loaded = load_model("mini_llava", "mini_llava")
    batch = loaded.encode(miniature.generate("train", 30)[:2])
    spec = QuantSpec(4, "per_token")
    config = QuantizationConfig(QuantSpec(4, "per_channel"), language=spec, vision=spec)
    RTN().quantize(Walk(loaded.model, [batch], config))
    pack_model(loaded.model)
    return loaded


def write_packed(folder: Path) -> dict[str, Any]:
    save_packed_model(quantized(), folder, make_origin())
    return {}


WAYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "own": write_own,
    "packed": write_packed,
    **{family: write_original(family) for family in standins.FAMILIES},
}


@pytest.fixture(autouse=True)
def consenting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose terminal answers yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.parametrize("meta_layers", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_checkpoint_loads_without_its_code(
    tmp_path: Path, way: str, meta_layers: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "executed"
    folder.mkdir()
    options = WAYS[way](folder)
    make_hostile(folder, marker)
    if options.get("vision_tower"):
        make_hostile(Path(options["vision_tower"]), marker)
    before = set(sys.modules)
    loaded = load_model(folder, "hostile", meta_layers=meta_layers, **options)
    assert loaded.encode_prompts(["USER: a"], [[]])["input_ids"].numel()
    assert not marker.exists()
    assert not any("evil" in name for name in set(sys.modules) - before)
    assert "[y/N]" not in capfd.readouterr().out


def test_a_loader_that_trusts_would_run_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is hostile indeed: transformers runs its code where it is asked to."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "checkpoint", tmp_path / "executed"
    folder.mkdir()
    write_own(folder)
    make_hostile(folder, marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with contextlib.suppress(AttributeError):  # its class is not a configuration
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_packed_checkpoint_has_no_adapter_and_no_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_packed(folder)
    adapter = {"base_model_name_or_path": "mini_llava", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="it has an adapter_config.json"):
        load_model(folder, "m")
    (folder / "adapter_config.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    load_model(folder, "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="does not load"):
        load_model(folder, "m")


def test_weights_of_another_model_that_an_adapter_names_are_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_own(folder)
    adapter = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    loaded, expected = load_model(folder, "m"), load_model("mini_llava", "m")
    weights = expected.model.state_dict()
    assert all(weights[name].equal(own) for name, own in loaded.model.state_dict().items())
