"""Models whose layers are not there yet: shapes without memory, filled when they are needed.

`skeleton` has every module on torch's meta device. `hollow` has weights for everything but the
decoder layers, which hold nearly all of a large model; `fill` reads one of them from the
checkpoint.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.mixture import MixtureOfExperts

LAYERS = "model.language_model.layers"


def skeleton(architecture: LlavaArchitecture, dtype: torch.dtype) -> Llava:
    """The model on the meta device, in evaluation mode; routers in float32, as when loaded."""
    with torch.device("meta"):
        model = Llava(architecture)
    model.to(dtype).eval()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.float()
    return model


def hollow(
    architecture: LlavaArchitecture, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> Llava:
    """The model with its decoder layers on the meta device.

    Args:
        tensors: of the whole model, by name; those of decoder layers are not read.
    """
    short = copy.deepcopy(architecture)
    text = short.text_config
    text.num_hidden_layers = 0
    if getattr(text, "moe_layers", None) is not None:
        text.moe_layers = []
    state = {name: tensors[name] for name in tensors if not name.startswith(f"{LAYERS}.")}
    # Loaded as any other model is; only then given its layers, and told how many they are.
    model = Llava.from_pretrained(None, config=short, state_dict=state, dtype=dtype).to(device)
    layers = skeleton(architecture, dtype).get_submodule(LAYERS)
    assert not list(layers.buffers()), "a buffer that is not saved would stay empty"
    model.set_submodule(LAYERS, layers)
    for part in ("num_hidden_layers", "moe_layers"):
        if hasattr(text, part):
            setattr(model.config.text_config, part, getattr(architecture.text_config, part))
    return model.eval()


@torch.no_grad()
def fill(module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: str) -> None:
    """Gives a module on the meta device its weights.

    Args:
        name: of the module in the model.
        tensors: of the whole model, by name.
    """
    module.to_empty(device=device)
    for part, place in module.state_dict().items():
        place.copy_(tensors[f"{name}.{part}"])
