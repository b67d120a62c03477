"""Checkpoints of the families in `qvlm.families`: transformers' files, class and processor.

The network is transformers' own class. Weights are read as those of any other checkpoint, and
transformers renames them where it has changed a name. The processor is transformers' own too, made
of the checkpoint's tokenizer, image processor and chat template. Pictures are always resized by
Pillow, so that they do not depend on whether torchvision is installed, and video is left out. No
code of a checkpoint runs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from qvlm.errors import UserError, first_line
from qvlm.families import FAMILIES, Family
from qvlm.models.checkpoints.checkpoint import require_loaded
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.networks import network

CHAT_TEMPLATE = "chat_template.jinja"
PROCESSOR = "processor_config.json"


def family_of(content: Mapping[str, Any], owner: str) -> Family:
    """Returns the table of a checkpoint's family.

    Args:
        content: Content of its config.json.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If the family has no table.
    """
    kind = content.get("model_type")
    if kind == LlamaConfig.model_type:
        raise UserError(
            f"{owner} is a LLaMA alone, which is not of a family. Give model=smollm2 "
            "model.path=FOLDER (docs/text.md)."
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{owner}: model_type={kind} in config.json is not a family that is served. Describe "
            f"it in a table as docs/families.md shows, or choose one of: {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def read_family_config(folder: Path, owner: str) -> PretrainedConfig:
    """Reads the config.json of a family's checkpoint.

    Raises:
        UserError: If it does not describe a model.
    """
    with _explained(f"{owner}: config.json does not describe a model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_family(folder: Path, owner: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the network of a family's checkpoint in full precision.

    Args:
        folder: Folder of the checkpoint.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights.

    Raises:
        UserError: If a file is missing or damaged, or the weights are not those of config.json.
    """
    config = read_family_config(folder, owner)
    tensors = dict(Weights(folder, owner))
    with _explained(f"{owner}: the weights are not those of its config.json"):
        model, report = network(config).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    require_loaded(report, owner)
    return model


def read_processor(folder: Path, family: Family, owner: str) -> Any:
    """Reads tokenizer, image processor and chat template, without the part for video.

    Args:
        folder: Folder of the checkpoint.
        family: Table of its family.
        owner: Name of the checkpoint in messages.

    Returns:
        A processor of transformers.

    Raises:
        UserError: If a file is missing or damaged, or there is no chat template.
    """
    kind = PROCESSOR_MAPPING[CONFIG_MAPPING[family.processor or family.model_type]]
    with _explained(f"{owner}: the processor in {folder} does not load"):
        parts = {
            "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            "image_processor": AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            ),
        }
        settings, _ = kind.get_processor_dict(folder)
        arguments = [parts.get(name) for name in kind.get_attributes()]
        processor = _without_video(kind).from_args_and_dict(arguments, settings)
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise UserError(
            f"{owner}: {folder} has no chat template, which says how the model is asked. Add "
            f"{CHAT_TEMPLATE}."
        )
    return processor


def save_processor(processor: Any, folder: Path) -> None:
    """Writes what `read_processor` reads."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    parts = {*processor.get_attributes(), "auto_map"}
    settings = {key: value for key, value in processor.to_dict().items() if key not in parts}
    (folder / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(processor.chat_template, encoding="utf-8")


def _without_video(kind: type[Any]) -> type[Any]:
    """A processor class that accepts to have no part for video, which needs torchvision."""

    def check(self: Any, name: str, argument: Any) -> None:
        """Does nothing: the parts are made above, and only the one for video is None."""

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what transformers raises about a file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`s
        raise UserError(f"{what}: {first_line(error)}") from error
