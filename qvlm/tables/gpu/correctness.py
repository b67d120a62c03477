"""The products of every packed form against float64, as a share of the derived bound."""

import copy

import torch
from torch import Tensor, nn

from qvlm.packing import PackedLinear, accumulation_bound
from qvlm.packing.kernels import triton_inputs
from qvlm.packing.kernels.reference import float_weight
from qvlm.packing.kernels.triton import TRITON, input_grid, input_layout
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.tables.gpu.bench import Bench, Measures
from qvlm.tables.gpu.forms import Form


def layer_of(bench: Bench, form: Form, shape: tuple[int, int]) -> PackedLinear:
    """Returns a packed layer of a shape [out, in] with inputs as the language model's."""
    torch.manual_seed(sum(shape))
    linear = nn.Linear(shape[1], shape[0], bias=False, device=bench.device)
    quantization = form.quantization(bench.sizes.group)
    quantized = quantize_uncalibrated(
        linear, quantization.weight, quantization.language, form.normal_float
    )
    return PackedLinear.from_quantized(quantized, "triton")


def correctness(bench: Bench, form: Form) -> Measures:
    """Checks the products of a form for all shapes and rows."""
    largest, wrong, count = 0.0, 0, 0
    for shape in bench.sizes.shapes:
        layer = layer_of(bench, form, shape)
        for rows in bench.sizes.rows:
            x = torch.randn(rows, shape[1], device=bench.device)
            share, integers = share_of_bound(layer, x)
            largest = share if not share <= largest else largest  # NaN counts as the largest
            wrong, count = wrong + integers, count + 1
            if not share <= 1 or integers:
                print(f"  {form.name} {shape} rows={rows}: {share} of the bound, {integers} wrong")
    return {
        "largest error / bound": (f"{largest:.3g}", "1"),
        "wrong integers of inputs": (wrong, "1"),
        "within the bound": ("yes" if largest <= 1 and not wrong else "NO", ""),
        "cases": (count, "1"),
    }


@torch.no_grad()
def share_of_bound(layer: PackedLinear, x: Tensor) -> tuple[float, int]:
    """Compares a product with float64.

    Scales of tokens are computed on the CPU, as those of the reference are: on a GPU, PyTorch
    divides by a number by multiplying with its reciprocal.

    Args:
        layer: Packed layer of whole chunks.
        x: Input, [rows, in].

    Returns:
        Largest error as a share of `accumulation_bound`, and the number of wrong integers of the
        quantized input.
    """
    if layer.form.inputs == "token":
        on_cpu = copy.deepcopy(layer).cpu().stored_steps(x.cpu())
        steps, scale, _ = (part.to(x.device) for part in on_cpu)
    else:
        steps, scale, _ = layer.stored_steps(x)
    wrong = 0
    if layer.form.weight == "uniform":
        grid, layout = input_grid(layer, x), input_layout(layer)
        q, sums = triton_inputs.quantize(x, grid, layout)
        found = q.transpose(1, 2).reshape(len(x), -1).float()
        if layout.bits == 8:
            found += 128 - grid[1].float()
        wrong = int((found != steps).sum())
        wrong += int((steps.unflatten(1, (-1, layout.chunk)).sum(2) != sums.T).sum())
    weight = float_weight(layer, slice(0, layer.out_features))
    expected = (steps.double() * scale.double()) @ weight.double().T
    error = (TRITON.linear(layer, x, None).double() - expected).abs()
    return float((error / accumulation_bound(layer, x, TRITON.name)).max()), wrong
