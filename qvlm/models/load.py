"""A checkpoint folder becomes a model that answers problems.

`LoadedModel` keeps together what a checkpoint was tuned with: weights, tokenizer, image size and
prompting. Everything that reads or writes text for the model goes through it. A folder is in our
own format, as the miniatures, or as its authors published it (`qvlm.models.original`).

Loading ends with a check that these belong together, because a wrong prompt or picture gives
plausible answers and 40 % accuracy, and no other hint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from qvlm.data.prompts import IMAGE_TOKEN, Prompting
from qvlm.errors import UserError
from qvlm.models.checkpoints.families import OWN_NAMES, read_config
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.checkpoints.original import Original, Tensors, find_tensors, load_original
from qvlm.models.checkpoints.tokenizer import TextEncoding
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.meta import hollow as hollow_model
from qvlm.models.moe import MoeStableLmConfig as MoeStableLmConfig  # registers it and its like
from qvlm.packing import ORIGIN, is_packed, load_packed, read_origin, save_packed, write_origin

MINIATURES = Path(__file__).parent / "miniature"


@dataclass
class LoadedModel:
    """A model in evaluation mode with the encoding that it was tuned for.

    Attributes:
        model: the network.
        tokenizer: with pad, bos and eos tokens and one token for `<image>`.
        image_processor: resizes and normalises to the tower's input.
        prompting: prompt format and conversation template of the checkpoint.
        name: as used in records and tables.
        image_fit: how a picture becomes square: "crop" resizes its shorter side and cuts the
            longer, "pad" adds borders of the mean colour.
        image_text: what stands for an image in a prompt; some checkpoints wrap `<image>`.
        begins_with_bos: whether a text begins with the bos token.
        tensors: of a hollow model, to fill its layers with.
    """

    model: Llava
    tokenizer: PreTrainedTokenizerFast
    image_processor: CLIPImageProcessorPil
    prompting: Prompting
    name: str
    image_fit: str = "crop"
    image_text: str = IMAGE_TOKEN
    begins_with_bos: bool = True
    tensors: Tensors | None = None

    @property
    def image_size(self) -> int:
        """Side of the tower's input in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def image_tokens(self) -> int:
        """Number of positions that one image takes in the language model: its patches."""
        config = self.model.config
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (config.vision_feature_select_strategy == "full")  # and the class token

    def encode(
        self, problems: Sequence[Mapping[str, Any]], with_target: bool = False
    ) -> dict[str, Tensor]:
        """Encodes problems as one left-padded batch, with the expected answer if asked for."""
        prompts = [self.prompting.prompt(problem) for problem in problems]
        if with_target:
            prompts = [
                prompt + self.prompting.target(problem)
                for prompt, problem in zip(prompts, problems, strict=True)
            ]
        return self.encode_prompts(prompts, [problem["image"] for problem in problems])

    def encode_prompts(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None]
    ) -> dict[str, Tensor]:
        """Encodes texts, each with at most one image.

        Returns:
            `input_ids` and `attention_mask` [batch, tokens], padded on the left; and, only if
            there is an image, `pixel_values` [images, 3, size, size] in the order of the rows.

        Raises:
            ValueError: if a text has not one `<image>` per image.
        """
        for prompt, image in zip(prompts, images, strict=True):
            if prompt.count(IMAGE_TOKEN) != (image is not None):
                raise ValueError("a prompt needs exactly one <image> for each image")
        rows = self._ids(prompts)
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        device = self.model.device
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        present = [image for image in images if image is not None]
        if present:
            if self.image_fit == "pad":
                present = [
                    pad_to_square(image, self.image_processor.image_mean) for image in present
                ]
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixels.to(device, self.model.dtype)
        return batch

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts; each is tokenized in pieces, around its image.

        So does the code of LLaVA: with sentencepiece a piece begins with a blank of its own.
        """
        pieces = [text.replace(IMAGE_TOKEN, self.image_text).split(IMAGE_TOKEN) for text in prompts]
        flat = [piece for row in pieces for piece in row]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        image = [self.model.config.image_token_id] * self.image_tokens
        start = [self.tokenizer.bos_token_id] if self.begins_with_bos else []
        rows = []
        for row in pieces:
            ids = start + next(encoded)
            for _ in row[1:]:
                ids += image + next(encoded)
            rows.append(ids)
        return rows

    def decode(self, ids: Tensor) -> list[str]:
        """Turns token ids [batch, tokens] into texts without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Puts an image in the middle of a square of the mean colour, as LLaVA-v1.5 was tuned.

    Args:
        mean: of the image processor, per channel from 0 to 1.
    """
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def embedded(path: str | Path) -> Path | None:
    """The folder of the embedded miniature of this name, or None: a folder elsewhere is none."""
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
    hollow: bool = False,
) -> LoadedModel:
    """Loads a checkpoint.

    Args:
        path: a folder, the name of an embedded miniature, or a repository of the hub.
        name: what records and tables call the model.
        prompting: prompt format and conversation template; QCM-LEA and vicuna_v1 by default.
        device: where to put the weights.
        dtype: their floating-point type.
        vision_tower: folder or repository of the tower, for checkpoints whose config.json names
            one; None is that.
        image_size: side of the tower's input in pixels, to be checked; None accepts any.
        image_fit: "crop" or "pad"; None is what the checkpoint states.
        expert_capacity: "checkpoint" drops tokens as its config.json states, "unlimited" none.
        hollow: leave the decoder layers on the meta device, to be filled one by one.

    Raises:
        UserError: if the folder or a file in it is missing, truncated or does not fit, or what the
            model was tuned with does not belong together.
    """
    folder = embedded(path) or local_folder(path, "model.path")
    owner = f"model {name}"
    content = read_config(folder, owner)
    hollow_on = device if hollow else None
    if is_packed(content):
        read = _load_packed(folder, name, getattr(torch, dtype), expert_capacity)
    elif content.get("model_type") == LlavaArchitecture.model_type:
        if vision_tower is not None:
            raise UserError(f"model.vision_tower: {owner} carries its own; accepted is null")
        read = _load_own(folder, name, getattr(torch, dtype), expert_capacity, hollow_on)
    else:
        read = load_original(
            folder, content, owner, getattr(torch, dtype), vision_tower, expert_capacity, hollow_on
        )
    tokenizer = read.text.tokenizer
    read.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not hollow:  # what is on the meta device cannot be moved, and the rest is in its place
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


def save_packed_model(loaded: LoadedModel, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes a packed model with everything that it takes to ask it, for `load_model`.

    Args:
        loaded: with packed layers.
        folder: made if need be; a packed checkpoint in it is replaced.
        origin: what the model was quantized with.

    Raises:
        UserError: if the model has no packed layer, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).unlink(missing_ok=True)
        save_packed(loaded.model, folder)
        save_encoding(loaded, folder, origin)
    except OSError as error:
        raise UserError(f"save_packed: {folder} cannot be written ({error})") from error


def save_encoding(loaded: LoadedModel, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes what a packed model is asked with, and last what it was quantized with."""
    loaded.tokenizer.save_pretrained(folder)
    loaded.image_processor.save_pretrained(folder)
    encoding = {
        "image_fit": loaded.image_fit,
        "image_text": loaded.image_text,
        "begins_with_bos": loaded.begins_with_bos,
    }
    write_origin(folder, {**origin, "encoding": encoding})


def _load_packed(folder: Path, name: str, dtype: torch.dtype, expert_capacity: str) -> Original:
    """Loads what `save_packed_model` wrote."""
    encoding = read_origin(folder)["encoding"]
    try:
        model = load_packed(
            Llava, folder, config=_architecture(folder, expert_capacity), dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = CLIPImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {name}: {folder} does not load: {reason}") from error
    text = TextEncoding(tokenizer, encoding["begins_with_bos"])
    return Original(model, text, image_processor, encoding["image_fit"], encoding["image_text"])


def _architecture(folder: Path, expert_capacity: str) -> LlavaArchitecture:
    architecture = LlavaArchitecture.from_pretrained(folder)
    if expert_capacity == "unlimited" and hasattr(architecture.text_config, "capacity_factor"):
        architecture.text_config.capacity_factor = None
    return architecture


def _load_own(
    folder: Path, name: str, dtype: torch.dtype, expert_capacity: str, hollow_on: str | None
) -> Original:
    """Loads a folder in transformers' format with our configuration class."""
    needed = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    for file in needed:
        if not (folder / file).is_file():
            raise UserError(
                f"model {name}: {folder / file} is missing; a checkpoint folder holds "
                f"{', '.join(needed)}"
            )
    architecture, tensors = _architecture(folder, expert_capacity), None
    try:
        if hollow_on is None:
            model, report = Llava.from_pretrained(
                folder, config=architecture, dtype=dtype, output_loading_info=True
            )
        else:
            weights = Weights(folder, f"model {name}")
            sources = {"checkpoint": (weights, OWN_NAMES)}
            tensors = find_tensors(architecture, sources, f"model {name}")
            model, report = hollow_model(architecture, tensors, dtype, hollow_on), {}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = CLIPImageProcessorPil.from_pretrained(folder)
    except (SafetensorError, OSError, RuntimeError, ValueError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model {name}: {folder} does not load: {reason}") from error
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if problems:
        kind, keys = next(iter(problems.items()))
        raise UserError(
            f"model {name}: {folder / 'model.safetensors'} does not fit its config.json: "
            f"{len(keys)} {kind.replace('_', ' ')}, first {keys[0]}"
        )
    text = TextEncoding(tokenizer, begins_with_bos=True)
    return Original(model, text, image_processor, "crop", IMAGE_TOKEN, tensors)


def _check_together(loaded: LoadedModel, image_size: int | None, owner: str) -> None:
    """Refuses a template or an image size that is not the checkpoint's."""
    end = loaded.tokenizer.eos_token
    if loaded.prompting.end != end:
        raise UserError(
            f"model.conversation: {loaded.prompting.conversation} ends a turn with "
            f"{loaded.prompting.end}, but the tokenizer of {owner} with {end}; give the template "
            "that the checkpoint was tuned with"
        )
    side = loaded.image_size
    if image_size not in (None, side):
        raise UserError(
            f"model.image_size: {image_size} is not what the vision tower of {owner} takes; "
            f"accepted is {side}"
        )
    crop = loaded.image_processor.crop_size
    if (crop["height"], crop["width"]) != (side, side):
        raise UserError(
            f"{owner}: preprocessor_config.json cuts images to {crop['height']} x {crop['width']}, "
            f"but the vision tower takes {side} x {side}; give the one that belongs to the tower"
        )
