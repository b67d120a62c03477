"""LLaMAs alone, without vision tower and projector, in transformers' format.

`experiments/convert_smollm2.py` writes such a folder, and so does `save_pretrained` of any LLaMA.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from qvlm.errors import UserError, first_line
from qvlm.models.checkpoints.checkpoint import Checkpoint, build_model
from qvlm.models.checkpoints.families.transformers_llava import LANGUAGE_MODEL
from qvlm.models.checkpoints.tensors import find_tensors
from qvlm.models.checkpoints.tokenizer import load_tokenizer
from qvlm.models.checkpoints.weights import Weights

# The second is what transformers calls the first where it saves our own class.
KINDS = (LANGUAGE_MODEL, "LanguageModel")


def is_language_model(content: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a LLaMA alone."""
    kinds = content.get("architectures") or [LANGUAGE_MODEL]
    return content.get("model_type") == LlamaConfig.model_type and kinds[0] in KINDS


def load_language_model(
    folder: Path,
    content: Mapping[str, Any],
    owner: str,
    dtype: torch.dtype,
    meta_layers_for: str | None = None,
) -> Checkpoint:
    """Loads the folder of a LLaMA.

    Args:
        folder: Folder of the checkpoint.
        content: Content of its config.json.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights.
        meta_layers_for: See `build_model`.

    Raises:
        UserError: If a file is missing or damaged, or anything does not fit.
    """
    architecture = read_language_model(content, owner)
    tensors = find_tensors(architecture, {"checkpoint": (Weights(folder, owner), ())}, owner)
    text = load_tokenizer(folder, dict(content), owner)
    if len(text.tokenizer) > architecture.vocab_size:
        raise UserError(
            f"{owner}: the tokenizer has {len(text.tokenizer)} tokens, but config.json has a "
            f"vocabulary of {architecture.vocab_size}. Give the tokenizer that belongs to the "
            "weights."
        )
    return Checkpoint(
        build_model(architecture, tensors, dtype, meta_layers_for, owner),
        text,
        tensors=tensors if meta_layers_for is not None else None,
    )


def read_language_model(content: Mapping[str, Any], owner: str) -> LlamaConfig:
    """Reads the config.json of a LLaMA.

    Raises:
        UserError: If it does not describe a model.
    """
    try:
        return LlamaConfig.from_dict(dict(content))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"{owner}: config.json does not describe a model: {first_line(error)}"
        ) from error
