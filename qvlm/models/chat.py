"""Prompts and batches of a family's model, made by the processor of its checkpoint.

The chat template of the checkpoint says how a request and its pictures are written, and the
processor how many tokens each picture takes: as many as its size asks for. There may be several
pictures in one text, of different sizes, and texts with and without pictures in one batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.data.images import to_rgb
from qvlm.data.prompts import CHAT, IMAGE_TOKEN, Prompting
from qvlm.errors import UserError
from qvlm.families import Family
from qvlm.models.checkpoints.family import save_processor
from qvlm.models.loaded import LoadedModel

_REQUEST, _ANSWER = "qvlm-request", "qvlm-answer"  # texts that no template has


@dataclass(frozen=True)
class ChatPrompting(Prompting):
    """A prompt format within the chat template of a checkpoint's processor.

    Attributes:
        processor: Processor of transformers with a chat template.
    """

    conversation: str = CHAT
    processor: Any = field(default=None, repr=False, compare=False)

    @property
    def end(self) -> str:
        """Text of the token that ends the model's turn.

        It is the first special token that the template writes behind an answer, or else the
        tokenizer's own end of text.
        """
        tokenizer = self.processor.tokenizer
        behind = self._conversation(answer=_ANSWER).rpartition(_ANSWER)[2]
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return next(filter(special.__contains__, tokenizer.tokenize(behind)), tokenizer.eos_token)

    @property
    def lead(self) -> str:
        """Text that the template writes between the prompt and an answer."""
        prompt = self._conversation()
        before = self._conversation(answer=_ANSWER).rpartition(_ANSWER)[0]
        return before.removeprefix(prompt) if before.startswith(prompt) else ""

    def around(self, pictures: int) -> tuple[str, str]:
        """Returns the texts before and after a request with so many pictures."""
        before, _, after = self._conversation(pictures).partition(_REQUEST)
        return before, after

    def with_pictures(self, text: str) -> str:
        """Returns a text in which each `<image>` is what the template writes for a picture."""
        if self.processor.image_token == IMAGE_TOKEN:
            return text
        bare, one = (self.around(pictures)[0] for pictures in (0, 1))
        picture = one.removeprefix(bare) if one.startswith(bare) else self.processor.image_token
        return text.replace(IMAGE_TOKEN, picture.strip())

    def chat(self, messages: Sequence[Mapping[str, str]], answer_follows: bool = True) -> str:
        """Returns a conversation in the words of the template, with a picture for each `<image>`.

        Args:
            messages: Mappings with the keys `role` and `content`.
            answer_follows: Whether the model begins an answer. Otherwise it goes on with the last
                one of `messages`.
        """
        turns = [{"role": each["role"], "content": _parts(each["content"])} for each in messages]
        text: str = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=answer_follows,
            continue_final_message=not answer_follows,
            tokenize=False,
        )
        return text

    def request(self, problem: Mapping[str, Any]) -> str:
        """Returns the text of a question; the name of a picture's token in it is removed."""
        return super().request(problem).replace(self.processor.image_token, "")

    def _conversation(self, pictures: int = 0, answer: str | None = None) -> str:
        """A conversation in the words of the template, which waits for an answer without one."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": _REQUEST}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text: str = self.processor.apply_chat_template(
            turns, add_generation_prompt=answer is None, tokenize=False
        )
        return text


@dataclass
class FamilyModel(LoadedModel):
    """A model of a family with the processor of its checkpoint.

    Attributes:
        prompting: Prompt format in the checkpoint's chat template.
        processor: Processor of transformers, with `tokenizer` and `image_processor`.
        family: Table of the family.
    """

    prompting: ChatPrompting
    processor: Any = None
    family: Family | None = None

    @property
    def image_tokens_vary(self) -> bool:
        """True, because the processor counts the tokens of each picture."""
        return True

    @property
    def image_token(self) -> str:
        """Text that stands for a picture in the prompts of the chat template."""
        return str(self.processor.image_token)

    def token_ids(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> list[list[int]]:
        """Tokenizes texts; a picture takes as many positions as its size asks for.

        Raises:
            ValueError: If a text does not name as many pictures as it comes with.
        """
        return [
            self._encoded(prompt, own)["input_ids"][0].tolist()
            for prompt, own in zip(prompts, images, strict=True)
        ]

    def collate(
        self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[Any]]
    ) -> dict[str, Tensor]:
        """Makes a batch of token ids and pictures.

        Args:
            rows: Token ids of each text, with the positions of its pictures.
            images: Pictures of each text.

        Returns:
            `input_ids` and `attention_mask` [batch, tokens], padded on the left, and what the
            family's processor makes of all pictures, with rows of zeros where their sizes differ.

        Raises:
            UserError: If the model's forward names no argument for a part of the batch. It would
                ignore that part without a word.
        """
        assert self.family is not None
        batch = self._padded(rows)
        if self.family.image_marks is not None:
            marked = batch["input_ids"] == self.model.config.image_token_id
            batch[self.family.image_marks] = marked.long()
        pixels = [self._pixels(own) for own in images if own]
        for key in pixels[0] if pixels else ():
            batch[key] = _joined([each[key] for each in pixels])
        if unknown := batch.keys() - signature(type(self.model).forward).parameters:
            raise UserError(
                f"{type(self.model).__name__} of the installed transformers takes no "
                f"{', '.join(sorted(unknown))}, which its processor gives it. Install the pinned "
                "versions (make install)."
            )
        device, dtype = self.model.device, self.model.dtype
        return {
            key: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in batch.items()
        }

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Returns the positions of a batch, or nothing if the model counts them in its own way."""
        assert self.family is not None
        return {} if self.family.own_positions else super().positions(mask)

    def save_encoding(self, folder: Path) -> None:
        """Writes the processor into the folder of a checkpoint."""
        save_processor(self.processor, folder)

    def _pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """What the processor makes of the pictures of one text."""
        before, after = self.prompting.around(len(images))
        made = self._encoded(before + after, images)
        tokens = made["input_ids"].shape
        return {key: tensor for key, tensor in made.items() if tensor.shape != tokens}

    def _encoded(self, prompt: str, images: Sequence[Any]) -> dict[str, Tensor]:
        """What the processor makes of one text and its pictures."""
        pictures = [to_rgb(picture) for picture in images]
        prompt = self.prompting.with_pictures(prompt)
        if prompt.count(self.processor.image_token) != len(pictures):
            raise ValueError(
                f"a prompt needs exactly one {self.processor.image_token} for each image"
            )
        begun = prompt.startswith(self.tokenizer.bos_token or "\0")
        made = self.processor(
            text=[prompt],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=not begun,  # or else the template has written them
        )
        return dict(made)


def _parts(text: str) -> list[dict[str, str]]:
    """The content of a turn as templates take it, with a picture at each `<image>`."""
    first, *others = text.split(IMAGE_TOKEN)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
    for piece in others:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return parts


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors along their first dimension, the others padded with zeros."""
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(widest, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [part for lack in missing[::-1] for part in (0, lack)]))
    return torch.cat(padded)
