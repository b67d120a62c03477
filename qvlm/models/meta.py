"""Models on torch's meta device: modules with shapes and without memory.

`meta_model` puts the whole model there, which is enough to count and measure. A streamed cell uses
`model_with_meta_layers`, where only the decoder layers, which hold nearly all weights of a large
model, are on the meta device. `materialize` reads one of them from the checkpoint.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qvlm.models.llava import Llava
from qvlm.models.mixture import MixtureOfExperts
from qvlm.models.networks import Architecture, LanguageModel, decoder_layers_name, network


def meta_model(architecture: Architecture, dtype: torch.dtype) -> Llava | LanguageModel:
    """Builds the model on the meta device, in evaluation mode.

    Args:
        architecture: Configuration of the model.
        dtype: Type of all weights except those of routers, which stay in float32 as in a loaded
            model.
    """
    with torch.device("meta"):
        model = network(architecture)(architecture)
    model.to(dtype).eval()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.float()
    return model


def model_with_meta_layers(
    architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> Llava | LanguageModel:
    """Loads the model except for its decoder layers, which stay on the meta device.

    Args:
        architecture: Configuration of the model.
        tensors: Tensors of the whole model by name. Those of the decoder layers are not read.
        dtype: Type of the loaded weights.
        device: Device of the loaded weights.
    """
    short = copy.deepcopy(architecture)
    text = short.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "moe_layers", None) is not None:
        text.moe_layers = []
    place = decoder_layers_name(architecture)
    state = {name: tensors[name] for name in tensors if not name.startswith(f"{place}.")}
    # The model is loaded without layers, as any other model is. Layers are added afterwards.
    model = (
        network(architecture)
        .from_pretrained(None, config=short, state_dict=state, dtype=dtype, trust_remote_code=False)
        .to(device)
    )
    layers = meta_model(architecture, dtype).get_submodule(place)
    assert not list(layers.buffers()), "a buffer that is not saved would never be filled"
    model.set_submodule(place, layers)
    whole = architecture.get_text_config()
    for key in ("num_hidden_layers", "moe_layers"):
        if hasattr(text, key):
            setattr(model.config.get_text_config(), key, getattr(whole, key))
    return model.eval()


@torch.no_grad()
def materialize(module: nn.Module, name: str, tensors: Mapping[str, Tensor], device: str) -> None:
    """Moves a module from the meta device to a real one and fills in its weights.

    Args:
        module: Module of a model, on the meta device.
        name: Full name of the module in the model.
        tensors: Tensors of the whole model by name.
        device: Device of the weights.
    """
    module.to_empty(device=device)
    for key, weight in module.state_dict().items():
        weight.copy_(tensors[f"{name}.{key}"])
