"""Vision-language models in floating point: architectures, checkpoints, text and image encoding.

Nothing here knows of quantization. Importing this package registers our architectures with
transformers, so that `AutoConfig` and `from_pretrained` find them.
"""

from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.load import LoadedModel, load_model
from qvlm.models.moe import MoePhiConfig, MoeQwenConfig, MoeStableLmConfig, MoeStableLmModel

__all__ = [
    "Llava",
    "LlavaArchitecture",
    "LoadedModel",
    "MoePhiConfig",
    "MoeQwenConfig",
    "MoeStableLmConfig",
    "MoeStableLmModel",
    "load_model",
]
