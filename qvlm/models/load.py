"""A checkpoint folder becomes a model that answers problems.

`LoadedModel` keeps together what a checkpoint was tuned with: weights, tokenizer, image size and
prompting. Everything that reads or writes text for the model goes through it.
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

from qvlm.errors import UserError
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.moe_stablelm import MoeStableLmConfig as MoeStableLmConfig  # registers it
from qvlm.prompts import IMAGE_TOKEN, Prompting

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
    """

    model: Llava
    tokenizer: PreTrainedTokenizerFast
    image_processor: CLIPImageProcessorPil
    prompting: Prompting
    name: str

    @property
    def image_size(self) -> int:
        """Side of the tower's input in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def image_tokens(self) -> int:
        """Number of positions that one image takes in the language model: its patches."""
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

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
        texts = [
            f"{self.tokenizer.bos_token}{prompt}".replace(
                IMAGE_TOKEN, IMAGE_TOKEN * self.image_tokens
            )
            for prompt in prompts
        ]
        rows = self.tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        device = self.model.device
        batch = {name: rows[name].to(device) for name in ("input_ids", "attention_mask")}
        present = [image for image in images if image is not None]
        if present:
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixels.to(device, self.model.dtype)
        return batch

    def decode(self, ids: Tensor) -> list[str]:
        """Turns token ids [batch, tokens] into texts without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


def load_model(
    path: str | Path,
    name: str,
    prompting: Prompting | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> LoadedModel:
    """Loads a checkpoint folder in transformers' format.

    Args:
        path: the folder, or the name of an embedded miniature.
        name: what records and tables call the model.
        prompting: prompt format and conversation template; QCM-LEA and vicuna_v1 by default.
        device: where to put the weights.
        dtype: their floating-point type.

    Raises:
        UserError: if the folder or a file in it is missing, truncated or does not fit.
    """
    folder = MINIATURES / path if (MINIATURES / path).is_dir() else Path(path)
    needed = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    for file in needed:
        if not (folder / file).is_file():
            raise UserError(
                f"model {name}: {folder / file} is missing; a checkpoint folder holds "
                f"{', '.join(needed)}"
            )
    try:
        architecture = LlavaArchitecture.from_pretrained(folder)
        model, report = Llava.from_pretrained(
            folder, config=architecture, dtype=getattr(torch, dtype), output_loading_info=True
        )
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
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(device).eval()
    return LoadedModel(model, tokenizer, image_processor, prompting or Prompting(), name)
