"""Tiny LLaVAs with random weights, built from transformers' own classes, and batches for them."""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, MixtralConfig, PretrainedConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

IMAGE_SIZE = 32
IMAGE_TOKENS = (IMAGE_SIZE // 8) ** 2
IMAGE_TOKEN = 95
VOCABULARY = 96
WIDTH = 32

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


class RoutedExperts(nn.Module):
    """A mixture with an `nn.Linear` router and a list of experts, each token to its top expert."""

    def __init__(self, mlp: type[nn.Module], config: PretrainedConfig, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, count, bias=False)
        self.experts = nn.ModuleList(mlp(config) for _ in range(count))

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token = (chosen == index).nonzero()[:, 0]
            if token.numel():
                output = output.index_add(0, token, expert(tokens[token]) * weight[token, None])
        return output.view_as(hidden_states)


def toy_llava(
    text: str = "llama", decoder_layers: int = 2, vision_layers: int = 3, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A LLaVA 32 wide in evaluation mode.

    Args:
        text: "llama", "mixtral" (fused experts) or "routed" (LLaMA whose first layer is a
            `RoutedExperts` of three, the last of which no token reaches).
    """
    torch.manual_seed(seed)
    if text == "mixtral":
        text_config: PretrainedConfig = MixtralConfig(
            **_TEXT, num_hidden_layers=decoder_layers, num_local_experts=4, num_experts_per_tok=2
        )
    else:
        text_config = LlamaConfig(**_TEXT, num_hidden_layers=decoder_layers)
    vision_config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    if text == "routed":
        layer = model.model.language_model.layers[0]
        layer.mlp = RoutedExperts(type(layer.mlp), text_config, count=3).eval()
        with torch.no_grad():
            # Opposite rows: the larger of two logits is never negative, so never the zero row.
            layer.mlp.router.weight[1] = -layer.mlp.router.weight[0]
            layer.mlp.router.weight[2] = 0
    return model


def toy_batch(
    rows: int = 2, words: int = 5, image: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """One batch of equal-length rows, each with an image in front if asked for."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (rows, words), generator=random)
    batch = {"input_ids": ids}
    if image:
        ids = torch.cat([torch.full((rows, IMAGE_TOKENS), IMAGE_TOKEN), ids], dim=1)
        pixels = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
        batch = {"input_ids": ids, "pixel_values": pixels}
    return {**batch, "attention_mask": torch.ones_like(ids)}


def toy_batches(count: int = 3, image: bool = True) -> list[dict[str, Tensor]]:
    """Batches of different lengths, of which every third is without images."""
    return [
        toy_batch(words=5 + index, image=image and index % 3 != 2, seed=index)
        for index in range(count)
    ]
