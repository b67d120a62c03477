"""The kernel `triton`: when it serves, and its products interpreted and compiled for GPUs.

Triton must be imported with its interpreter switched on, so those checks run in their own process.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qvlm.errors import UserError
from qvlm.packing.formats import unit
from qvlm.packing.kernels import triton as wrapper
from qvlm.packing.layer import PackedLinear
from tests.helpers.interpreter import HAS_TRITON, helper, interpreted, needs_triton
from tests.helpers.layers import quantized

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


@needs_triton
@pytest.mark.parametrize("checks", ["triton_interpreted.py", "triton_chunks.py"])
def test_kernels_compute_the_reference_under_the_interpreter(checks: str) -> None:
    done = interpreted("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", helper(checks))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("capability", "bits", "inputs", "rows"),
    [
        (80, 4, "static", 16),
        (90, 4, "clusters", 64),
        (80, 8, "token", 64),
        (90, 8, "folded", 128),
        (90, 6, "token", 64),
    ][: None if HAS_TRITON else 1],  # one line among those that were skipped is enough
)
def test_kernels_compile_for_gpus(
    capability: int,
    bits: int,
    inputs: str,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks PTX code, without a GPU: int8 tensor cores, exact division, outputs rounded once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from qvlm.packing.kernels import triton_kernels

    per_unit, unit_bytes = unit(bits)
    constants: dict[str, object] = {
        "TOKEN": inputs == "token",
        "FOLDS": inputs == "folded",
        "CLUSTERS": inputs == "clusters",
        "BIAS": True,
    }
    constants |= {"INPUT_BITS": bits, "BITS": bits, "PER_UNIT": per_unit}
    constants |= {"UNIT_BYTES": unit_bytes, "BLOCK_UNITS": 64, "BLOCK_OUT": 32}
    pointers = {"x_at": "*bf16", "codes_at": "*u8", "weight_zero_at": "*u8", "y_at": "*bf16"}
    kernel = triton_kernels._product
    for block_rows in (rows, 1):
        fixed = constants | {"BLOCK_ROWS": block_rows}
        code = compiled(kernel, fixed, pointers, capability)
        assert "div.rn.f32" in code and "cvt.rn.bf16" in code
        assert (".s32.s8.s8" in code) == (block_rows > 1)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90][: None if HAS_TRITON else 1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", ["static", "token"])
def test_products_of_chunks_compile_for_gpus(
    capability: int, bits: int, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks PTX code, without a GPU: dp4a, tensor cores, and launches that wait for each other."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from qvlm.packing.kernels import triton_inputs, triton_products

    overlap = capability >= 90
    token = inputs == "token"
    shared: dict[str, object] = {"CHUNK": 64, "INPUT_BITS": bits, "TOKEN": token, "FOLDS": False}
    shared["OVERLAP"] = overlap
    tile = {"CLUSTERS": not token, "BIAS": True, "BITS": bits, "BLOCK_OUT": 32, "EMULATE": False}
    source = {"ORDERED": not token, "PLANES": 8 // bits, "BLOCK": 4, "SOURCE": 0 if token else 2}
    source |= {"ADD": not token, "WHOLE": 256}
    bytes_ = {"codes_at": "*u8", "weight_zero_at": "*u8", "offset_at": "*i32", "y_at": "*bf16"}
    words = bytes_ | {"codes_at": "*i32", "q_at": "*i32"}
    inputs_of = {"x_at": "*bf16", "other_at": "*bf16", "weight_at": "*bf16", "added_at": "*bf16"}
    inputs_of |= {"order_at": "*i32", "q_at": "*i8", "epsilon": "fp32"}
    few, many = triton_products._few_rows, triton_products._many_rows
    for kernel, constants, pointers, instruction in (
        (few, shared | tile | {"BLOCK_CHUNKS": 4}, words, "dp4a"),
        (many, shared | tile | {"BLOCK_ROWS": 16}, bytes_ | {"q_at": "*i8"}, ".s32.s8.s8"),
        (triton_inputs._quantize, shared | source, inputs_of, "div.rn.f32"),
    ):
        code = compiled(kernel, constants, pointers, capability)
        assert instruction in code
        assert ("griddepcontrol" in code) == overlap


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int) -> str:
    """Compiles a kernel for a GPU and returns its PTX code.

    Arguments whose type is not given are float32 tensors, or integers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        argument: types.get(argument, "*fp32" if argument.endswith("_at") else "i32")
        for argument in kernel.arg_names
    } | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])


@needs_triton
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvlm.packing.kernels import triton_kernels

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = triton_kernels.obstacle.__wrapped__(torch.device("cuda", 0))
    assert found == "the GPU's compute capability is (7, 5), below (8, 0)"


def test_triton_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.find_spec("qvlm.packing.kernels.triton_kernels")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.obstacle(torch.device("cuda", 0)) == "Triton is not installed"


def test_a_cpu_never_chooses_triton() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (4, 8):
            packed = PackedLinear.from_quantized(quantized((16, 64), (bits, bits))[0])
            assert "triton" not in packed.serving()
            assert {packed.choose(rows) for rows in (1, 4, 64)}.isdisjoint({"triton"})
    with pytest.raises(UserError, match=r"triton.*some.layer.*not on a GPU.*Choose one of: auto"):
        packed.kernel = "triton"


def test_layers_that_triton_cannot_take_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "device_obstacle", lambda device: None)
    served, _ = quantized((16, 64), inputs="per_token")
    assert PackedLinear.from_quantized(served, "triton").choose(1) == "triton"
    for refused, reason in (
        (quantized((16, 64), weight="normal_float"), "neither uniform nor NormalFloat"),
        (quantized((16, 66), group_size=3), "inside a byte"),
    ):
        with pytest.raises(UserError, match=reason):
            PackedLinear.from_quantized(refused[0], "triton")
    clusters: dict[str, Any] = {"inputs": "per_channel_group"}
    assert "triton" in PackedLinear.from_quantized(quantized((16, 64), **clusters)[0]).serving()
    scattered = quantized((16, 64), **clusters, ordered=False)[0]
    with pytest.raises(UserError, match="differ in the scale of their inputs"):
        PackedLinear.from_quantized(scattered, "triton")


def test_a_gpu_without_triton_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedLinear.from_quantized(quantized((16, 64))[0])
    monkeypatch.setattr(wrapper, "device_obstacle", lambda device: "Triton is not installed")
    packed.codes = _OnGpu(packed.codes)
    with pytest.warns(RuntimeWarning, match="Triton is not installed") as caught:
        assert {packed.choose(rows) for rows in (1, 1, 64)} == {"reference"}
    assert len(caught) == 1


class _OnGpu(torch.Tensor):
    """A tensor on the CPU whose device claims to be a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)
