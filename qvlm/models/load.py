"""A checkpoint folder becomes a `LoadedModel`, whatever its format.

A folder is in our own format, as the miniatures are, packed, or as its authors published it. With
`conversation="chat"` it is of a family in `qvlm.families`, and its own processor encodes.
Loading ends with a check that its parts belong together, because a wrong prompt or image size gives
plausible answers, 40 % accuracy and no other sign.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from qvlm.data.prompts import CHAT, Prompting
from qvlm.errors import UserError, first_line
from qvlm.families import Family
from qvlm.models.chat import ChatPrompting, FamilyModel
from qvlm.models.checkpoints.checkpoint import Checkpoint
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.family import family_of, load_family, read_processor
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.checkpoints.language_model import is_language_model, load_language_model
from qvlm.models.checkpoints.original import carries_its_tower, load_original
from qvlm.models.checkpoints.own import load_own
from qvlm.models.float64 import compute_in_float64
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.loaded import LoadedModel
from qvlm.models.packed import load_packed_checkpoint, load_packed_family
from qvlm.packing import is_packed

MINIATURES = Path(__file__).parent / "miniature"


def embedded(path: str | Path) -> Path | None:
    """Returns the folder of the embedded miniature of this name, or None if there is none."""
    folder = MINIATURES / path
    return folder if folder.parent == MINIATURES and folder.is_dir() else None


def load_model(
    path: str | Path,
    name: str,
    prompting: Prompting | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    vision_tower: str | None = None,
    image_size: int | None = None,
    image_fit: str | None = None,
    expert_capacity: str = "checkpoint",
    meta_layers: bool = False,
) -> LoadedModel:
    """Loads a checkpoint.

    Args:
        path: Folder, name of an embedded miniature, or repository on the hub.
        name: Name of the model in records and tables.
        prompting: Prompt format and conversation template; None is QCM-LEA with vicuna_v1. With the
            template "chat" the checkpoint's own processor encodes texts and pictures.
        device: Device of the weights.
        dtype: Floating-point type of the weights, in which the model computes.
        vision_tower: Folder or repository of the tower, for checkpoints whose config.json names
            one; None takes that one.
        image_size: Expected side of the tower's input in pixels; None accepts any.
        image_fit: "crop" or "pad"; None takes what the checkpoint states.
        expert_capacity: "checkpoint" for the limit in config.json, or "unlimited".
        meta_layers: Whether the decoder layers stay on the meta device, to be materialized one by
            one.

    Raises:
        UserError: If the folder or a file in it is missing, truncated or does not fit, or its parts
            do not belong together.
    """
    folder = embedded(path) or local_folder(path, "model.path")
    owner = f"model {name}"
    if prompting is not None and prompting.conversation == CHAT:
        for option, value, wanted in (
            ("model.vision_tower", vision_tower, None),
            ("model.image_size", image_size, None),
            ("model.image_fit", image_fit, None),
            ("stream", meta_layers, False),
        ):
            if value != wanted:
                raise _not_for_chat(option, value, wanted)
        return _load_family_model(folder, name, prompting, device, dtype)
    read = _read(
        folder,
        owner,
        getattr(torch, dtype),
        vision_tower,
        expert_capacity,
        device if meta_layers else None,
    )
    tokenizer = read.text.tokenizer
    read.model.generation_config = _greedy(tokenizer)
    if dtype == "float64":
        compute_in_float64(read.model)
    if not meta_layers:  # a meta device's weights cannot be moved, and the others are in place
        read.model.to(device).eval()
    loaded = LoadedModel(
        read.model,
        tokenizer,
        read.image_processor,
        prompting or Prompting(),
        name,
        image_fit or read.image_fit,
        read.image_text,
        read.text.begins_with_bos,
        read.tensors,
    )
    _check_together(loaded, image_size, owner)
    return loaded


def _load_family_model(
    folder: Path, name: str, prompting: Prompting, device: str, dtype: str
) -> FamilyModel:
    """Loads a checkpoint whose own processor encodes texts and pictures."""
    owner = f"model {name}"
    content = read_config(folder, owner)
    family = family_of(content, owner)
    if dtype == "float64":
        raise UserError(
            f"model.dtype=float64 is not possible with {family.title}, whose own code computes in "
            "float32 in places. Choose one of: float32, bfloat16, float16."
        )
    load = load_packed_family if is_packed(content) else load_family
    model = load(folder, owner, getattr(torch, dtype))
    processor = read_processor(folder, family, owner)
    chat = ChatPrompting(prompting.format, processor=processor)
    tokenizer = processor.tokenizer
    tokenizer.eos_token = chat.end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{owner}: the tokenizer has {len(tokenizer)} tokens, but the model has a vocabulary "
            f"of {rows}. Give the tokenizer that belongs to the weights."
        )
    _require_parts(model, family, owner)
    model.generation_config = _greedy(tokenizer)
    model.to(device).eval()
    images = processor.image_processor
    loaded = FamilyModel(model, tokenizer, images, chat, name, processor=processor, family=family)
    if not is_packed(content):  # it was checked before it was packed
        _check_with_a_picture(loaded, owner)
    return loaded


def _require_parts(model: PreTrainedModel, family: Family, owner: str) -> None:
    """Refuses a model of a family whose parts are not where the family's table says."""
    names = {name for name, _ in model.named_modules()}
    for part in (family.tower, *family.projector, family.decoder):
        if part is not None and part not in names:
            holder = part
            while holder not in names:
                holder = holder.rpartition(".")[0]
            raise UserError(
                f"{owner}: {type(model.get_submodule(holder)).__name__} has no {part}, which the "
                f"table of {family.title} names. Describe the model in a table of its own as "
                "docs/families.md shows, or choose another one."
            )


class _Reached(Exception):
    """Stops a forward pass at the first decoder layer."""


@torch.no_grad()
def _check_with_a_picture(loaded: FamilyModel, owner: str) -> None:
    """Refuses a processor that does not make of a picture what the network reads.

    Everything in front of the first decoder layer runs once.
    """
    assert loaded.family is not None
    picture = Image.new("RGB", (64, 48), (127, 127, 127))

    def stop(*_: object) -> None:
        raise _Reached

    layer = loaded.model.get_submodule(f"{loaded.family.decoder}.0")
    handle = layer.register_forward_pre_hook(stop)
    try:
        images = [[picture]]
        rows = loaded.token_ids(["".join(loaded.prompting.around(1))], images)
        batch: dict[str, Any] = loaded.collate(rows, images)
        positions = loaded.positions(batch["attention_mask"])
        loaded.model(**batch, **positions, use_cache=False)
    except _Reached:
        pass
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _not_together(owner, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        raise _not_together(owner, error) from error
    finally:
        handle.remove()


def _not_together(owner: str, error: Exception) -> UserError:
    return UserError(
        f"{owner}: its processor does not make of a picture what its network reads "
        f"({first_line(error).rstrip('.')}). Give the processor_config.json, "
        "preprocessor_config.json and config.json that belong together."
    )


def _not_for_chat(option: str, value: object, wanted: object) -> UserError:
    given = str(wanted).lower() if wanted is not None else "null"
    return UserError(
        f"{option}={str(value).lower()} is not for model.conversation=chat, with which the "
        f"checkpoint's own processor encodes texts and pictures. Give {option}={given}."
    )


def _greedy(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _read(
    folder: Path,
    owner: str,
    dtype: torch.dtype,
    vision_tower: str | None,
    expert_capacity: str,
    meta_layers_for: str | None,
) -> Checkpoint:
    """Reads a folder with the loader of its format."""
    content = read_config(folder, owner)
    if is_packed(content):
        return load_packed_checkpoint(folder, content, owner, dtype, expert_capacity)
    if is_language_model(content):
        return load_language_model(folder, content, owner, dtype, meta_layers_for)
    if content.get("model_type") == LlavaArchitecture.model_type:
        if vision_tower is not None:
            raise carries_its_tower(owner)
        return load_own(folder, content, owner, dtype, expert_capacity, meta_layers_for)
    return load_original(
        folder, content, owner, dtype, vision_tower, expert_capacity, meta_layers_for
    )


def _check_together(loaded: LoadedModel, image_size: int | None, owner: str) -> None:
    """Refuses prompting or an image size that the model was not tuned with."""
    end = loaded.tokenizer.eos_token
    if loaded.prompting.end != end:
        raise UserError(
            f"model.conversation: {loaded.prompting.conversation} ends a turn with "
            f"{loaded.prompting.end}, but the tokenizer of {owner} ends it with {end}. Give the "
            "template that the checkpoint was tuned with."
        )
    if loaded.image_processor is None:
        if image_size is not None:
            raise UserError(
                f"model.image_size: {owner} has no vision tower. Set model.image_size=null."
            )
        return
    side = loaded.image_size
    if image_size not in (None, side):
        raise UserError(
            f"model.image_size: {image_size} is not the input size of the vision tower of {owner}. "
            f"Set model.image_size={side} or null."
        )
    crop = loaded.image_processor.crop_size
    if (crop["height"], crop["width"]) != (side, side):
        raise UserError(
            f"{owner}: preprocessor_config.json cuts images to {crop['height']} x {crop['width']}, "
            f"but the vision tower takes {side} x {side}. Give the preprocessor_config.json that "
            "belongs to the tower."
        )
