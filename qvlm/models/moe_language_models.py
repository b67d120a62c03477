"""The language models of MoE-LLaVA: transformers' own, with mixtures in some of their layers.

- StableLM-2 has a norm before attention, another before the MLP, and partial rotary positions.
- Phi-2 has one norm for attention and MLP, adds the outputs of both, has biases everywhere and an
  MLP without a gate.
- The first Qwen is a LLaMA with biases on query, key and value, as Qwen2 is. Beyond `seq_length`
  tokens its code also scales queries by a logarithm and stretches the rotary base, which Qwen2 does
  not. Up to that length both compute the same. Longer texts are refused.
"""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PhiConfig, Qwen2Config
from transformers.models.phi.modeling_phi import PhiMLP, PhiModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2Model
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmMLP, StableLmModel

from qvlm.errors import UserError
from qvlm.models.cache import cached_positions
from qvlm.models.mixture import MixtureConfig, add_mixtures


class MoeStableLmConfig(StableLmConfig, MixtureConfig):
    """`StableLmConfig` plus the fields of `MixtureConfig`."""

    model_type = "qvlm_moe_stablelm"


class MoePhiConfig(PhiConfig, MixtureConfig):
    """`PhiConfig` plus the fields of `MixtureConfig`."""

    model_type = "qvlm_moe_phi"


class MoeQwenConfig(Qwen2Config, MixtureConfig):
    """`Qwen2Config` plus the fields of `MixtureConfig`.

    `max_position_embeddings` holds the `seq_length` of Qwen's config.json.
    """

    model_type = "qvlm_moe_qwen"


class MoeStableLmModel(StableLmModel):
    """StableLM with a `MixtureOfExperts` as the MLP of its `moe_layers`."""

    config: MoeStableLmConfig
    config_class = MoeStableLmConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoeStableLmConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, StableLmMLP)
        self.post_init()


class MoePhiModel(PhiModel):
    """Phi with a `MixtureOfExperts` as the MLP of its `moe_layers`."""

    config: MoePhiConfig
    config_class = MoePhiConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoePhiConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, PhiMLP)
        self.post_init()


class MoeQwenModel(Qwen2Model):
    """Qwen with a `MixtureOfExperts` as the MLP of its `moe_layers`."""

    config: MoeQwenConfig
    config_class = MoeQwenConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoeQwenConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, Qwen2MLP)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """Calls `Qwen2Model.forward`.

        Raises:
            UserError: If the text has more tokens than `max_position_embeddings`.
        """
        given = inputs["inputs_embeds"] if input_ids is None else input_ids
        tokens = given.shape[1] + cached_positions(inputs)
        if tokens > self.config.max_position_embeddings:
            raise UserError(
                f"a prompt and its answer take {tokens} tokens, which is more than Qwen's "
                f"seq_length of {self.config.max_position_embeddings}. Its attention for longer "
                "texts is not supported. Lower evaluation.max_new_tokens or leave the question out."
            )
        return super().forward(input_ids, **inputs)


for config, model in (
    (MoeStableLmConfig, MoeStableLmModel),
    (MoePhiConfig, MoePhiModel),
    (MoeQwenConfig, MoeQwenModel),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
