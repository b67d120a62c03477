"""Takes fused experts apart, so that a walk over `nn.Linear` visits them.

transformers stores the experts of Mixtral, Qwen2-MoE, OLMoE, PhiMoE, DeepSeek-V2 and many others as
two 3-D parameters. The projections of each expert need calibration samples and scales of their own,
so the fused module is replaced by a list of expert modules with the same forward arguments.

There are variants: transposed, interleaved, with a bias or a norm, with another gate. Instead of a
list of them, there is a test: the replacement and the original run on the same probe tokens, and a
model whose outputs differ is refused.
"""

import torch
from torch import Tensor, nn

from qvlm.errors import UserError

_PROBE_TOKENS = 16


class Expert(nn.Module):
    """One gated feed-forward expert: `down(act(gate(x)) * up(x))`."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        """Takes the weights gate, up [intermediate, hidden] and down [hidden, intermediate]."""
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens [tokens, hidden] to [tokens, hidden]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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
                "supported. Supported is gate_up_proj [E, 2I, H], down_proj [E, H, I] without bias"
            )
        model.set_submodule(name, experts)
        count += len(experts)
    return count


def _take_apart(fused: nn.Module) -> Experts | None:
    gate_up, down = (getattr(fused, part, None) for part in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return None
    rows, hidden = gate_up.shape[1:]
    act_fn = getattr(fused, "act_fn", None)
    if rows % 2 or down.shape[1:] != (hidden, rows // 2) or not isinstance(act_fn, nn.Module):
        return None
    half = rows // 2
    return Experts(
        Expert(gate_up[e, :half], gate_up[e, half:], down[e], act_fn)
        for e in range(gate_up.shape[0])
    )


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


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # A clone, since a view would keep the whole fused parameter in memory.
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear
