"""What every loader of a checkpoint returns, and the steps that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError, first_line
from qvlm.models.checkpoints.tensors import Tensors
from qvlm.models.checkpoints.tokenizer import TextEncoding
from qvlm.models.llava import Llava
from qvlm.models.meta import model_with_meta_layers
from qvlm.models.networks import Architecture, LanguageModel, network


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder.

    Attributes:
        model: The network.
        text: Tokenizer, and how a text begins.
        image_processor: Processor that resizes images and normalizes them for the tower; None for a
            language model alone.
        image_fit: How an image becomes square, "crop" or "pad".
        image_text: Text that stands for an image in a prompt, `<image>` or around it.
        tensors: Tensors of the checkpoint, where the decoder layers are on the meta device.
    """

    model: Llava | LanguageModel
    text: TextEncoding
    image_processor: CLIPImageProcessorPil | None = None
    image_fit: str = "crop"
    image_text: str = IMAGE_TOKEN
    tensors: Tensors | None = None


def build_model(
    architecture: Architecture,
    tensors: Tensors,
    dtype: torch.dtype,
    meta_layers_for: str | None,
    owner: str,
) -> Llava | LanguageModel:
    """Builds a model from tensors that are complete and fit.

    Args:
        architecture: Configuration of the model.
        tensors: Tensors of the model by name.
        dtype: Type of the weights.
        meta_layers_for: Device of everything but the decoder layers, which then stay on the meta
            device; None loads all layers in main memory.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If transformers does not take all of the tensors.
    """
    if meta_layers_for is not None:
        return model_with_meta_layers(architecture, tensors, dtype, meta_layers_for)
    # The state is complete, so that no weight is initialized at random.
    model, report = network(architecture).from_pretrained(
        None,
        config=architecture,
        state_dict=dict(tensors),
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    require_loaded(report, owner)
    return model


def require_loaded(report: Mapping[str, Any], owner: str) -> None:
    """Refuses a model of which transformers says that tensors are left, by kind.

    Raises:
        UserError: If there is any.
    """
    left = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if left:
        raise UserError(f"{owner}: not every tensor was loaded: {left}")


def read_image_processor(folder: Path, owner: str) -> CLIPImageProcessorPil:
    """Reads the preprocessor_config.json of a folder.

    Raises:
        UserError: If it is missing or cannot be read.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(
            f"{owner}: {file} is missing. It says how images are resized; download it as well."
        )
    try:
        return CLIPImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError),
        RecursionError,
    ) as error:
        raise UserError(f"{owner}: {file} does not load: {first_line(error)}") from error
