"""A loaded model, and the encoding of texts and images that it was tuned with.

`LoadedModel` keeps together what a checkpoint was tuned with: weights, tokenizer, image size and
prompting. Everything that reads or writes text for a model goes through it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qvlm.data.images import to_rgb
from qvlm.data.prompts import IMAGE_TOKEN, Prompting, pictures_of
from qvlm.models.checkpoints.tensors import Tensors
from qvlm.models.networks import image_tokens


@dataclass
class LoadedModel:
    """A model in evaluation mode with the encoding that it was tuned with.

    Attributes:
        model: The network.
        tokenizer: Tokenizer with a pad, a bos and an eos token.
        image_processor: Processor of transformers that resizes images and normalizes them for the
            tower; None for a language model alone, which reads no image.
        prompting: Prompt format and conversation template of the checkpoint.
        name: Name of the model in records and tables.
        image_fit: How an image becomes square. "crop" resizes its shorter side and cuts the longer
            one, "pad" adds borders of the mean color.
        image_text: Text that stands for an image in a prompt. Some checkpoints wrap `<image>`.
        begins_with_bos: Whether a text begins with the bos token.
        tensors: Tensors of the checkpoint, where the decoder layers are on the meta device.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    prompting: Prompting
    name: str
    image_fit: str = "crop"
    image_text: str = IMAGE_TOKEN
    begins_with_bos: bool = True
    tensors: Tensors | None = None

    @property
    def reads_images(self) -> bool:
        """Whether the model has a vision tower."""
        return self.image_processor is not None

    @property
    def image_tokens_vary(self) -> bool:
        """Whether an image takes as many tokens as its size asks for, so `token_ids` decodes it."""
        return False

    @property
    def image_token(self) -> str:
        """Text that stands for an image in the prompts of `prompting`."""
        return IMAGE_TOKEN

    @property
    def image_size(self) -> int:
        """Side of the tower's input in pixels."""
        size: int = self.model.config.vision_config.image_size
        return size

    @property
    def image_tokens(self) -> int:
        """Number of positions that one image takes in the language model."""
        return image_tokens(self.model.config)

    def encode(
        self, problems: Sequence[Mapping[str, Any]], with_target: bool = False
    ) -> dict[str, Tensor]:
        """Encodes problems as one left-padded batch.

        Args:
            problems: Problems in ScienceQA's schema, images decoded.
            with_target: Whether the expected answer follows each prompt.

        Returns:
            Batch as from `encode_prompts`.
        """
        prompts = [self.prompting.prompt(problem) for problem in problems]
        if with_target:
            prompts = [
                prompt + self.prompting.target(problem)
                for prompt, problem in zip(prompts, problems, strict=True)
            ]
        images = [pictures_of(problem["image"]) for problem in problems]
        return self.encode_prompts(prompts, images)

    def encode_prompts(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """Encodes texts with the images of each.

        Args:
            prompts: Texts, with one `<image>` where each of their images belongs.
            images: Images of each text, of any mode.

        Returns:
            `input_ids` and `attention_mask` [batch, tokens], padded on the left. If there is an
            image, also `pixel_values` [images, 3, size, size] in the order of the rows.

        Raises:
            ValueError: If a text does not hold exactly one `<image>` for each image, or there is an
                image and the model reads none.
        """
        return self.collate(self.token_ids(prompts, images), images)

    def collate(
        self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """Makes a batch of token ids and images.

        Args:
            rows: Token ids of each text, with the positions of its images.
            images: Images of each text, of any mode.

        Returns:
            Batch as from `encode_prompts`.
        """
        device = self.model.device
        batch = {key: tensor.to(device) for key, tensor in self._padded(rows).items()}
        present = [to_rgb(image) for row in images for image in row]
        if present:
            if self.image_fit == "pad":
                present = [
                    pad_to_square(image, self.image_processor.image_mean) for image in present
                ]
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixels.to(device, self.model.dtype)
        return batch

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Returns the positions of the tokens of a batch as an argument of the model's forward.

        Args:
            mask: Mask [batch, tokens] that is zero at the padding on the left.

        Returns:
            `position_ids` [batch, tokens], counted from the first token of each row.
        """
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def token_ids(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> list[list[int]]:
        """Tokenizes texts, each in the pieces around its images.

        LLaVA's own code does the same. With sentencepiece every piece begins with a blank.

        Returns:
            Token ids of each text. An image takes `image_tokens` positions.

        Raises:
            ValueError: If a text does not hold exactly one `<image>` for each image, or there is an
                image and the model reads none.
        """
        for prompt, own in zip(prompts, images, strict=True):
            if prompt.count(IMAGE_TOKEN) != len(own):
                raise ValueError("a prompt needs exactly one <image> for each image")
            if own and not self.reads_images:
                raise ValueError(f"model {self.name} reads no image")
        pieces = [text.replace(IMAGE_TOKEN, self.image_text).split(IMAGE_TOKEN) for text in prompts]
        flat = [piece for row in pieces for piece in row]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        start = [self.tokenizer.bos_token_id] if self.begins_with_bos else []
        rows = []
        for row in pieces:
            ids = start + next(encoded)
            for _ in row[1:]:
                ids += [self.model.config.image_token_id] * self.image_tokens + next(encoded)
            rows.append(ids)
        return rows

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Ids and mask [batch, tokens] of rows of ids, padded on the left."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (longest - len(row)) + [*row] for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def save_encoding(self, folder: Path) -> None:
        """Writes tokenizer and image processor into the folder of a checkpoint."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Texts of the special tokens of the tokenizer, by their ids."""
        added = self.tokenizer.added_tokens_decoder
        return {index: str(token) for index, token in added.items() if token.special}

    def decode(self, ids: Tensor, kept: Collection[int] = ()) -> list[str]:
        """Turns token ids [batch, tokens] into texts without special tokens.

        Args:
            ids: Token ids of each text.
            kept: Ids of special tokens that the texts show.
        """
        if not kept:
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        hidden = self.special_tokens.keys() - set(kept)
        rows = [[each for each in row if each not in hidden] for row in ids.tolist()]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False)


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centers an image on a square of the mean color, as LLaVA-v1.5 was tuned.

    Args:
        image: Image in RGB, of any size.
        mean: Mean of the image processor, per channel from 0 to 1.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
