"""Every instruction set gives the bits that integers and IEEE 754 define.

On a CPU with AVX-512 the products for AVX2, and for VNNI on vectors of 256 bits, run here too.
Those for ARM run in an emulator, in `test_arm.py`.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qvlm.packing.formats import pack
from qvlm.packing.kernels import native_build
from qvlm.packing.kernels import native_library as native
from qvlm.quantization import TokenQuantizer, UniformQuantizer
from qvlm.quantization.hadamard import walsh_hadamard
from tests.helpers.native_cases import BITS, integer_case, integer_cases

pytestmark = pytest.mark.instruction_set


def sets() -> list[str]:
    """Instruction sets of this machine that are not left out."""
    left_out = native_build.left_out()
    try:
        return [name for name in native_build.supported() if not {name, "native"} & {*left_out}]
    except OSError:  # there is no compiler
        return []


SETS = sets()
if not SETS:
    pytest.skip("no product in C runs here", allow_module_level=True)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setattr(native, "_library", lambda: native.library_of(name))
    return name


@pytest.mark.parametrize("few_rows", [0, 10**9], ids=["tiles", "rows"])
@pytest.mark.parametrize("bits", BITS)
def test_integer_products_have_the_bits_of_their_definition(
    bits: tuple[int, int],
    few_rows: int,
    instruction_set: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of runs are exact; scaled sums are added run by run, each operation rounded apart."""
    monkeypatch.setattr(native, "FEW_ROWS", few_rows)
    for case in integer_cases(bits):
        found = native.integer_product(case.weight(), case.x, case.scale, case.zero_point, bits[1])
        assert torch.equal(found, case.expected()), case


@pytest.mark.parametrize("few_rows", [0, 10**9], ids=["tiles", "rows"])
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_no_sum_saturates(
    weight_bits: int, few_rows: int, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest codes meet the largest steps of either sign, over whole runs, for all widths.

    AVX2 adds products in 16 bits, which hold few of these.
    """
    monkeypatch.setattr(native, "FEW_ROWS", few_rows)
    for input_bits in range(2, 9):
        top = 2**input_bits - 1
        for zero in (0, top, 128 if input_bits == 8 else 1):
            case = integer_case((weight_bits, input_bits), (5, 5, 1040, 1040), "tensor", seed=0)
            case.codes.fill_(2**weight_bits - 1)
            case.codes[1] = torch.arange(1040) % 2 * (2**weight_bits - 1)
            case.zero[:, :] = torch.tensor([0, 0, 1, 2, 2**weight_bits - 1])[:, None]
            case.zero_point.fill_(zero)
            steps = torch.tensor([0, top, 0, top, 0]).view(-1, 1).repeat(1, 1040) - zero
            steps[2:4, ::2] = top - zero - steps[2:4, ::2] - zero
            case.x = steps * case.scale
            found = native.integer_product(
                case.weight(), case.x, case.scale, case.zero_point, input_bits
            )
            assert torch.equal(found, case.expected()), (input_bits, zero)


@pytest.mark.parametrize("weight", ["uniform", "normal_float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_float_products_are_the_same_on_all(weight: str, bits: int) -> None:
    """16 lanes add up in one order, and bf16's products are exact in float32.

    On a machine with one set only, its results are held to the definition.
    """
    generator = torch.Generator().manual_seed(bits)
    for rows, out, width, group in ((1, 12, 256, 64), (6, 5, 192, 64), (3, 3, 48, 8)):
        groups = width // group
        codes = torch.randint(2**bits, (out, width), generator=generator).to(torch.uint8)
        made = native.Weight(pack(codes, bits), width, bits, group)
        if weight == "uniform":
            zero = torch.randint(2**bits, (out, groups), generator=generator).to(torch.uint8)
            scale = torch.rand(out, groups, generator=generator)
            made.uniform(scale, zero)
            values = codes.view(out, groups, group).float() - zero[..., None]
            expected = (values * scale[..., None]).flatten(1)
        else:
            levels = torch.randn(2**bits, generator=generator)
            absmax = torch.rand(out * groups, generator=generator)
            made.normal_float(levels, absmax, None, torch.zeros(256), 0.0, 1)
            values = levels[codes.long()].view(out, groups, group)
            expected = (values * absmax.view(out, groups, 1)).flatten(1)
        x = torch.randn(rows, width, generator=generator)
        found = {name: products(name, made, x) for name in SETS}
        for name, outputs in found.items():
            for output, other in zip(outputs, found[SETS[0]], strict=True):
                assert torch.equal(output, other), name
            assert torch.equal(outputs[0], expected)
            assert torch.equal(outputs[1], expected.bfloat16())
            assert torch.allclose(outputs[2], x @ expected.T, rtol=1e-4, atol=1e-4)


def products(name: str, weight: native.Weight, x: Tensor) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", lambda: native.library_of(name))
        every = slice(0, weight.out)
        found = [
            native.dequantize(weight, every),
            native.dequantize(weight, every, torch.bfloat16),
            native.float_product(weight, x),
        ]
        return [*found, native.rounded_product(weight, x)] if weight.is_paired() else found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_grids_of_tokens_are_those_of_the_quantizer(
    bits: int, dtype: torch.dtype, instruction_set: str
) -> None:
    """To the bit, for rows of any sign and size and for widths that no vector divides."""
    torch.manual_seed(bits)
    largest = torch.finfo(torch.float32).max
    for width in (1, 7, 16, 37, 128):
        x = torch.randn(12, width) * 10.0 ** torch.arange(-6, 6)[:, None]
        special = [0.0, 1e-38, 1e-45, largest, -largest, 3.0, -3.0]
        x = torch.cat([x, x.abs(), -x.abs(), *(torch.full((1, width), v) for v in special)])
        x = x.to(dtype).nan_to_num(posinf=1e38, neginf=-1e38)
        for ratio in (1.0, 0.7, 0.3):
            grid = TokenQuantizer(bits, ratio).for_tokens(x)
            scale, zero_point = native.token_grids(x, ratio, bits)
            assert torch.equal(scale, grid.scale)
            assert torch.equal(zero_point, grid.zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 80, 128, 512])
def test_attention_is_the_same_on_all(width: int, dtype: torch.dtype) -> None:
    """Sums have one order. Keys are part of a longer cache, and every head has a query."""
    for batch, key_heads, shared, keys in ((1, 5, 1, 600), (2, 3, 5, 37), (3, 1, 4, 1)):
        torch.manual_seed(keys)
        query = torch.randn(batch, key_heads * shared, width).to(dtype)
        key, value = torch.randn(2, batch, key_heads, keys + 9, width).to(dtype)[:, :, :, :keys]
        mask = torch.rand(batch, keys) < 0.7
        mask[:, -1] = True
        exact = scaled_dot_product_attention(
            query[:, :, None].double(),
            key.double(),
            value.double(),
            mask[:, None, None],
            enable_gqa=True,
        )[:, :, 0]
        outputs = [native.attend(query, key, value, mask, width**-0.5, name) for name in SETS]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        near = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert torch.allclose(outputs[0].double(), exact, rtol=near, atol=near)


def test_attention_leaves_out_keys_and_hides_nothing(instruction_set: str) -> None:
    query, key, value = torch.randn(1, 2, 32), *torch.randn(2, 1, 2, 20, 32)
    mask = torch.arange(20)[None] >= 7
    found = native.attend(query, key, value, mask, 1.0)
    assert torch.equal(
        found,
        native.attend(
            query, 100 * key * ~mask[..., None] + key * mask[..., None], value, mask, 1.0
        ),
    )
    assert torch.equal(native.attend(query, key, value, mask & False, 1.0), torch.zeros(1, 2, 32))
    alone = torch.arange(20)[None] == 3
    assert torch.equal(native.attend(query, key, value, alone, 1.0), value[:, :, 3])
    key[0, 1, 9] = torch.nan
    broken = native.attend(query, key, value, None, 1.0)
    assert broken[0, 0].isfinite().all() and broken[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hadamard_transform_is_its_definition(dtype: torch.dtype, instruction_set: str) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        x = torch.randint(-8, 9, (3, 5, size)).to(dtype)
        assert torch.equal(native.walsh_hadamard(x), (x.double() @ matrix).to(dtype))
        x = torch.randn(7, 3, size, dtype=dtype).transpose(0, 1)
        assert torch.equal(native.walsh_hadamard(x), walsh_hadamard(x))
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert native.walsh_hadamard(torch.empty(0, 4)).shape == (0, 4)


Grid = tuple[Tensor, Tensor]


def grids(kind: str, x: Tensor, bits: int) -> tuple[Grid | None, Grid]:
    """The grid that a layer is given for an input [rows, in], and the one that it then has."""
    if kind == "token":
        return None, native.token_grids(x, 0.9, bits)
    shape = () if kind == "tensor" else x.shape[1:]
    own = 0.1 + torch.rand(shape), torch.randint(0, 2**bits, shape).float()
    return own, own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("grid", ["token", "tensor", "channel"])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 70])
def test_a_layer_is_its_steps(
    rows: int, grid: str, dtype: torch.dtype, instruction_set: str
) -> None:
    """Grids of tokens, sums, the input's scale and the bias; nothing else is rounded."""
    torch.manual_seed(rows)
    for bits, out, width, group in ((4, 33, 128, 32), (8, 16, 96, 96), (5, 7, 40, 40)):
        codes = pack(torch.randint(0, 2**bits, (out, width), dtype=torch.uint8), bits)
        scale, zero = torch.rand(out, width // group), torch.randint(0, 2**bits, (out, 1))
        zero = zero.expand(scale.shape).to(torch.uint8).contiguous()
        weight = native.Weight(codes, width, bits, group).uniform(scale, zero)
        x, order = torch.randn(rows, width).to(dtype), torch.randperm(width)
        given, used = grids(grid, x, bits)
        sums = "integer" if grid == "channel" else "scaled"
        shuffled = torch.empty_like(x).index_copy_(1, order, x)
        for bias in (None, torch.randn(out)):
            expected = native.integer_product(weight, x, *used, bits)
            if sums == "scaled":
                expected.mul_(used[0])
            if bias is not None:
                expected.add_(bias)
            for entry, by in ((x, None), (shuffled, order.int())):
                layer = native.Layer(weight, bits, given, 0.9, sums, by)
                found = native.linear(layer, entry, bias)
                assert found is not None
                assert torch.equal(found.to(dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", ["token", "tensor", "channel"])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 70])
def test_a_layer_of_floats_is_its_steps(
    rows: int, grid: str, dtype: torch.dtype, instruction_set: str
) -> None:
    """The quantized input, the product with what the codes stand for, and the bias."""
    torch.manual_seed(rows)
    for bits, out, width, group in ((4, 33, 128, 64), (8, 16, 96, 96), (5, 7, 40, 40)):
        codes = pack(torch.randint(0, 2**bits, (out, width), dtype=torch.uint8), bits)
        groups = out, width // group
        uniform = native.Weight(codes, width, bits, group).uniform(
            torch.rand(groups), torch.randint(0, 2**bits, groups, dtype=torch.uint8)
        )
        levels = torch.linspace(-1, 1, max(2**bits, 16))
        normal = native.Weight(codes, width, bits, group).normal_float(
            levels, torch.rand(out * groups[1]), None, torch.zeros(256), 0.0, 1
        )
        x = torch.randn(rows, width).to(dtype)
        given, used = grids(grid, x, bits)
        for weight, sums in ((uniform, "float"), (uniform, "steps"), (normal, "float")):
            rounds = dtype == torch.bfloat16 and weight.is_paired()
            x_hat = native.quantized_input(x, *used, bits, in_steps=sums == "steps")
            multiply = native.rounded_product if rounds else native.float_product
            layer = native.Layer(weight, bits, given, 0.9, sums, None)
            for bias in (None, torch.randn(out)):
                expected = multiply(weight, x_hat)
                if bias is not None:
                    expected.add_(bias)
                found = native.linear(layer, x, bias)
                assert found is not None
                assert torch.equal(found.to(dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_notices_what_is_not_finite(dtype: torch.dtype, instruction_set: str) -> None:
    codes = torch.zeros(3, 40, dtype=torch.uint8)
    weight = native.Weight(codes, 40, 8, 40).uniform(torch.ones(3, 1), codes[:, :1].contiguous())
    layer = native.Layer(weight, 8, None, 1.0, "scaled", None)
    largest = torch.finfo(torch.bfloat16).max / 2
    for rows in (1, 30_000):  # in one thread and in several
        x = torch.full((rows, 40), largest, dtype=dtype)
        assert native.linear(layer, x, None) is not None
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0, rows * 40 - 1, rows * 20 + 7):
                wrong = x.clone()
                wrong.view(-1)[place] = value
                assert native.linear(layer, wrong, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_are_quantized_as_the_quantizer_does(
    bits: int, dtype: torch.dtype, instruction_set: str
) -> None:
    torch.manual_seed(bits)
    for rows, width in ((1, 7), (5, 37), (300, 128)):
        x, order = torch.randn(rows, width).to(dtype), torch.randperm(width)
        stored = x[:, order]
        for shape in ((), (width,)):  # one range, or one for each channel
            own = UniformQuantizer.from_range(-torch.rand(shape), 2 * torch.rand(shape), bits)
            given = x, own.scale, own.zero_point, bits, order.int()
            assert torch.equal(native.quantized_input(*given), own(stored))
            assert torch.equal(native.quantized_input(*given, in_steps=True), own.centered(stored))
        own = TokenQuantizer(bits).for_tokens(x)
        assert torch.equal(native.quantized_input(x, own.scale, own.zero_point, bits), own(x))
    assert (
        native.quantized_input(torch.empty(0, 4), torch.ones(()), torch.zeros(()), 4).numel() == 0
    )
