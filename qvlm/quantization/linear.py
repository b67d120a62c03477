"""A linear layer with quantized weights and inputs, simulated in floating point.

The weight is stored dequantized, so that a forward pass quantizes only its input. `weight_codes()`
returns its codes, since quantizing dequantized values yields their codes again.

A static scale per input channel stands inside the sum of an integer product and cannot be taken out
of it. It is therefore folded into the weight before the weight is quantized:

    y_n = sum_k (q_k - z_k) s_k W_nk + b_n = sum_k (q_k - z_k) W'_nk + b_n,    W' = W diag(s)

The layer quantizes W' and multiplies it with q - z. So the simulation computes exactly what
integers compute: q W' minus the constant z W', which an integer layer stores as a bias.

A layer may transform its input by a Hadamard matrix H before it quantizes it (`hadamard`). Its
weight has then absorbed the inverse: W x = (W H^T)(H x), and W H^T takes the place of W above.

float32 rounds every value and every partial sum, and one such rounding can move an input of the
next layer to the neighboring code. In a model in float64, q - z times its scale is exact and sums
are in float64, as they are in a product that sums integers. After `compute_in_float64` a layer of
any other model computes so too, and rounds its output to the type of the model.

Not here: packed storage and integer kernels. A simulated layer is neither smaller nor faster.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.errors import RunError
from qvlm.quantization.first_token import FirstToken, with_first_in_float
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.precision import settled, wide
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer


class QuantLinear(nn.Module):
    """Simulates `y = x_hat W_hat^T + b`; `from_linear` makes it.

    With `keep_float`, float weight and bias stay trainable parameters, and every forward pass
    quantizes the weight with straight-through gradients: fine-tuning with quantization in the
    loop. `freeze` ends it.

    Attributes:
        weight: Dequantized weight [out, in], float32 or float64, which is the type that the layer
            computes in; None while the float weight is kept. If the input quantizer folds, it is
            that of W' (see the module's docstring). After `keep_in`, of 16 bits.
        float_weight: Float weight [out, in] before quantization, or None.
        layer_name: Full name in the model, for errors and records.
        first_token: Knowledge of first positions, whose input stays in floating point, or None.
        hadamard: Whether the input is transformed before it is quantized (see the module).
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
        hadamard: bool = False,
    ) -> None:
        """Takes a weight [out, in] that `weight_quantizer` has quantized and dequantized."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.layer_name = layer_name
        self.hadamard = hadamard
        self.float_weight: nn.Parameter | None = None
        self.first_token: FirstToken | None = None
        weight = wide(weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().to(weight, copy=True))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer,
        keep_float: bool = False,
        layer_name: str = "",
        hadamard: bool = False,
    ) -> "QuantLinear":
        """Quantizes a linear.

        Args:
            linear: Float linear, which is not changed.
            weight_quantizer: Quantizer of `folded_weight(linear.weight, ...)`.
            input_quantizer: Quantizer of the layer's input.
            keep_float: Whether the float weight and the bias stay trainable.
            layer_name: Full name in the model.
            hadamard: Whether the input is transformed before it is quantized.
        """
        weight = folded_weight(linear.weight, input_quantizer, hadamard)
        layer = cls(
            weight_quantizer(weight),
            linear.bias,
            weight_quantizer,
            input_quantizer,
            layer_name,
            hadamard,
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
            RunError: If an element of `x` is NaN or infinite. Clamping would hide the latter.
        """
        if not all_finite(x):
            raise RunError(f"the input of {self.layer_name or 'a linear'} is not finite")
        weight, folding = self.quantized_weight(), _folding(self.input_quantizer)
        computing = torch.promote_types(weight.dtype, torch.float32)
        read = (hadamard_transform(x) if self.hadamard else x).to(computing)
        unit = None if folding is None else folding.scale
        inputs = with_first_in_float(self._quantized_input(read), read, unit, self.first_token)
        return F.linear(inputs.to(weight.dtype), weight, self.bias).to(x.dtype)

    def quantized_weight(self) -> Tensor:
        """The dequantized weight [out, in]; differentiable while the float weight is kept."""
        if self.float_weight is not None:
            return self.weight_quantizer(self.float_weight)
        assert self.weight is not None
        return self.weight

    def weight_codes(self) -> Tensor:
        """The codes of the weight, [out, in] uint8."""
        return self.weight_quantizer.quantize(self.quantized_weight().detach())

    @torch.no_grad()
    def freeze(self) -> None:
        """Quantizes the float weight for good and drops it; does nothing if there is none."""
        weight, bias = self.quantized_weight(), self.bias
        self.float_weight = None
        self.weight = weight
        if isinstance(bias, nn.Parameter):
            del self.bias
            self.register_buffer("bias", bias.detach())

    @torch.no_grad()
    def keep_in(self, dtype: torch.dtype) -> None:
        """Rounds the dequantized weight to a type of 16 bits, which takes half of the memory.

        The layer then computes in that type and has no codes any more. This is for a layer that is
        going to be undone, as in a simulation that something else is tuned in.
        """
        assert self.weight is not None
        self.weight = self.weight.to(dtype)
        if self.bias is not None:
            self.bias = self.bias.to(dtype)

    @torch.no_grad()
    def compute_in_float64(self) -> None:
        """Makes the layer compute its product in float64; its float weight must not be kept."""
        self.weight = self.weight_quantizer.dequantize(self.weight_codes(), torch.float64)
        if self.bias is not None:
            self.bias = self.bias.double()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _quantized_input(self, x: Tensor) -> Tensor:
        """Returns x_hat, or q - z if the scales are folded into the weight."""
        folding = _folding(self.input_quantizer)
        return self.input_quantizer(x) if folding is None else folding.centered(x)


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite, found in one pass that allocates nothing.

    A sum is not finite if an element is not. The sum of finite elements may overflow, so that a sum
    that is not finite requires a look at every element.
    """
    total = x.detach().sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(torch.isfinite(x).all())


def compute_in_float64(model: nn.Module) -> None:
    """Makes every quantized linear of a model compute its product in float64."""
    for part in model.modules():
        if isinstance(part, QuantLinear):
            part.compute_in_float64()


def folded_weight(weight: Tensor, input_quantizer: Quantizer, hadamard: bool = False) -> Tensor:
    """The float weight [out, in] to quantize: W, or W diag(s) if the input quantizer folds.

    Args:
        weight: Weight W [out, in].
        input_quantizer: Quantizer of the layer's input.
        hadamard: Whether the layer transforms its input, so that W H^T takes the place of W.

    Returns:
        Weight in the type that the layer computes in, with values rounded to float32.
    """
    dtype, weight = wide(weight).dtype, weight.detach()
    if hadamard:
        weight = hadamard_transform(weight.double())
    folding, rounded = _folding(input_quantizer), settled(weight)
    return (rounded * folding.scale if folding else rounded).to(dtype)


def _folding(input_quantizer: Quantizer) -> UniformQuantizer | None:
    """The input quantizer if its scales are folded into the weight, otherwise None."""
    if isinstance(input_quantizer, UniformQuantizer) and input_quantizer.folds:
        return input_quantizer
    return None
