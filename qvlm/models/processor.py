"""The processor of our checkpoints, for code that knows transformers and not this package.

`AutoProcessor.from_pretrained(folder)` returns it. It encodes texts and images exactly as
`LoadedModel` does, because it asks one, whose network is only its configuration.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature

from qvlm.data.prompts import IMAGE_TOKEN, Prompting
from qvlm.errors import UserError
from qvlm.models.checkpoints.checkpoint import read_image_processor
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.checkpoints.tokenizer import read_saved_tokenizer
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.loaded import LoadedModel
from qvlm.packing import is_packed, read_origin


class Processor:
    """Turns texts and images into what the model takes, and tokens into text.

    Args:
        encoder: Encoding of a checkpoint.
    """

    def __init__(self, encoder: LoadedModel) -> None:
        self._encoder = encoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "Processor":
        """Reads the processor of a packed checkpoint.

        Args:
            folder: Folder of the checkpoint.
            kwargs: Arguments that `AutoProcessor` hands on. None of them has an effect.

        Raises:
            UserError: If a file is missing or damaged, or the checkpoint is not packed.
        """
        place, owner = local_folder(folder, "folder"), str(folder)
        content = read_config(place, owner)
        if not is_packed(content):
            raise UserError(
                f"{folder} is not a packed checkpoint. Give a folder that save_packed wrote."
            )
        origin = read_origin(place)
        model, encoding = origin.options["model"], origin.encoding
        network: Any = SimpleNamespace(
            config=read_architecture(content, owner),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        return cls(
            LoadedModel(
                network,
                read_saved_tokenizer(place, encoding.begins_with_bos, owner).tokenizer,
                read_image_processor(place, owner),
                Prompting(model["prompt_format"], model["conversation"]),
                model["name"],
                encoding.image_fit,
                encoding.image_text,
                encoding.begins_with_bos,
            )
        )

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the checkpoint."""
        return self._encoder.tokenizer

    @property
    def image_processor(self) -> Any:
        """Image processor of the checkpoint."""
        return self._encoder.image_processor

    def prompt(
        self, question: str, choices: Sequence[str], image: bool = False, hint: str = ""
    ) -> str:
        """Returns the text that asks a question as the checkpoint was tuned to be asked.

        Args:
            question: Text of the question.
            choices: Texts that the model chooses from.
            image: Whether an image belongs to the question; the text then has one `<image>`.
            hint: Text that belongs to the question.
        """
        problem = {"question": question, "choices": choices, "hint": hint}
        return self._encoder.prompting.prompt({**problem, "image": True if image else None})

    def __call__(
        self,
        images: Image | Sequence[Image] | None = None,
        text: str | Sequence[str] = "",
        **kwargs: Any,
    ) -> BatchFeature:
        """Encodes texts with the images of each.

        Args:
            images: Images, in the order of the texts.
            text: Text, or several, with one `<image>` where each of its images belongs.
            kwargs: Arguments of other processors, such as `return_tensors="pt"`. None of them has
                an effect: tensors are returned, padded on the left.

        Returns:
            `input_ids` and `attention_mask` [texts, tokens] and, with images, `pixel_values`
            [images, 3, size, size].

        Raises:
            ValueError: If the images are not as many as the texts name.
        """
        texts = [text] if isinstance(text, str) else list(text)
        given = [] if images is None else [images] if isinstance(images, Image) else list(images)
        if sum(each.count(IMAGE_TOKEN) for each in texts) != len(given):
            raise ValueError(
                f"{len(given)} images are not as many as the texts name with {IMAGE_TOKEN}"
            )
        waiting = iter(given)
        rows = [[*islice(waiting, each.count(IMAGE_TOKEN))] for each in texts]
        return BatchFeature(self._encoder.encode_prompts(texts, rows))

    def decode(self, tokens: Tensor, **kwargs: Any) -> str:
        """Turns token ids [tokens] into text; see the tokenizer's `decode`."""
        text: str = self.tokenizer.decode(tokens, **kwargs)
        return text

    def batch_decode(self, tokens: Tensor, **kwargs: Any) -> list[str]:
        """Turns token ids [texts, tokens] into texts; see the tokenizer's `batch_decode`."""
        texts: list[str] = self.tokenizer.batch_decode(tokens, **kwargs)
        return texts


AutoProcessor.register(LlavaArchitecture, Processor, exist_ok=True)
