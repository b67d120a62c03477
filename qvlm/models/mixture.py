"""The mixture of experts of MoE-LLaVA, for any language model.

MoE-LLaVA (arXiv 2401.15947) replaces the MLP of every other decoder layer by four copies of it and
a linear router, which sends each token to its top two experts. As in DeepSpeed's `top2gating`, the
two gate values are the softmax over all experts, renormalized to sum to one.

`capacity_factor` decides what happens when many tokens choose the same expert. With None no token
is dropped, so an answer does not depend on the rest of its batch. With a number, DeepSpeed's rule
for evaluation applies: see `within_capacity`. We leave out the Gumbel noise that DeepSpeed 0.9.5
adds to the second choice, because it makes two evaluations of one model differ.

Experts are separate modules rather than one fused tensor, so that each of their linears can be
calibrated with the tokens that are routed to it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


class MixtureConfig(PretrainedConfig):
    """The part of a language model's configuration that describes its mixtures.

    Attributes:
        num_experts: Number of experts per mixture.
        num_experts_per_token: Number of experts per token, 2 in every released checkpoint.
        moe_layers: Indices of the layers with a mixture; None is every other layer, from the first.
        capacity_factor: DeepSpeed's `eval_capacity_factor`; None sets no limit.
        min_capacity: Least number of tokens that an expert takes where there is a limit.
        router_bias: Whether routers have a bias. A method that folds the shift of a norm into the
            router gives it one.
    """

    num_experts: int = 4
    num_experts_per_token: int = 2
    moe_layers: list[int] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    router_bias: bool = False


def set_expert_capacity(config: PretrainedConfig, rule: str) -> None:
    """Applies the option `model.expert_capacity` to a language model's configuration.

    Args:
        config: Configuration of a language model, with or without mixtures.
        rule: "checkpoint" keeps the checkpoint's limit, "unlimited" removes it.
    """
    if rule == "unlimited" and isinstance(config, MixtureConfig):
        config.capacity_factor = None


def within_capacity(
    chosen: Tensor, experts: int, capacity_factor: float, min_capacity: int
) -> Tensor:
    """Finds the choices that are served when an expert takes a limited number of tokens.

    An expert takes `max(ceil(tokens / experts * choices * capacity_factor), min_capacity)` tokens.
    Tokens that chose it first come before tokens that chose it second, each group in the order of
    the batch. Padding counts as a token. With 4 experts, 2 choices and a factor of 2 the limit is
    the number of tokens, and nothing is dropped.

    Source: `top2gating` and `_capacity` of DeepSpeed 0.9.5.

    Args:
        chosen: Experts of each token, best first, [tokens, choices].
        experts: Number of experts.
        capacity_factor, min_capacity: Limits as in `MixtureConfig`.

    Returns:
        Mask [tokens, choices] that is true where the choice is served.
    """
    tokens, choices = chosen.shape
    # In float32, as in DeepSpeed: 100 tokens, 4 experts and a factor of 1.1 give 55, not 56.
    share = torch.tensor(choices * capacity_factor) * (tokens / experts)
    capacity = max(int(share.ceil()), min_capacity)
    wanted = chosen.T.flatten()  # all first choices, then all second ones
    arrivals = nn.functional.one_hot(wanted, experts).cumsum(0)  # [choices * tokens, experts]
    place = arrivals.gather(1, wanted[:, None])[:, 0]
    return (place <= capacity).view(choices, tokens).T


class MixtureOfExperts(nn.Module):
    """`num_experts` MLPs behind a linear router.

    In training mode `balance_loss` holds the load-balancing loss of the last forward pass (Switch
    Transformer, arXiv 2101.03961, eq. 4). It is `E * sum_e f_e P_e`, where f_e is the share of
    tokens whose first choice is e and P_e the mean gate of e. It is one when the load is even.

    Args:
        config: Configuration of the language model, which is also a `MixtureConfig`.
        expert: Function that builds the language model's MLP.
    """

    def __init__(
        self, config: PretrainedConfig, expert: Callable[[PretrainedConfig], nn.Module]
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.capacity_factor = config.capacity_factor
        self.min_capacity = config.min_capacity
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=config.router_bias)
        self.experts = nn.ModuleList(expert(config) for _ in range(config.num_experts))
        self.balance_loss: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the chosen experts' outputs; [..., hidden_size] in and out."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        # As in DeepSpeed the router works in its own precision: float32, or wider if the model is.
        logits = self.router(tokens.to(self.router.weight.dtype))
        gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        # Of equal gates, that of the expert with the lower number comes first on any machine.
        ranked, order = gates.sort(dim=-1, descending=True, stable=True)
        weights, chosen = ranked[:, : self.top_k], order[:, : self.top_k]  # [tokens, top_k]
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
        by_expert = slots[expert_of[slots].argsort(stable=True)]
        token = by_expert // self.top_k
        counts = torch.bincount(expert_of[by_expert], minlength=len(self.experts)).tolist()
        routed = [
            expert(part)
            for expert, part in zip(self.experts, tokens[token].split(counts), strict=True)
            if len(part)
        ]
        mixed = torch.cat(routed).to(tokens.dtype) * weights.flatten()[by_expert, None]
        output = torch.zeros_like(tokens).index_add(0, token, mixed)
        return output.view_as(hidden_states)


def add_mixtures(
    layers: nn.ModuleList,
    config: PretrainedConfig,
    expert: Callable[[PretrainedConfig], nn.Module],
) -> None:
    """Replaces the MLP by a mixture in the decoder layers that `config.moe_layers` names.

    Args:
        layers: All decoder layers of the model, each with an `mlp`.
        config, expert: Arguments of `MixtureOfExperts`.
    """
    every_other = range(0, config.num_hidden_layers, 2)
    for index in every_other if config.moe_layers is None else config.moe_layers:
        layers[index].mlp = MixtureOfExperts(config, expert)
