"""A model that computes everything in float64, so that its answers do not depend on the machine.

`model.double()` is not enough. The RMS norms of transformers compute in float32 whatever the type
of the model, and so do rotary positions. Both are replaced here. LayerNorms, products, attention by
`scaled_dot_product_attention` and our mixtures compute in the type of the model. Float64 costs
little at the size of the embedded models, and is not meant for larger ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import UserError


class RotaryPositions(nn.Module):
    """Rotary positions in float64, in the place of transformers' module.

    Args:
        rotary: Module of transformers whose frequencies are the default ones.

    Raises:
        UserError: If the frequencies are scaled for long texts.
    """

    frequencies: Tensor

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        settings: Any = rotary
        if settings.rope_type != "default":
            raise UserError(
                f"model.dtype=float64 is not possible with rope_type={settings.rope_type}. Choose "
                "one of: float32, bfloat16, float16."
            )
        width = 2 * len(settings.inv_freq)
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        frequencies = settings.config.rope_parameters["rope_theta"] ** -exponents
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Computes cosines and sines [batch, tokens, width] of positions [batch, tokens]."""
        angles = position_ids[..., None].double() * self.frequencies.to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def compute_in_float64(model: nn.Module) -> None:
    """Converts a model's floating-point weights to float64 and makes it compute in float64.

    Raises:
        UserError: If the model scales its rotary frequencies.
    """
    model.double()
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, RotaryPositions(module))
        elif type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            model.set_submodule(name, _rms_norm(module))


def _rms_norm(module: nn.Module) -> nn.RMSNorm:
    """PyTorch's norm with weight and epsilon of one of transformers."""
    settings: Any = module
    norm = nn.RMSNorm(settings.weight.shape, eps=settings.variance_epsilon, device="meta")
    norm.weight = settings.weight
    return norm
