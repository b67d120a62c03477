"""Packed checkpoints: identical logits after a round trip, and one sentence for each fault."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration as Llava

from qvlm.cell import inputs as prepare
from qvlm.errors import UserError
from qvlm.models.architectures import architecture
from qvlm.models.meta import meta_model
from qvlm.packing import weight_bytes
from qvlm.packing.checkpoint import load_packed, save_packed
from qvlm.packing.form import Form
from qvlm.packing.kernels.int4_weight_only import layout_is_known
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import pack_model, packed_layers
from qvlm.packing.uncalibrated import put_empty_layers
from qvlm.planning.footprint import configuration
from tests.helpers.layers import logits, quantized, rounded

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a packed checkpoint of several shards."""
    model = rounded()
    pack_model(model)
    save_packed(model, tmp_path, shard_size="20KB")
    return tmp_path


def test_a_fresh_process_loads_on_the_meta_device(folder: Path) -> None:
    layout_is_known.cache_clear()
    assert packed_layers(load_packed(Llava, folder))


def test_round_trip_gives_identical_logits(folder: Path, tmp_path: Path) -> None:
    model = rounded()
    pack_model(model)
    expected = logits(model)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_packed(Llava, folder)
    assert torch.equal(logits(loaded), expected)
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    save_packed(loaded, tmp_path / "again")
    assert torch.equal(logits(load_packed(Llava, tmp_path / "again")), expected)


def test_faults_are_named(folder: Path) -> None:
    shard = next(path for path in folder.glob("*.safetensors") if "codes" in str(load_file(path)))
    whole = shard.read_bytes()
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("codes"))
    rest = {key: value for key, value in tensors.items() if key != name}

    save_file(rest, shard, {"format": "pt"})
    with pytest.raises(UserError, match="missing keys"):
        load_packed(Llava, folder)
    save_file({**rest, name: tensors[name][:1].clone()}, shard, {"format": "pt"})
    with pytest.raises(UserError):
        load_packed(Llava, folder)
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="does not load"):
        load_packed(Llava, folder)
    shard.write_bytes(whole)
    load_packed(Llava, folder)

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Version 99 .* version 1 or 2"):
        load_packed(Llava, folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not a packed checkpoint"):
        load_packed(Llava, folder)


FOREIGN: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "zero point of 200": ("zero_point", lambda x: torch.full_like(x, 200), "more than 4 bits"),
    "input's zero point": ("input_zero_point", lambda x: x | 16, "more than 4 bits"),
    "scale of zero": ("scale", torch.zeros_like, "numbers that are no scales"),
    "negative scale": ("scale", lambda x: x | -(2**31), "numbers that are no scales"),
    "infinite scale": ("input_scale", lambda x: x | 0x7F800000, "not finite"),
    "scale in float32": ("scale", lambda x: x.view(torch.float32), "is stored as F32, and I32"),
    "codes in int64": ("codes", lambda x: x.long(), "is stored as I64, and U8"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_numbers_that_no_save_wrote_are_refused(case: str, kind: str, tmp_path: Path) -> None:
    """Transformers converts a tensor of another type, and kernels read memory by some numbers."""
    model = rounded()
    pack_model(model)
    save_packed(model, tmp_path)
    part, change, sentence = FOREIGN[case]
    tensors = load_file(file := tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith(f".{part}"))
    save_file(tensors | {name: change(tensors[name]).clone()}, file, {"format": "pt"})
    with pytest.raises((UserError, ValueError), match=sentence):
        load_packed(Llava, tmp_path) if kind == "ours" else Llava.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["group_size", "constant_block_size"])
def test_sizes_beyond_64_bits_are_refused(field: str) -> None:
    """C would take such a size for zero, and divide by it."""
    layer = quantized((48, 64), weight="normal_float")[0]
    fields = asdict(PackedLinear.from_quantized(layer).form)
    with pytest.raises(ValueError, match=f"{field} of a packed layer is out of range"):
        Form(**fields | {field: 2**64, "constants": (0, 1)})


LOAD = """
import sys
import torch
from qvlm.models.llava import Llava
from qvlm.packing import load_packed, weight_bytes

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = resident("VmRSS")
model = load_packed(Llava, sys.argv[1])
for tensor in (*model.parameters(), *model.buffers()):
    tensor.amax()  # a mapped tensor is not resident before it is read
print((resident("VmHWM") - before) / weight_bytes(model))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_than_the_packed_model(tmp_path: Path) -> None:
    """Loads two layers of LLaVA-7B, which would be four times as large in floating point."""
    built = architecture("llava_7b")
    built.text_config.num_hidden_layers, built.text_config.vocab_size = 2, 512
    built.vision_config.num_hidden_layers, built.image_token_id = 3, 511
    model = meta_model(built, torch.bfloat16)
    put_empty_layers(model, prepare.quantization_config(configuration("llava_7b", "w4a4")), False)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()
    for layer in packed_layers(model).values():
        for name, tensor in layer.named_buffers():
            if name.endswith("scale"):
                tensor.view(torch.float32).fill_(1)
        if layer.form.ordered:
            layer.order.copy_(torch.arange(layer.in_features))
    assert weight_bytes(model) > 2**27
    save_packed(model, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(run.stdout) < 1.15
