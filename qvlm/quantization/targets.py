"""Which linears of a model are quantized, and where they are.

Every `nn.Linear` of the vision tower's layers, of the projector and of the decoder layers is
quantized, experts included. A language model alone has decoder layers only. Embeddings, norms,
`lm_head` and routers stay in floating point. A router decides where a token goes, and a token that
goes elsewhere is not a rounding error.

Where these parts are is the table's to say (`qvlm.families`) for a model of transformers. Any other
model is read by structure, never by size: the layers of a tower or language model are its
`ModuleList` called `layers`.
"""

from collections.abc import Mapping

from torch import nn

from qvlm.errors import UserError
from qvlm.families import FAMILIES, Family

# A linear below a module of one of these names is a router, or part of one.
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate"})


def parts_of(model: nn.Module) -> Family:
    """Returns where the parts of a model are.

    Raises:
        UserError: If the model is in no table, and its structure is not that of a LLaVA or LLaMA.
    """
    return listed(model) or _by_structure(model)


def listed(model: nn.Module) -> Family | None:
    """Returns the table that describes a model, or None if there is none."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", None) or "")


def vision_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The vision tower's layers by full name, in order; none for a language model alone."""
    tower = parts_of(model).tower
    return {} if tower is None else _entries(model, tower)


def projector(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the projector by full name; none for a language model alone."""
    found: dict[str, nn.Module] = {}
    for name in parts_of(model).projector:
        part = model.get_submodule(name)
        found |= _entries(model, name) if isinstance(part, nn.ModuleList) else {name: part}
    return found


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The language model's layers by full name, in order."""
    return _entries(model, parts_of(model).decoder)


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
    """The linears of a block that are to be quantized, by name relative to it.

    Raises:
        UserError: If one linear has two names. Under one of them it would stay as it is.
    """
    found = {
        name: module
        for name, module in block.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not ROUTER_NAMES & set(name.split("."))
    }
    _require_different(found)
    return found


def _entries(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of a list by full name."""
    parts = model.get_submodule(name).named_modules(prefix=name, remove_duplicate=False)
    found = {full: part for full, part in parts if full.rpartition(".")[0] == name}
    _require_different(found)
    return found


def _require_different(modules: Mapping[str, nn.Module]) -> None:
    """Refuses a module that has two names."""
    names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if (other := names.setdefault(module, name)) != name:
            raise UserError(
                f"{other} and {name} are one module, and this package quantizes each name by "
                "itself. Give a model whose layers share no modules."
            )


def _by_structure(model: nn.Module) -> Family:
    if is_language_model(model):
        return Family("", type(model).__name__, None, (), "model.layers")
    return Family(
        model_type="",
        title=type(model).__name__,
        tower=_list_of_layers(model, "vision_tower"),
        projector=(_part(model, "multi_modal_projector"),),
        decoder=_list_of_layers(model, "language_model"),
    )


def _list_of_layers(model: nn.Module, part: str) -> str:
    root = _part(model, part)
    for name, module in model.get_submodule(root).named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return f"{root}.{name}"
    raise UserError(f"{type(model).__name__} has no list of layers in its {part}")


def _part(model: nn.Module, part: str) -> str:
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] == part:
            return name
    raise UserError(
        f"{type(model).__name__} has no {part}. Choose a LLaVA, which has a vision_tower, a "
        "multi_modal_projector and a language_model, or a language model alone"
    )
