"""The mixture of experts of MoE-LLaVA, whatever language model it is built into.

MoE-LLaVA (arXiv 2401.15947) replaces the MLP of every other decoder layer by four copies of it and
a linear router; each token goes to its top two. As in DeepSpeed's `top2gating`, the two gate values
are the softmax over all experts, renormalised to sum to one.

`capacity_factor` chooses what happens when many tokens want the same expert. None: nothing, no
token is dropped, so an answer does not depend on what else is in its batch. A number: DeepSpeed's
rule at evaluation, see `within_capacity`. What is left out of DeepSpeed 0.9.5 is the Gumbel noise
on the second choice, which makes two evaluations of one model differ.

Experts stay separate modules rather than one fused tensor, so that each of their linears can be
calibrated with the tokens routed to it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


class MixtureConfig(PretrainedConfig):
    """What a language model's configuration says of its mixtures, beside its own facts.

    Attributes:
        num_experts: per layer.
        num_experts_per_token: 2 in every released checkpoint.
        moe_layers: which layers have a mixture; None is every other, from the first.
        capacity_factor: DeepSpeed's `eval_capacity_factor`; None is routing without a limit.
        min_capacity: tokens that an expert takes at least, where there is a limit.
    """

    num_experts: int = 4
    num_experts_per_token: int = 2
    moe_layers: list[int] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0


def within_capacity(
    chosen: Tensor, experts: int, capacity_factor: float, min_capacity: int
) -> Tensor:
    """Which choices are served when an expert takes a limited number of tokens.

    An expert takes `max(ceil(tokens / experts * choices * capacity_factor), min_capacity)` tokens:
    first those that chose it first, then those that chose it second, each in the order of the
    batch. Padding counts as any token. With 4 experts, 2 choices and a factor of 2 the limit is the
    number of tokens, and nothing is ever dropped.

    Source: `top2gating` and `_capacity` of DeepSpeed 0.9.5.

    Args:
        chosen: the experts of each token, best first, [tokens, choices].

    Returns:
        [tokens, choices], true where the choice is served.
    """
    tokens, choices = chosen.shape
    # In float32, as DeepSpeed: 100 tokens, 4 experts and a factor of 1.1 make 55, not 56.
    share = torch.tensor(choices * capacity_factor) * (tokens / experts)
    capacity = max(int(share.ceil()), min_capacity)
    wanted = chosen.T.flatten()  # all first choices, then all second ones
    arrivals = nn.functional.one_hot(wanted, experts).cumsum(0)  # [choices * tokens, experts]
    place = arrivals.gather(1, wanted[:, None])[:, 0]
    return (place <= capacity).view(choices, tokens).T


class MixtureOfExperts(nn.Module):
    """`num_experts` MLPs behind a linear router.

    In training mode `balance_loss` holds the load-balancing loss of the last forward pass (Switch
    Transformer, arXiv 2101.03961, eq. 4): `E * sum_e f_e P_e`, one when the load is even, where
    f_e is the share of tokens whose first choice is e and P_e the mean gate of e.

    Args:
        config: of the language model, a `MixtureConfig` as well.
        expert: builds its MLP.
    """

    def __init__(
        self, config: PretrainedConfig, expert: Callable[[PretrainedConfig], nn.Module]
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.capacity_factor = config.capacity_factor
        self.min_capacity = config.min_capacity
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(expert(config) for _ in range(config.num_experts))
        self.balance_loss: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the chosen experts' outputs; [..., hidden_size] in and out."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        # As in DeepSpeed the router works in its own precision, float32 whatever the model's.
        logits = self.router(tokens.to(self.router.weight.dtype))
        gates = logits.float().softmax(dim=-1)  # [tokens, experts]
        weights, chosen = gates.topk(self.top_k, dim=-1)  # [tokens, top_k]
        served = torch.ones_like(chosen, dtype=torch.bool)
        if self.capacity_factor is not None and not self.training:
            served = within_capacity(
                chosen, len(self.experts), self.capacity_factor, self.min_capacity
            )
            weights = weights * served
        # What is dropped counts for nothing: the other expert then has the whole weight.
        total = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
        weights = (weights / total).to(tokens.dtype)
        self.balance_loss = None
        if self.training:
            first = nn.functional.one_hot(chosen[:, 0], len(self.experts)).to(gates.dtype)
            self.balance_loss = len(self.experts) * (first.mean(0) * gates.mean(0)).sum()
        # Each token's copies, sorted by expert, so that an expert runs once on a contiguous slice.
        expert_of = chosen.flatten()
        slots = served.flatten().nonzero()[:, 0]
        order = slots[expert_of[slots].argsort(stable=True)]
        token = order // self.top_k
        counts = torch.bincount(expert_of[order], minlength=len(self.experts)).tolist()
        routed = [
            expert(part)
            for expert, part in zip(self.experts, tokens[token].split(counts), strict=True)
            if len(part)
        ]
        mixed = torch.cat(routed).to(tokens.dtype) * weights.flatten()[order, None]
        output = torch.zeros_like(tokens).index_add(0, token, mixed)
        return output.view_as(hidden_states)


def add_mixtures(
    layers: nn.ModuleList,
    config: PretrainedConfig,
    expert: Callable[[PretrainedConfig], nn.Module],
) -> None:
    """Puts a mixture in the place of the MLP of the decoder layers that `config.moe_layers` names.

    Args:
        layers: all decoder layers, each with its `mlp`.
        config, expert: as in `MixtureOfExperts`.
    """
    every_other = range(0, config.num_hidden_layers, 2)
    for index in every_other if config.moe_layers is None else config.moe_layers:
        layers[index].mlp = MixtureOfExperts(config, expert)
