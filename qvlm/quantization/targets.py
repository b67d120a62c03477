"""Which linears of a model are quantized, and where they are.

Every `nn.Linear` of the vision tower's layers, of the projector and of the decoder layers is
quantized, experts included. A language model alone has decoder layers only. Embeddings, norms,
`lm_head` and routers stay in floating point. A router decides where a token goes, and a token that
goes elsewhere is not a rounding error.

Models are read by structure, never by size: the layers of a tower or language model are its
`ModuleList` called `layers`.
"""

from torch import nn

from qvlm.errors import UserError

# A linear below a module of one of these names is a router, or part of one.
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate"})


def vision_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The vision tower's layers by full name, in order; none for a language model alone."""
    return {} if is_language_model(model) else _layers(model, "vision_tower")


def projector(model: nn.Module) -> dict[str, nn.Module]:
    """The projector by full name; none for a language model alone."""
    if is_language_model(model):
        return {}
    name = _part(model, "multi_modal_projector")
    return {name: model.get_submodule(name)}


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The language model's layers by full name, in order."""
    return _layers(model, "model" if is_language_model(model) else "language_model")


def is_language_model(model: nn.Module) -> bool:
    """Whether a model is a decoder with a head, without vision tower, projector and nesting.

    In transformers such a model holds its decoder as `model`, and the list of layers in that.
    """
    return isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList)


def block_layers(model: nn.Module, vision_tower: bool) -> dict[str, tuple[str, nn.Module]]:
    """All blocks in the order of the data: full name to (kind, module).

    The kinds are "vision" (only with `vision_tower`), "projector" and "language".
    """
    kinds = {"projector": projector(model), "language": decoder_layers(model)}
    if vision_tower:
        kinds = {"vision": vision_layers(model), **kinds}
    return {
        name: (kind, module) for kind, modules in kinds.items() for name, module in modules.items()
    }


def quantizable(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are to be quantized, by name relative to it."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not ROUTER_NAMES & set(name.split("."))
    }


def _layers(model: nn.Module, part: str) -> dict[str, nn.Module]:
    root = _part(model, part)
    for name, module in model.get_submodule(root).named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return {f"{root}.{name}.{index}": layer for index, layer in enumerate(module)}
    raise UserError(f"{type(model).__name__} has no list of layers in its {part}")


def _part(model: nn.Module, part: str) -> str:
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] == part:
            return name
    raise UserError(
        f"{type(model).__name__} has no {part}. Choose a LLaVA, which has a vision_tower, a "
        "multi_modal_projector and a language_model, or a language model alone"
    )
