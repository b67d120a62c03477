"""Vision-language models in floating point: architectures, checkpoints, text and image encoding.

Open `load` first: `load_model` turns a folder into a `LoadedModel`. `llava`, `mixture` and
`moe_language_models` are the networks, and `checkpoints` reads files. Only `packed`, which saves
and loads packed models, and `load` and `processor`, which recognize them, may import
`qvlm.packing`. Nothing here
imports methods or evaluation.
Importing this package registers our architectures with transformers.
"""

from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.load import load_model
from qvlm.models.loaded import LoadedModel
from qvlm.models.moe_language_models import MoePhiConfig, MoeQwenConfig, MoeStableLmConfig
from qvlm.models.processor import Processor

__all__ = [
    "Llava",
    "LlavaArchitecture",
    "LoadedModel",
    "MoePhiConfig",
    "MoeQwenConfig",
    "MoeStableLmConfig",
    "Processor",
    "load_model",
]
