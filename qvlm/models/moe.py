"""The language models of MoE-LLaVA: transformers' own, with a mixture in some of their layers.

- StableLM-2: a norm before attention and one before the MLP, partial rotary positions.
- Phi-2: one norm for both, whose outputs are added; biases everywhere; an ungated MLP.
- Qwen, the first: a LLaMA with biases on query, key and value, which is what Qwen2 is. Two habits
  of the first have no place in the second: beyond `seq_length` tokens its code scales queries by a
  logarithm and stretches the rotary base. Up to there the two compute the same; longer texts are
  refused rather than answered by another model.
"""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PhiConfig, Qwen2Config
from transformers.models.phi.modeling_phi import PhiMLP, PhiModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2Model
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmMLP, StableLmModel

from qvlm.errors import UserError
from qvlm.models.mixture import MixtureConfig, add_mixtures


class MoeStableLmConfig(StableLmConfig, MixtureConfig):
    """`StableLmConfig` plus the mixture."""

    model_type = "qvlm_moe_stablelm"


class MoePhiConfig(PhiConfig, MixtureConfig):
    """`PhiConfig` plus the mixture."""

    model_type = "qvlm_moe_phi"


class MoeQwenConfig(Qwen2Config, MixtureConfig):
    """`Qwen2Config` plus the mixture; `max_position_embeddings` is Qwen's `seq_length`."""

    model_type = "qvlm_moe_qwen"


class MoeStableLmModel(StableLmModel):
    """StableLM whose `moe_layers` have a `MixtureOfExperts` for an MLP."""

    config: MoeStableLmConfig
    config_class = MoeStableLmConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoeStableLmConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, StableLmMLP)
        self.post_init()


class MoePhiModel(PhiModel):
    """Phi whose `moe_layers` have a `MixtureOfExperts` for an MLP."""

    config: MoePhiConfig
    config_class = MoePhiConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoePhiConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, PhiMLP)
        self.post_init()


class MoeQwenModel(Qwen2Model):
    """Qwen whose `moe_layers` have a `MixtureOfExperts` for an MLP."""

    config: MoeQwenConfig
    config_class = MoeQwenConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoeQwenConfig) -> None:
        super().__init__(config)
        add_mixtures(self.layers, config, Qwen2MLP)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """As `Qwen2Model.forward`.

        Raises:
            UserError: for a text of more tokens than `max_position_embeddings`.
        """
        given = inputs["inputs_embeds"] if input_ids is None else input_ids
        cache = inputs.get("past_key_values")
        tokens = given.shape[1] + (0 if cache is None else cache.get_seq_length())
        if tokens > self.config.max_position_embeddings:
            raise UserError(
                f"a prompt and its answer take {tokens} tokens, but Qwen's attention is another "
                f"one beyond its seq_length of {self.config.max_position_embeddings}, which is not "
                "supported; lower evaluation.max_new_tokens or leave the question out"
            )
        return super().forward(input_ids, **inputs)


for config, model in (
    (MoeStableLmConfig, MoeStableLmModel),
    (MoePhiConfig, MoePhiModel),
    (MoeQwenConfig, MoeQwenModel),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
