"""What a checkpoint leaves in floating point, and whether it says so.

The network is not known, only names and shapes. A linear is a weight of two dimensions that is
neither an embedding nor a router. If other linears in the same list of layers are quantized, it
should be as well, unless the configuration says otherwise.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from qvlm.proving.formats import Format
from qvlm.proving.stored import UnreadableError
from qvlm.quantization.targets import ROUTER_NAMES

_ROUTERS = ROUTER_NAMES | {"ffn_gate_inp", "ffn_gate_inp_shexp", "shared_expert_gate"}
_TABLES = re.compile(r"embed|(?:^|\.)(?:wte|wpe|token_embd|position_embd)\b|attention_bias")
_HEADS = re.compile(r"(?:^|\.)(?:lm_head|output|embed_out)$")
EXPERTS = re.compile(r"(?:^|[._])(?:experts|[a-z_]+_exps)(?:\.|$)")


@dataclass(frozen=True)
class FloatWeight:
    """A tensor in floating point.

    Attributes:
        name: Full name.
        count: Number of parameters.
        kind: "linear", "expert", "router", "table" (embeddings and the head) or "other".
        why: "said" if the checkpoint says that it is left float, "skipped" if it should be
            quantized, "outside" if nothing around it is quantized, "" for what is no linear.
        fault: What is wrong with it, or "".
    """

    name: str
    count: int
    kind: str
    why: str = ""
    fault: str = ""


def left_over(form: Format, layers: Iterable[str]) -> list[FloatWeight]:
    """Returns the tensors of a checkpoint that belong to no quantized layer.

    Args:
        form: The checkpoint.
        layers: Names of its quantized layers.
    """
    layers = list(layers)
    owned = {name for layer in layers for name in form.owned(layer)}
    places = {place(layer) for layer in layers} - {""}
    return [_look(form, name, places) for name in form.tensors if name not in owned]


def place(layer: str) -> str:
    """Returns the list that a layer is in: its name up to the first number, "" without one."""
    head = re.match(r"(.*?)\.\d+\.", layer)
    return head.group(1) if head else ""


def _look(form: Format, name: str, places: set[str]) -> FloatWeight:
    tensor = form.tensors[name]
    layer, count = name.removesuffix(".weight"), prod(tensor.shape)
    kind = _kind(layer, name, tuple(tensor.shape))
    if not tensor.is_floating_point():
        fault = f"it is {tensor.dtype} without scales" if tensor.ndim > 1 else ""
        return FloatWeight(name, count, kind, fault=fault)
    if not bool(torch.isfinite(tensor.float()).all()):
        return FloatWeight(name, count, kind, fault="it holds numbers that are not finite")
    try:
        said = form.left_float(layer)
    except UnreadableError as error:
        return FloatWeight(name, count, kind, fault=str(error))
    if kind == "expert":
        what = f"an expert is left in {tensor.dtype}".replace("torch.", "")
        return FloatWeight(name, count, kind, "said" if said else "skipped", what if places else "")
    if kind != "linear" and not (kind == "table" and said is False and _HEADS.search(layer)):
        return FloatWeight(name, count, kind)
    if said:
        return FloatWeight(name, count, kind, "said")
    if said is False or place(layer) in places:
        what = f"it is left in {tensor.dtype}".replace("torch.", "")
        return FloatWeight(name, count, kind, "skipped", what)
    return FloatWeight(name, count, kind, "outside")


def _kind(layer: str, name: str, shape: tuple[int, ...]) -> str:
    last = layer.rpartition(".")[2]
    if last in _ROUTERS or layer.endswith("router.classifier"):
        return "router"
    if _TABLES.search(layer) or _HEADS.search(layer):
        return "table"
    if len(shape) in (2, 3) and EXPERTS.search(layer):
        return "expert"
    return "linear" if len(shape) == 2 and name.endswith(".weight") else "other"
