"""Takes fused experts apart, so that a walk over `nn.Linear` visits them.

transformers stores the experts of Mixtral, Qwen2-MoE, OLMoE, PhiMoE, DeepSeek-V2 and many others as
two 3-D parameters. The projections of each expert need calibration samples and scales of their own,
so the fused module is replaced by a list of expert modules with the same forward arguments.

There are variants: transposed, interleaved, with biases or a norm, with another gate. transformers'
fused modules say how their parameters lie; what they compute is not believed but tested: the
replacement and the original run on the same probe tokens, and a model whose outputs differ is
refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qvlm.errors import UserError

_PROBE_TOKENS = 16


Gating = Callable[[Tensor, Tensor], Tensor]
"""What becomes of the outputs of gate and up projection, both [tokens, intermediate]."""


class Gated(nn.Module):
    """`act(gate) * up`, as most experts have it."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.act_fn = act_fn

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Maps two tensors [tokens, intermediate] to one."""
        product: Tensor = self.act_fn(gate) * up
        return product


class ClampedSwiGLU(nn.Module):
    """gpt-oss's gate (arXiv 2508.10925): `(clamp(up) + 1) * swish(clamp(gate))`.

    Args:
        alpha: Factor of the swish's sigmoid: `g * sigmoid(alpha g)`.
        limit: Largest value of the gate, and largest absolute value of the up projection.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Maps two tensors [tokens, intermediate] to one."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


class Expert(nn.Module):
    """One gated feed-forward expert: `down(gating(gate(x), up(x)))`."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, gating: Gating) -> None:
        super().__init__()
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.gating = gating

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens [tokens, hidden] to [tokens, hidden]."""
        output: Tensor = self.down_proj(self.gating(self.gate_proj(x), self.up_proj(x)))
        return output


class Experts(nn.ModuleList):
    """The experts of one layer, with the forward arguments of transformers' fused module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sums the weighted outputs of each token's experts; an expert without tokens is not run.

        Args:
            hidden_states: Tokens [tokens, hidden].
            top_k_index: Experts of each token, [tokens, k].
            top_k_weights: Weights of these experts, [tokens, k].

        Returns:
            Outputs [tokens, hidden].
        """
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, slot = (top_k_index == index).nonzero(as_tuple=True)
            if token.numel():
                routed = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                output = output.index_add(0, token, routed.to(output.dtype))
        return output


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the weights of several experts in one parameter, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(
            parameter.ndim == 3 and parameter_name.endswith("_proj")
            for parameter_name, parameter in module.named_parameters(recurse=False)
        )
    }


def unfuse_experts(model: nn.Module) -> int:
    """Replaces every fused module by separate experts with equal outputs, one module at a time.

    Modules on the meta device, which have nothing to compute with, are not compared.

    Returns:
        Number of experts that were taken apart.

    Raises:
        UserError: If the layout of the experts' parameters is not supported.
    """
    count = 0
    for name, fused in fused_experts(model).items():
        experts = _take_apart(fused)
        if experts is None or not (_is_empty(fused) or _agree(fused, experts)):
            raise UserError(
                f"the experts of {name} ({type(fused).__name__}) are fused in a layout that is not "
                "supported. Supported are gate_up_proj and down_proj with two equal halves, in "
                "rows or in columns, one after the other or alternating, with biases or without."
            )
        model.set_submodule(name, experts)
        count += len(experts)
    return count


def _take_apart(fused: nn.Module) -> Experts | None:
    """Returns the experts of a fused module as its attributes describe it, or None."""
    gate_up, down = (getattr(fused, part, None) for part in ("gate_up_proj", "down_proj"))
    gating = _gating(fused)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gating is None:
        return None
    if getattr(fused, "is_transposed", False):
        gate_up, down = gate_up.mT, down.mT
    rows, hidden = gate_up.shape[1:]
    if rows % 2 or down.shape[1:] != (hidden, rows // 2):
        return None
    halves = _halves(rows, getattr(fused, "is_concatenated", True))
    biases, offsets = (getattr(fused, f"{part}_proj_bias", None) for part in ("gate_up", "down"))

    def expert(index: int) -> Expert:
        weight, bias = gate_up[index], None if biases is None else biases[index]
        gate, up = (_linear(weight[half], None if bias is None else bias[half]) for half in halves)
        return Expert(
            gate, up, _linear(down[index], None if offsets is None else offsets[index]), gating
        )

    return Experts(expert(index) for index in range(gate_up.shape[0]))


def _gating(fused: nn.Module) -> nn.Module | None:
    if {"alpha", "limit"} <= vars(fused).keys():
        return ClampedSwiGLU(fused.alpha, fused.limit)  # type: ignore[arg-type]
    act_fn = getattr(fused, "act_fn", None)
    return Gated(act_fn) if isinstance(act_fn, nn.Module) else None


def _halves(rows: int, one_after_the_other: bool) -> tuple[slice, slice]:
    """The rows of the gate and of the up projection."""
    if one_after_the_other:
        return slice(0, rows // 2), slice(rows // 2, rows)
    return slice(0, rows, 2), slice(1, rows, 2)


def _is_empty(module: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


@torch.no_grad()
def _agree(fused: nn.Module, experts: Experts) -> bool:
    """Whether both have equal outputs on probe tokens, each expert being visited twice."""
    down = experts.get_submodule("0.down_proj")
    assert isinstance(down, nn.Linear)
    weight = down.weight  # [hidden, intermediate]
    tokens = max(_PROBE_TOKENS, len(experts))
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, weight.shape[0], generator=random).to(weight)
    mix = torch.rand(tokens, 2, generator=random).to(weight)
    first = torch.arange(tokens, device=weight.device) % len(experts)
    chosen = torch.stack([first, (first + 1) % len(experts)], dim=1)
    try:
        expected = fused(hidden, chosen, mix)
    except (TypeError, RuntimeError):
        return False
    tolerance = 8 * torch.finfo(weight.dtype).eps * expected.abs().max().clamp_min(1e-30)
    # Both round differently in sums of `intermediate` terms; the square root of that is generous.
    worst = (expected - experts(hidden, chosen, mix)).abs().max()
    return bool(worst <= tolerance * weight.shape[1] ** 0.5)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear of a weight [out, in] and a bias [out], which are copied.

    A view would keep the whole fused parameter in memory.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            copied = values.detach().clone(memory_format=torch.contiguous_format)
            setattr(linear, name, nn.Parameter(copied, requires_grad=values.requires_grad))
    return linear
