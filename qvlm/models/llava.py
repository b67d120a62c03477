"""LLaVA with the projector of its checkpoint.

transformers' LLaVA always builds a two-layer projector. LLaVA-v1.3 has a single linear layer
(`mm_projector_type: linear`); LLaVA-v1.5 and MoE-LLaVA have two layers around a GELU
(`mlp2x_gelu`). Everything else is transformers' own: a CLIP tower whose features come from layer -2
without the class token, and any causal language model that `text_config` names.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    PreTrainedModel,
)
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from qvlm.models import attention


class LlavaArchitecture(LlavaConfig):
    """`LlavaConfig` plus what transformers' LLaVA has no option for.

    Attributes:
        projector_type: "linear" or "mlp2x_gelu".
        head_bias: Whether the output head has a bias. A method that folds the shift of the last
            norm into the head gives it one.
        begins_with_bos: Whether a text begins with the bos token. The template of a chat model has
            it already.
    """

    model_type = "qvlm_llava"

    projector_type: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    head_bias: bool = False
    begins_with_bos: bool = True


def image_token_count(vision: CLIPVisionConfig, strategy: str) -> int:
    """Returns the number of features that a vision tower gives for one image.

    Args:
        vision: Configuration of the tower.
        strategy: "default" keeps one feature per patch, "full" also that of the class token.
    """
    return (vision.image_size // vision.patch_size) ** 2 + (strategy == "full")


class LinearProjector(nn.Module):
    """One linear layer from vision width to language width (LLaVA, arXiv 2304.08485, eq. 1)."""

    def __init__(self, vision_width: int, language_width: int, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """Maps features [images, patches, vision_width] to [images, patches, language_width]."""
        return self.linear_1(image_features)


class PlaceholderEmbedding(nn.Embedding):
    """An embedding that accepts the id of `<image>`, which lies beyond its rows.

    The vocabularies of the original checkpoints have no such token. Its vector does not matter,
    because the image's features replace it, so the last row stands for it.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids [batch, tokens] to [batch, tokens, width]."""
        return super().forward(ids.clamp(max=self.num_embeddings - 1))


def _make_contiguous(head: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Copies the output head's input where it is a slice of the hidden states.

    For the strides of a slice PyTorch multiplies row by row of the batch, and copies the whole
    weight to do so.
    """
    (x,) = args
    sliced = x.ndim == 3 and x.stride(0) != x.shape[1] * x.stride(1)
    return x.clone(memory_format=torch.contiguous_format) if sliced else x


class Llava(LlavaForConditionalGeneration):
    """A LLaVA of any family, as its `LlavaArchitecture` describes it."""

    config: LlavaArchitecture
    config_class = LlavaArchitecture

    def __init__(self, config: LlavaArchitecture) -> None:
        super().__init__(config)
        text = config.text_config
        if config.image_token_id >= text.vocab_size:
            # The weight of the embedding that this one replaces is not copied, because the
            # checkpoint's weights are loaded afterwards.
            embedding = PlaceholderEmbedding(text.vocab_size, text.hidden_size, text.pad_token_id)
            self.set_input_embeddings(embedding)
            self.post_init()
        if config.projector_type == "linear":
            self.model.multi_modal_projector = LinearProjector(
                config.vision_config.hidden_size,
                config.text_config.hidden_size,
                bias=config.multimodal_projector_bias,
            )
            self.post_init()
        if config.head_bias:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size)
            self.post_init()
        prepared_for_decoding(self)


def prepared_for_decoding(model: PreTrainedModel) -> None:
    """Makes head and attention of a model fast for the single tokens of an answer."""
    model.lm_head.register_forward_pre_hook(_make_contiguous)
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa":  # transformers' default
        text._attn_implementation = attention.NAME


AutoConfig.register(LlavaArchitecture.model_type, LlavaArchitecture, exist_ok=True)
AutoModelForImageTextToText.register(LlavaArchitecture, Llava, exist_ok=True)
