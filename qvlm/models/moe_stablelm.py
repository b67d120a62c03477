"""StableLM with a mixture of experts in some of its layers: the language model of MoE-LLaVA.

MoE-LLaVA (arXiv 2401.15947) replaces the MLP of every other decoder layer by four copies of it and
a linear router; each token goes to its top two. As in DeepSpeed's `top2gating`, the two gate values
are the softmax over all experts, renormalised to sum to one. Routing here has no capacity limit:
no token is dropped, so an answer does not depend on what else is in its batch.

Experts stay separate modules rather than one fused tensor, so that each of their linears can be
calibrated with the tokens routed to it.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmMLP, StableLmModel


class MoeStableLmConfig(StableLmConfig):
    """`StableLmConfig` plus the mixture: experts per layer, experts per token, which layers."""

    model_type = "qvlm_moe_stablelm"

    num_experts: int = 4
    num_experts_per_token: int = 2
    moe_layers: list[int] | None = None  # None: every other layer, from the first


class MixtureOfExperts(nn.Module):
    """`num_experts` StableLM MLPs behind a linear router.

    In training mode `balance_loss` holds the load-balancing loss of the last forward pass (Switch
    Transformer, arXiv 2101.03961, eq. 4): `E * sum_e f_e P_e`, one when the load is even, where
    f_e is the share of tokens whose first choice is e and P_e the mean gate of e.
    """

    def __init__(self, config: MoeStableLmConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(StableLmMLP(config) for _ in range(config.num_experts))
        self.balance_loss: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the chosen experts' outputs; [..., hidden_size] in and out."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        gates = self.router(tokens).float().softmax(dim=-1)  # [tokens, experts]
        weights, chosen = gates.topk(self.top_k, dim=-1)  # [tokens, top_k]
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(tokens.dtype)
        self.balance_loss = None
        if self.training:
            first = nn.functional.one_hot(chosen[:, 0], len(self.experts)).to(gates.dtype)
            self.balance_loss = len(self.experts) * (first.mean(0) * gates.mean(0)).sum()
        # Each token's copies, sorted by expert, so that an expert runs once on a contiguous slice.
        order = chosen.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        routed = [
            expert(part)
            for expert, part in zip(self.experts, tokens[token].split(counts), strict=True)
            if len(part)
        ]
        mixed = torch.cat(routed).to(tokens.dtype) * weights.flatten()[order, None]
        output = torch.zeros_like(tokens).index_add(0, token, mixed)
        return output.view_as(hidden_states)


class MoeStableLmModel(StableLmModel):
    """StableLM whose `moe_layers` have a `MixtureOfExperts` for an MLP."""

    config: MoeStableLmConfig
    config_class = MoeStableLmConfig

    def __init__(self, config: MoeStableLmConfig) -> None:
        super().__init__(config)
        layers = config.moe_layers
        for index in range(0, config.num_hidden_layers, 2) if layers is None else layers:
            self.layers[index].mlp = MixtureOfExperts(config)
        self.post_init()


AutoConfig.register(MoeStableLmConfig.model_type, MoeStableLmConfig, exist_ok=True)
AutoModel.register(MoeStableLmConfig, MoeStableLmModel, exist_ok=True)
