"""A linear layer that computes with quantized weights and inputs, simulated in floating point.

The weight is stored dequantized, so that a forward pass quantizes only its input; its integers are
`integers()`, since encoding dequantized values gives back their codes.

A static scale per input channel cannot be pulled out of an integer product: it sits inside the sum.
It is therefore folded into the weight before that is quantized:

    y_n = sum_k (q_k - z_k) s_k W_nk + b_n = sum_k (q_k - z_k) W'_nk + b_n,    W' = W diag(s)

so the layer quantizes W' and multiplies it with q - z. What the simulation computes is then exactly
what integers compute (q W' minus the constant z W', which an integer layer keeps as a bias).

In float32 every value and every sum is rounded, and which way a rounding falls may move an input of
the next layer by a whole step. `compute_in_float64` has an output rounded once, from a sum that is
exact but for a share of 1e-16: what any packed product must give that sums integers exactly.

Left out: packed storage and integer kernels; nothing here is smaller or faster than float.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.errors import RunError
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer


class QuantLinear(nn.Module):
    """Simulates `y = x_hat W_hat^T + b`.

    Build it with `from_linear`. With `keep_float` the float weight stays as a parameter and is
    quantized in every forward pass with straight-through gradients, and so does the bias, for
    fine-tuning with quantization in the loop; `freeze` ends that.

    Attributes:
        weight: dequantized weight [out, in], float32; None while the float weight is kept. Of a
            folding input quantizer it is that of W' (see above).
        exact: the weight is float64, not rounded to float32, and the product is computed in it.
        float_weight: the float weight [out, in] before quantization, or None.
        layer_name: the full name in the model, for errors and records.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer,
        layer_name: str = "",
    ) -> None:
        """Takes a weight that is already quantized and dequantized by `weight_quantizer`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.layer_name = layer_name
        self.float_weight: nn.Parameter | None = None
        self.exact = False
        self.register_buffer("weight", weight.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer,
        keep_float: bool = False,
        layer_name: str = "",
    ) -> "QuantLinear":
        """Quantizes a linear.

        Args:
            linear: left as it is.
            weight_quantizer: made for `folded_weight(linear.weight, input_quantizer)`.
            input_quantizer: of the layer's input.
            keep_float: keep the float weight trainable.
            layer_name: the full name in the model.
        """
        weight = folded_weight(linear.weight, input_quantizer)
        layer = cls(
            weight_quantizer(weight), linear.bias, weight_quantizer, input_quantizer, layer_name
        )
        if keep_float:
            layer.float_weight = nn.Parameter(weight.clone())
            layer.weight = None
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out] in the dtype of `x`.

        Raises:
            RunError: if `x` holds NaN or infinity; clamping would hide the latter.
        """
        self._check_finite(x)
        return F.linear(self._quantized_input(x), self.quantized_weight(), self.bias).to(x.dtype)

    def quantized_weight(self) -> Tensor:
        """The dequantized weight [out, in], folded; differentiable while the float one is kept."""
        if self.float_weight is not None:
            return self.weight_quantizer(self.float_weight)
        assert self.weight is not None
        return self.weight

    def weight_codes(self) -> Tensor:
        """The codes of the weight, [out, in] uint8."""
        return self.weight_quantizer.quantize(self.quantized_weight().detach())

    @torch.no_grad()
    def freeze(self) -> None:
        """Quantizes the float weight for good and drops it; nothing to do if there is none."""
        weight, bias = self.quantized_weight(), self.bias
        self.float_weight = None
        self.weight = weight
        if isinstance(bias, nn.Parameter):
            del self.bias
            self.register_buffer("bias", bias.detach())

    @torch.no_grad()
    def compute_in_float64(self) -> None:
        """Computes the product in float64 from now on; not for a layer whose float weight is kept.

        Operands are q - z times their scale, not rounded to float32 before they are multiplied.
        """
        self.exact = True
        self.weight = self.weight_quantizer.dequantize(self.weight_codes(), torch.float64)
        if self.bias is not None:
            self.bias = self.bias.double()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _quantized_input(self, x: Tensor) -> Tensor:
        """x_hat, or q - z where scales are folded."""
        folding = _folding(self.input_quantizer)
        if folding is not None:
            steps = folding.centered(x)
            return steps.double() if self.exact else steps
        if self.exact:
            static = self.input_quantizer.for_tokens(x)
            return static.dequantize(static.quantize(x), torch.float64)
        return self.input_quantizer(x)

    def _check_finite(self, x: Tensor) -> None:
        # One pass: a sum is not finite if any element is not. It may also overflow: look closely
        # before accusing.
        if not math.isfinite(x.detach().sum(dtype=torch.float32).item()) and not bool(
            torch.isfinite(x).all()
        ):
            raise RunError(f"the input of {self.layer_name or 'a linear'} is not finite")


def compute_in_float64(model: nn.Module) -> None:
    """Has every quantized linear of a model compute its product in float64."""
    for part in model.modules():
        if isinstance(part, QuantLinear):
            part.compute_in_float64()


def folded_weight(weight: Tensor, input_quantizer: Quantizer) -> Tensor:
    """The float weight [out, in] to quantize: W, or W diag(s) if the input's scales are folded."""
    weight = weight.detach().float()
    folding = _folding(input_quantizer)
    return weight * folding.scale if folding else weight


def _folding(input_quantizer: Quantizer) -> UniformQuantizer | None:
    """The input's quantizer if its scales are moved into the weight."""
    if isinstance(input_quantizer, UniformQuantizer) and input_quantizer.folds:
        return input_quantizer
    return None
