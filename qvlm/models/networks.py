"""Which network class a configuration belongs to, and where its decoder layers are.

A model is a LLaVA of any family (`Llava`), a LLaMA alone (`LanguageModel`), which has no vision
tower and no projector, or transformers' own class of a family in `qvlm.families`. Everything that
builds, loads, streams or measures a model asks here.
"""

from typing import TypeAlias

from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from qvlm.families import FAMILIES
from qvlm.models.llava import (
    Llava,
    LlavaArchitecture,
    image_token_count,
    prepared_for_decoding,
)

Architecture: TypeAlias = LlavaArchitecture | LlamaConfig
"""The configuration of one of our own classes."""


class LanguageModel(LlamaForCausalLM):
    """A LLaMA alone: transformers' own class with the attention and the head that `Llava` uses."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        prepared_for_decoding(self)


def network(architecture: PretrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of the model that a configuration describes."""
    if architecture.model_type in FAMILIES:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(architecture)]
    return Llava if isinstance(architecture, LlavaArchitecture) else LanguageModel


def has_vision(architecture: PretrainedConfig) -> bool:
    """Whether the model has a vision tower, and so understands images."""
    return isinstance(architecture, LlavaArchitecture) or architecture.model_type in FAMILIES


def image_tokens(architecture: PretrainedConfig) -> int:
    """Returns the number of positions that one image takes; 0 for a language model alone."""
    if not has_vision(architecture):
        return 0
    strategy = architecture.vision_feature_select_strategy
    return image_token_count(architecture.vision_config, strategy)


def decoder_layers_name(architecture: PretrainedConfig) -> str:
    """Returns the full name of the list of decoder layers."""
    return "model.language_model.layers" if has_vision(architecture) else "model.layers"
