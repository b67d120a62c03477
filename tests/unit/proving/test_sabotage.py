"""Checkpoints that are not what they say are refused by name, and sound ones are not."""

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvlm.errors import UserError
from qvlm.proving.checkpoint import open_checkpoint
from qvlm.proving.gguf import GgufFile
from qvlm.proving.proof import prove
from tests.helpers.foreign import (
    edit,
    packed_layer,
    packed_settings,
    q8_0,
    save,
    words,
    write_awq,
    write_gguf,
    write_gptq,
    write_mixture,
)
from tests.helpers.stored import dequantized

MADE = Path(__file__).parents[2] / "quantized"
LAYER = "model.layers.1.mlp.down_proj"
OTHER = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.1.mlp.experts.2"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor | None]]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the quantization_config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(settings: dict[str, Any]) -> dict[str, Any]:
    return settings["config_groups"]["group_0"]["weights"]


def with_first(tensor: Tensor, value: float) -> Tensor:
    """A copy whose first number is another one."""
    copy = tensor.clone()
    copy.view(-1)[0] = value
    return copy


def scale_of(value: float, suffix: str = ".weight_scale") -> Change:
    """Makes the first scale of a layer a number."""
    return lambda t: {LAYER + suffix: with_first(t[LAYER + suffix], value)}


def named(source: str, target: str, suffixes: tuple[str, ...]) -> Change:
    """Copies tensors of one layer to another."""
    return lambda t: {target + suffix: t[source + suffix].clone() for suffix in suffixes}


def float_instead(layer: str, shape: tuple[int, int] = (32, 64)) -> Change:
    """Leaves a layer in floating point."""
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape")
    removed = dict.fromkeys(layer + suffix for suffix in suffixes)
    return lambda t: {f"{layer}.weight": torch.randn(shape), **removed}


def eight_bit_codes(t: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return dict(packed_layer(LAYER, (32, 64), 7, bits=8))


PACKED = (".weight_packed", ".weight_scale", ".weight_shape")
# What is done to which checkpoint of a library, the part that must be named, and what must be said.
TENSORS: dict[str, tuple[str, Change, str, str]] = {
    "a layer left float": ("ct_w4", float_instead(LAYER), f"{LAYER}.weight", "left in float32"),
    "zero scale": ("ct_w4", scale_of(0), LAYER, "1 of its 64 scales are zero"),
    "infinite scale": ("ct_w4", scale_of(torch.inf), LAYER, "1 of its 64 scales are infinite"),
    "NaN scale": ("ct_w4", scale_of(torch.nan), LAYER, "1 of its 64 scales are not a number"),
    "subnormal scale": ("ct_w4", scale_of(1e-40), LAYER, "1 of its 64 scales are subnormal"),
    "negative scale": ("ct_w4", scale_of(-0.1), LAYER, "1 of its 64 scales are negative"),
    "default scales": (
        "ct_w4",
        lambda t: {f"{LAYER}.weight_scale": torch.ones(32, 2)},
        LAYER,
        "all its 64 scales are 1: not calibrated",
    ),
    "constant scales": (
        "ct_w8a8",
        lambda t: {f"{LAYER}.weight_scale": torch.full((32, 1), 0.003)},
        LAYER,
        "all its 32 scales are 0.003",
    ),
    "constant codes": (
        "ct_w4",
        lambda t: {f"{LAYER}.weight_packed": torch.full((32, 8), 0x55555555, dtype=torch.int32)},
        LAYER,
        "all its codes are equal",
    ),
    "mostly constant codes": (
        "ct_w8a8",
        lambda t: {f"{LAYER}.weight": t[f"{LAYER}.weight"] * (torch.arange(32) < 8)[:, None]},
        LAYER,
        "24 of its 32 scales are above equal codes",
    ),
    "missing scale": (
        "ct_w4",
        lambda t: {f"{LAYER}.weight_scale": None},
        LAYER,
        "weight_scale is missing",
    ),
    "missing scale of bytes": (
        "ct_w8a8",
        lambda t: {f"{LAYER}.weight_scale": None},
        f"{LAYER}.weight",
        "it is torch.int8 without scales",
    ),
    "missing zero points": (
        "ct_w4_asym",
        lambda t: {f"{LAYER}.weight_zero_point": None},
        LAYER,
        "weight_zero_point is missing",
    ),
    "truncated codes": (
        "ct_w4",
        lambda t: {f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:, :7]},
        LAYER,
        "weight_packed has rows of 28 bytes, and 64 codes of 4 bits take 32",
    ),
    "rows are missing": (
        "ct_w4",
        lambda t: {f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"][:31]},
        LAYER,
        "weight_shape is [32, 64], and 31 rows are packed",
    ),
    "8-bit codes called 4": (
        "ct_w4",
        eight_bit_codes,
        LAYER,
        "its codes take 8 bits, and 4 are claimed",
    ),
    "4-bit codes called 8": (
        "ct_w8a8",
        lambda t: {f"{LAYER}.weight": t[f"{LAYER}.weight"] // 16 * 16},
        LAYER,
        "its codes take 16 values, which 4 bits hold, and 8 are claimed",
    ),
    "too many values": (
        "torchao_int4",
        lambda t: {f"{LAYER}._weight_qdata": t[f"{LAYER}._weight_qdata"] * 9},
        LAYER,
        "which 4 bits cannot hold",
    ),
    "zero point out of range": (
        "torchao_int4",
        scale_of(50, "._weight_zero_point"),
        LAYER,
        "1 of its 64 zero points are out of range",
    ),
    "duplicated layer": (
        "ct_w4",
        named(OTHER, LAYER, PACKED),
        LAYER,
        f"codes are those of {OTHER}",
    ),
    "scales of another layer": (
        "ct_w4",
        named(OTHER, LAYER, (".weight_scale",)),
        LAYER,
        f"its scales are those of {OTHER}",
    ),
    "scales of a layer of another shape": (
        "ct_w4",
        lambda t: {
            f"{LAYER}.weight_scale": t["model.layers.1.mlp.up_proj.weight_scale"],
            "model.layers.1.mlp.up_proj.weight_scale": t[f"{LAYER}.weight_scale"],
        },
        LAYER,
        "scales of shape 64 x 1 for 64 inputs",
    ),
    "NaN codes": (
        "ct_fp8",
        lambda t: {f"{LAYER}.weight": torch.full((32, 64), torch.nan).to(torch.float8_e4m3fn)},
        LAYER,
        "some of its codes are NaN",
    ),
    "NaN embedding": (
        "ct_w4",
        lambda t: {"model.embed_tokens.weight": torch.full((16, 32), torch.nan)},
        "model.embed_tokens.weight",
        "not finite",
    ),
    "NaN absmax": ("bnb_fp4", scale_of(torch.nan, ".weight.absmax"), LAYER, "not a number"),
    "infinite nested absmax": (
        "bnb_nf4",
        scale_of(torch.inf, ".weight.nested_absmax"),
        LAYER,
        "infinite",
    ),
    "absmax is short": (
        "bnb_fp4",
        lambda t: {f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][:3]},
        LAYER,
        "3 absmax values for 2048 weights",
    ),
    "codes are short": (
        "bnb_fp4",
        lambda t: {f"{LAYER}.weight": t[f"{LAYER}.weight"][:1000]},
        LAYER,
        "it holds 2000 codes for 2048 weights",
    ),
    "no quant_state": (
        "bnb_nf4",
        lambda t: {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.ones(4).byte()},
        LAYER,
        "its quant_state is not JSON",
    ),
    "zero row scale": ("bnb_int8", scale_of(0, ".SCB"), LAYER, "1 of its 32 scales are zero"),
    "linear beside bitsandbytes": (
        "bnb_int8",
        lambda t: {"projector.linear_1.weight": torch.randn(32, 32)},
        "projector.linear_1.weight",
        "left in float32",
    ),
}
SETTINGS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "group 128 claimed": (
        "ct_w4",
        lambda s: weights_of(s).update(group_size=128),
        "groups of 128 are claimed, and scales of shape 32 x 2 for 64 inputs",
    ),
    "channels claimed": (
        "ct_w4",
        lambda s: weights_of(s).update(strategy="channel", group_size=None),
        "groups of 64 are claimed",
    ),
    "8 bits claimed": (
        "ct_w4",
        lambda s: weights_of(s).update(num_bits=8),
        "4 bits, and 8 are claimed",
    ),
    "2 bits claimed in bytes": (
        "ct_w8a8",
        lambda s: weights_of(s).update(num_bits=2),
        "cannot hold",
    ),
    "8 bits claimed of nf4": (
        "bnb_nf4",
        lambda s: s.update(load_in_4bit=False, load_in_8bit=True),
        "its codes take 4 bits, and 8 are claimed",
    ),
    "fp4 claimed of nf4": (
        "bnb_nf4",
        lambda s: s.update(bnb_4bit_quant_type="fp4"),
        "quant_state.bitsandbytes__fp4 is missing",
    ),
    "static inputs claimed": (
        "ct_w8a8",
        lambda s: s["config_groups"]["group_0"]["input_activations"].update(dynamic=False),
        "input_scale is missing",
    ),
    "unknown layout": (
        "ct_w4",
        lambda s: s["config_groups"]["group_0"].update(format="x"),
        "not read",
    ),
    "nothing targeted": ("ct_w4", lambda s: s.update(config_groups={}), "no config_groups"),
}


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint of tests/quantized."""
    return lambda name: Path(shutil.copytree(MADE / name, tmp_path / name))


def assert_fault(folder: Path, part: str, sentence: str) -> None:
    proof = prove(folder)
    assert not proof.holds
    found = dict(reversed(proof.found))
    assert part in found, proof.found
    assert any(sentence in fault for name, fault in proof.found if name == part), proof.found


@pytest.mark.parametrize("case", TENSORS)
def test_what_is_done_to_tensors_is_named(case: str, copied: Callable[[str], Path]) -> None:
    name, change, part, sentence = TENSORS[case]
    folder = copied(name)
    edit(folder, change(tensors(folder)))
    assert_fault(folder, part, sentence)


@pytest.mark.parametrize("case", SETTINGS)
def test_what_the_configuration_makes_up_is_named(case: str, copied: Callable[[str], Path]) -> None:
    name, change, sentence = SETTINGS[case]
    folder = copied(name)
    configure(folder, change)
    assert_fault(folder, LAYER, sentence)


def test_a_group_of_other_layers_is_not_taken_for_that_of_all(
    copied: Callable[[str], Path],
) -> None:
    def change(settings: dict[str, Any]) -> None:
        whole = settings["config_groups"]["group_0"]
        assert whole["targets"] == ["Linear"]
        other = whole | {
            "targets": ["re:.*experts.*"],
            "weights": whole["weights"] | {"num_bits": 8},
        }
        settings["config_groups"] = {"group_0": other, "group_1": whole}

    folder = copied("ct_w4")
    configure(folder, change)
    assert prove(folder).holds


@pytest.mark.parametrize(
    ("name", "suffix", "change"),
    [
        ("ct_w4", ".weight_shape", lambda x: x[0]),
        ("ct_w4", ".weight_shape", lambda x: x.float()),
        ("ct_w4", ".weight_scale", lambda x: x.to(torch.int32)),
        ("torchao_int8", "._weight_scale", lambda x: x.new_empty(0)),
    ],
)
def test_a_layer_of_another_form_is_named_and_the_others_are_read(
    name: str, suffix: str, change: Callable[[Tensor], Tensor], copied: Callable[[str], Path]
) -> None:
    folder = copied(name)
    edit(folder, {LAYER + suffix: change(tensors(folder)[LAYER + suffix]).clone()})
    assert_fault(folder, LAYER, "")
    assert [layer.layer for layer in prove(folder).layers if layer.faults] == [LAYER]


@pytest.mark.parametrize("value", [-1, 0.5, [1], {"a": 1}, "x", True])
@pytest.mark.parametrize("key", ["quant_method", "ignore", "config_groups", "group_0", "targets"])
def test_a_configuration_of_another_form_is_no_traceback(
    key: str, value: object, copied: Callable[[str], Path]
) -> None:
    def change(settings: dict[str, Any]) -> None:
        groups = settings["config_groups"]
        inner = {"group_0": groups, "targets": groups["group_0"]}
        inner.get(key, settings)[key] = value

    folder = copied("ct_w4")
    configure(folder, change)
    with suppress(UserError):
        prove(folder)


@pytest.mark.parametrize(
    ("change", "part", "sentence"),
    [
        (float_instead(f"{EXPERT}.down_proj"), f"{EXPERT}.down_proj.weight", "expert is left in"),
        (
            lambda t: {name: None for name in t if name.startswith(EXPERT)},
            "model.layers.1.mlp.experts",
            "3 projections of its experts are missing, first 2.down_proj",
        ),
        (
            lambda t: {name: None for name in t if name.startswith(f"{EXPERT}.up_proj")},
            "model.layers.1.mlp.experts",
            "1 projections of its experts are missing, first 2.up_proj",
        ),
        (
            named(f"{EXPERT[:-1]}0.up_proj", f"{EXPERT}.up_proj", PACKED),
            f"{EXPERT}.up_proj",
            "its codes are those of model.layers.1.mlp.experts.0.up_proj",
        ),
        (
            lambda t: {f"{EXPERT}.up_proj.weight_scale": torch.full((64, 1), 1e-3)},
            f"{EXPERT}.up_proj",
            "not calibrated",
        ),
        (
            lambda t: {"model.layers.1.mlp.experts.gate_up_proj": torch.randn(4, 64, 32)},
            "model.layers.1.mlp.experts.gate_up_proj",
            "an expert is left in float32",
        ),
    ],
)
def test_experts_that_were_skipped_are_named(
    change: Change, part: str, sentence: str, tmp_path: Path
) -> None:
    folder = write_mixture(tmp_path / "mixture")
    assert prove(folder).found == []
    edit(folder, change(tensors(folder)))
    assert_fault(folder, part, sentence)


def test_experts_on_the_list_of_ignored_layers_are_named(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mixture", ignore=("re:.*experts.*",))
    changes: dict[str, Tensor | None] = {}
    for name in tensors(folder):
        if name.endswith("weight_shape") and "experts" in name:
            changes |= float_instead(name.removesuffix(".weight_shape"))({})
    edit(folder, changes)
    assert_fault(folder, f"{EXPERT}.down_proj.weight", "an expert is left in float32")
    assert_fault(folder, "checkpoint", "weights of linears are in floating point")


def test_experts_with_one_scale_each_that_are_all_alike_are_named(tmp_path: Path) -> None:
    made = {}
    for index in range(4):
        name = f"model.layers.0.mlp.experts.{index}.up_proj"
        made[f"{name}.weight"] = (torch.randn(64, 32) * 30).to(torch.float8_e4m3fn)
        made[f"{name}.weight_scale"] = torch.tensor([0.01 + index])
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    settings = packed_settings() | {"format": "float-quantized"}
    settings["config_groups"]["group_0"]["weights"] = weights
    folder = save(tmp_path / "mixture", made, settings)
    assert prove(folder).found == []
    edit(folder, {name: torch.tensor([0.5]) for name in made if name.endswith("scale")})
    assert_fault(
        folder, "model.layers.0.mlp.experts.*.up_proj", "all its 4 experts have the scale 0.5"
    )
    edit(folder, {name: torch.tensor([1.0]) for name in made if name.endswith("scale")})
    assert_fault(folder, "model.layers.0.mlp.experts.0.up_proj", "its only scale is 1")


@pytest.mark.parametrize(
    ("bits", "ordered", "version"),
    [(4, False, 1), (4, True, 1), (3, False, 1), (8, False, 2), (2, True, 2)],
)
def test_gptq_is_read_and_proven(bits: int, ordered: bool, version: int, tmp_path: Path) -> None:
    folder, values = write_gptq(tmp_path, bits, ordered=ordered, version=version)
    proof = prove(folder)
    assert proof.found == []
    assert {layer.bits for layer in proof.layers} == {bits}
    weight = open_checkpoint(folder).read(LAYER)
    groups = tensors(folder)[f"{LAYER}.g_idx"]
    expected = values[LAYER][:, groups.sort(stable=True).indices]
    torch.testing.assert_close(dequantized(weight), expected)


GPTQ: dict[str, tuple[Change, str]] = {
    "8-bit codes called 4": (
        lambda t: {f"{LAYER}.qweight": words(torch.randint(256, (32, 64)), 8).T},
        "its codes take 8 bits, and 4 are claimed",
    ),
    "no zero points": (lambda t: {f"{LAYER}.qzeros": None}, "qzeros is missing"),
    "short zero points": (
        lambda t: {f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"][:, :3]},
        "qzeros has rows of 12 bytes, and 32 codes of 4 bits take 16",
    ),
    "uneven groups": (
        lambda t: {f"{LAYER}.g_idx": torch.zeros(64, dtype=torch.int32)},
        "g_idx does not put its inputs into groups of the claimed size",
    ),
    "scale below float16": (scale_of(2**-23, ".scales"), "1 of its 64 scales are subnormal"),
    "infinite scale": (scale_of(torch.inf, ".scales"), "1 of its 64 scales are infinite"),
    "missing codes": (lambda t: {f"{LAYER}.qweight": None}, "qweight is missing"),
    "fewer rows": (
        lambda t: {f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:7]},
        "qweight has rows of 28 bytes",
    ),
}


@pytest.mark.parametrize("case", GPTQ)
def test_what_is_done_to_gptq_is_named(case: str, tmp_path: Path) -> None:
    change, sentence = GPTQ[case]
    folder, _ = write_gptq(tmp_path)
    edit(folder, change(tensors(folder)))
    assert_fault(folder, LAYER, sentence)


def test_a_tower_that_gptq_leaves_float_is_no_fault_but_a_decoder_layer_is(tmp_path: Path) -> None:
    folder, _ = write_gptq(tmp_path)
    edit(folder, {"visual.blocks.0.attn.qkv.weight": torch.randn(96, 32)})
    proof = prove(folder)
    assert proof.holds
    (tower,) = (part for part in proof.floats if part.kind == "linear")
    assert (tower.name, tower.why) == ("visual.blocks.0.attn.qkv.weight", "outside")
    edit(folder, {"model.layers.1.mlp.gate_proj.weight": torch.randn(64, 32)})
    assert_fault(folder, "model.layers.1.mlp.gate_proj.weight", "left in float32")
    configure(folder, lambda s: s.update(dynamic={"-:.*gate_proj": {}}))
    assert prove(folder).holds


def test_awq_is_read_and_proven(tmp_path: Path) -> None:
    folder, values = write_awq(tmp_path)
    assert prove(folder).found == []
    weight = open_checkpoint(folder).read(LAYER)
    torch.testing.assert_close(dequantized(weight), values[LAYER])
    edit(folder, {f"{LAYER}.scales": None})
    assert_fault(folder, LAYER, "scales is missing")
    configure(folder, lambda s: s.update(version="gemv"))
    assert_fault(folder, OTHER, "version 'gemv' of AWQ's layout is not read")


def test_awq_that_claims_8_bits_is_refused(tmp_path: Path) -> None:
    folder, _ = write_awq(tmp_path)
    configure(folder, lambda s: s.update(bits=8))
    assert_fault(folder, LAYER, "its codes take 4 bits, and 8 are claimed")


def test_layers_that_are_said_to_be_float_are_counted_and_no_fault(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("ct_w4")
    edit(folder, float_instead(LAYER)({}))
    configure(folder, lambda s: s["ignore"].append(LAYER))
    proof = prove(folder)
    assert proof.holds
    assert proof.float_share == pytest.approx((1184 + 2048) / (1184 + 18432))
    configure(folder, lambda s: s.update(ignore=["lm_head", "re:.*\\.1\\.mlp\\.down.*"]))
    assert prove(folder).holds
    configure(folder, lambda s: s.update(ignore=["lm_head", "re:(.*.*)*x"]))
    assert_fault(folder, f"{LAYER}.weight", "it may take for ever")


def test_a_head_that_no_list_leaves_out_is_a_fault(copied: Callable[[str], Path]) -> None:
    folder = copied("ct_w4")
    configure(folder, lambda s: s.update(ignore=[]))
    assert_fault(folder, "lm_head.weight", "left in float32")


def test_weights_that_are_zero_are_no_fault(copied: Callable[[str], Path]) -> None:
    folder = copied("ct_w4")
    held = tensors(folder)
    packed = held[f"{LAYER}.weight_packed"].clone()
    packed[0] = torch.tensor(-0x77777778, dtype=torch.int32)  # code 8 stands for zero
    scale = held[f"{LAYER}.weight_scale"].clone()
    scale[0] = 0
    edit(folder, {f"{LAYER}.weight_packed": packed, f"{LAYER}.weight_scale": scale})
    proof = prove(folder)
    assert proof.holds
    assert {layer.layer: layer.empty for layer in proof.layers}[LAYER] == 2


def test_scales_that_two_layers_of_one_shape_exchange_are_not_seen(
    copied: Callable[[str], Path],
) -> None:
    """What a checkpoint alone cannot tell: docs/prove.md says so."""
    folder = copied("ct_w4")
    held = tensors(folder)
    first, second = f"{LAYER}.weight_scale", f"{OTHER}.weight_scale"
    edit(folder, {first: held[second], second: held[first]})
    assert prove(folder).holds


def test_a_static_scale_of_inputs_that_was_never_set_is_named(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("ct_w8a8")
    configure(
        folder, lambda s: s["config_groups"]["group_0"]["input_activations"].update(dynamic=False)
    )
    layers = [name.removesuffix("_scale") for name in tensors(folder) if name.endswith("_scale")]
    names = [layer.removesuffix(".weight") + ".input_scale" for layer in layers]
    edit(folder, {name: torch.tensor([0.02]) for name in names})
    assert prove(folder).holds
    edit(folder, {f"{LAYER}.input_scale": torch.tensor([1.0])})
    assert_fault(folder, LAYER, "the scale of its input is 1: not calibrated")
    edit(folder, {f"{LAYER}.input_scale": torch.tensor([torch.nan])})
    assert_fault(folder, LAYER, "the scale of its input is zero, subnormal, negative or not finite")


def test_gguf_that_lies_is_named(tmp_path: Path) -> None:
    content = bytearray((MADE / "q4_0.gguf").read_bytes())
    file = tmp_path / "model.gguf"
    key = content.index(b"general.file_type") + len(b"general.file_type") + 4
    content[key] = 7  # mostly Q8_0
    file.write_bytes(content)
    assert_fault(file, "checkpoint", "are said to have 8 bits, and have 4")
    content[key] = 2
    file.write_bytes(content)
    assert prove(file).holds
    start = content.index(GgufFile(file)["blk.1.ffn_down.weight"][0].numpy().tobytes())
    content[start : start + 2] = np.array(np.nan, np.float16).tobytes()
    file.write_bytes(content)
    assert_fault(file, "blk.1.ffn_down", "1 of its 64 scales are not a number")


def test_one_part_of_a_split_gguf_is_not_the_whole(tmp_path: Path) -> None:
    content = (MADE / "q4_0.gguf").read_bytes()
    file = tmp_path / "model-00001-of-00003.gguf"
    header, keys = struct.unpack_from("<4sIQQ", content), b""
    for name, number in (("split.no", 0), ("split.count", 3)):
        keys += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IH", 2, number)
    keys += struct.pack("<QcIQ", 1, b"x", 8, -(len(keys) + 21) % 32) + bytes(-(len(keys) + 21) % 32)
    counts = struct.pack("<4sIQQ", *header[:3], header[3] + 3)
    file.write_bytes(counts + keys + content[24:])
    assert_fault(file, "checkpoint", "it is part 1 of 3, and the other parts are not read")


def test_a_tensor_that_a_gguf_holds_twice_is_named(tmp_path: Path) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.attn_q.weight")
    sound = {name: q8_0((32, 32), seed) for seed, name in enumerate(names)}
    file = write_gguf(tmp_path / "model.gguf", sound)
    assert prove(file).holds
    file.write_bytes(file.read_bytes().replace(b"blk.1", b"blk.0"))
    with pytest.raises(UserError, match=r"the tensor blk\.0\.attn_q\.weight is there twice"):
        prove(file)


def test_a_mixture_in_gguf_is_read_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    sound = {
        "token_embd.weight": (0, (4, 32), torch.randn(4, 32).numpy().tobytes()),
        "blk.0.attn_q.weight": q8_0((32, 32), 0),
        "blk.0.ffn_gate_inp.weight": (0, (4, 32), torch.randn(4, 32).numpy().tobytes()),
        "blk.0.ffn_up_exps.weight": q8_0((4, 64, 32), 1),
    }
    file = tmp_path / "model.gguf"
    proof = prove(write_gguf(file, sound))
    assert proof.found == []
    assert [layer.shape for layer in proof.layers] == [(32, 32), (4, 64, 32)]
    assert [part.kind for part in proof.floats] == ["table", "router"]

    kind, shape, content = sound["blk.0.ffn_up_exps.weight"]
    one = len(content) // 4
    copied = content[:one] + content[:one] + content[2 * one :]
    write_gguf(file, sound | {"blk.0.ffn_up_exps.weight": (kind, shape, copied)})
    part = "blk.0.ffn_up_exps"
    assert_fault(file, part, "its codes are those of blk.0.ffn_up_exps[0]")
    half = torch.randn(4, 64, 32).half().numpy().tobytes()
    write_gguf(file, sound | {"blk.0.ffn_up_exps.weight": (1, shape, half)})
    assert_fault(file, f"{part}.weight", "an expert is left in float16")
    write_gguf(file, sound | {"blk.0.attn_k.weight": (1, (32, 32), half[:2048])})
    assert_fault(file, "blk.0.attn_k.weight", "it is left in float16")
    write_gguf(file, sound | {"blk.0.attn_k.weight": (16, (256, 32), bytes(66 * 32))})
    assert_fault(file, "blk.0.attn_k", "GGUF's type 16 is not read")


def test_int4_of_torchao_is_read(copied: Callable[[str], Path]) -> None:
    """In the layout of its `Int4Tensor`: w = (code - 8) scale + zero point, two codes a byte."""
    folder = copied("torchao_int4")
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (32, 64), generator=random)
    scale, zero = torch.rand(2, 32, generator=random) + 0.1, torch.randn(2, 32, generator=random)
    signed = (codes - 8) & 15
    held = {
        f"{LAYER}._weight_qdata": (signed[:, ::2] | signed[:, 1::2] << 4).to(torch.uint8),
        f"{LAYER}._weight_scale": scale,
        f"{LAYER}._weight_zero_point": zero,
    }
    edit(folder, held)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    described = {"_type": "Int4Tensor", "_data": {"block_size": [1, 32], "shape": [32, 64]}}
    header[f"{LAYER}.weight"] = json.dumps(described)
    save_file(load_file(file), file, header)
    assert prove(folder).found == []
    expected = (codes - 8).view(32, 2, 32) * scale.T[..., None] + zero.T[..., None]
    found = dequantized(open_checkpoint(folder).read(LAYER))
    torch.testing.assert_close(found, expected.flatten(1))
    header.pop(f"{LAYER}.weight")
    save_file(load_file(file), file, header)
    assert_fault(folder, LAYER, "the header of its file does not describe its weight")
