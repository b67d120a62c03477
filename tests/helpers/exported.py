"""Packed checkpoints of tiny models, as they are exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qvlm.methods import RTN
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.networks import LanguageModel
from qvlm.packing.checkpoint import save_packed
from qvlm.packing.model import pack_model
from qvlm.quantization.calibration import Walk
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from tests.helpers.language_models import tiny_language_model, tiny_tokenizer
from tests.helpers.toy import toy_batches, toy_llava

WEIGHT = QuantSpec(4, "per_group", 32, ranges="minmax")
TOKEN, TENSOR = (QuantSpec(8, kind, ranges="minmax") for kind in ("per_token", "per_tensor"))
# Weights and inputs that the format can express.
SPECS = {
    "w4a8 in groups, per token": (WEIGHT, TOKEN),
    "w4a4 in groups, per token": (WEIGHT, replace(TOKEN, bits=4)),
    "w8a8 per channel, per tensor": (QuantSpec(8, "per_channel", ranges="minmax"), TENSOR),
    "w3a8 per channel, per token": (QuantSpec(3, "per_channel", ranges="minmax"), TOKEN),
    "w4a8 per tensor, per tensor": (QuantSpec(4, "per_tensor", ranges="minmax"), TENSOR),
}
IDS = torch.randint(3, 14, (4, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


def packed_language_model(
    folder: Path, weight: QuantSpec = WEIGHT, inputs: QuantSpec = TOKEN, method: Any = None
) -> LanguageModel:
    """Saves a packed LLaMA, and returns it."""
    model = tiny_language_model(hidden_size=32, intermediate_size=64)
    walk = Walk(model, BATCHES, QuantizationConfig(weight, inputs, inputs))
    (method or RTN()).quantize(walk)
    pack_model(model)
    save_packed(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def _tiny_llava(projector: str) -> Llava:
    plain = toy_llava().config
    torch.manual_seed(0)
    architecture = LlavaArchitecture(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_id=plain.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_type=projector,
    )
    return Llava(architecture).eval()


def packed_llava(folder: Path, projector: str) -> Llava:
    """Saves a packed LLaVA, and returns it."""
    model = _tiny_llava(projector)
    RTN().quantize(Walk(model, toy_batches(), QuantizationConfig(WEIGHT, TOKEN, TOKEN)))
    pack_model(model)
    save_packed(model, folder)
    return model
