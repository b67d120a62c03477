"""What lm-eval's requests hold, read in one place: context, images, settings of generation, name.

lm-eval marks the place of an image by `<image>`, as our prompts do. A context that names fewer
images than it has gets the missing places at its beginning, and a literal `<image>` in a text
without images is removed, as it is in a continuation.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from PIL import Image

from qvlm.data.images import to_rgb
from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError
from qvlm.validation import number, refused, whole_number

MAX_NEW_TOKENS = 256  # of an answer, where a task sets no limit; as lm-eval's own models have it

# Settings of generation that a task may give, and others with the value that changes nothing.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", *_LIMITS)
_NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
}

_IMAGE = datasets.Image()


@dataclass(frozen=True)
class Generation:
    """How the answer to a request is generated.

    Attributes:
        max_new_tokens: Largest number of new tokens.
        until: Texts that end an answer and are no part of it.
        sampling: Arguments of `generate` that say how tokens are chosen.
    """

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: dict[str, Any]

    @classmethod
    def of(cls, request: Instance) -> "Generation":
        """Reads the settings of a request. Settings that are None are as if they were not given.

        Sampling has temperature 1 and the whole distribution, unless the request limits it.

        Raises:
            UserError: If a setting is not supported or has a value of a wrong kind, or tokens are
                sampled at temperature 0.
        """
        settings = {key: value for key, value in request.args[1].items() if value is not None}
        for key, value in settings.items():
            if key not in _SETTINGS and (key not in _NEUTRAL or value != _NEUTRAL[key]):
                raise UserError(_unsupported(key, value))
        _require_kinds(settings)
        given = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        sampling: dict[str, Any] = {"do_sample": given["do_sample"]}
        if given["do_sample"]:
            sampling["temperature"] = given.get("temperature", 1.0)
            sampling |= {"top_k": given.get("top_k", 0), "top_p": given.get("top_p", 1.0)}
            if not sampling["temperature"] > 0:
                raise UserError(
                    f"generation_kwargs: temperature={sampling['temperature']} with do_sample=True "
                    "is not accepted. Give a temperature above 0, or do_sample=False."
                )
        until = tuple(text for text in given["until"] if text)
        return cls(given["max_gen_toks"], until, sampling)

    def ended(self, text: str) -> bool:
        """Whether a text holds one of those that end an answer."""
        return any(end in text for end in self.until)

    def cut(self, text: str) -> str:
        """Returns a text up to the first of those that end an answer."""
        return text[: min((text.find(end) for end in self.until if end in text), default=None)]


def alike(requests: Sequence[Instance], batch_size: int) -> dict[int, list[int]]:
    """Divides requests for generation into batches of equal settings, from long to short.

    Requests with images come first among those of equal settings. This keeps padding small, skips
    the vision tower for batches without images, and makes a batch that does not fit in memory fail
    at the beginning.

    Returns:
        Rows of the requests of each batch, by the number of requests in the batches before it.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(requests)), key=lambda row: _size(requests[row]))[::-1]:
        groups[json.dumps(requests[row].args[1], sort_keys=True)].append(row)
    batches: dict[int, list[int]] = {}
    begin = 0
    for rows in groups.values():
        for start in range(0, len(rows), batch_size):
            batches[begin + start] = rows[start : start + batch_size]
        begin += len(rows)
    return batches


def name(request: Instance) -> str:
    """The id of a request's question, or its task and number where a task has no ids."""
    if "question_id" in request.doc:
        return str(request.doc["question_id"])
    return f"{request.doc_id} of {request.task_name}"


def context(request: Instance, image_token: str = IMAGE_TOKEN) -> str:
    """The text before the answer, with one `<image>` or token of the model for each image.

    Args:
        request: Request of any type.
        image_token: Text that stands for an image in the prompts of the model's own template.

    Raises:
        UserError: If the text names more images than there are.
    """
    text, count = str(request.args[0]), len(encoded_images(request))
    if count == 0:
        return _without_images(text, image_token)
    missing = count - sum(map(text.count, {IMAGE_TOKEN, image_token}))
    if missing < 0:
        raise UserError(
            f"task: question {name(request)} names {count - missing} images and has {count}. Give "
            "each <image> of the prompt an image in doc_to_image."
        )
    return f"{IMAGE_TOKEN}\n" * missing + text


def continuation(request: Instance, image_token: str = IMAGE_TOKEN) -> str:
    """The text whose likelihood is asked. It shows no image; see `context`."""
    return _without_images(str(request.args[1]), image_token)


def encoded_images(request: Instance) -> list[Any]:
    """The images of a request as lm-eval passes them."""
    further = request.args[-1] if len(request.args) > 1 else None
    visual = further.get("visual") if isinstance(further, dict) else None
    if visual is None:
        return []
    return list(visual) if isinstance(visual, list | tuple) else [visual]


def images(request: Instance) -> list[Image.Image]:
    """Decodes the images of a request to RGB. One that is decoded already is only converted.

    Raises:
        UserError: If an image does not decode.
    """
    try:
        return [
            to_rgb(each if isinstance(each, Image.Image) else _IMAGE.decode_example(each))
            for each in encoded_images(request)
        ]
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        raise UserError(
            f"data: the image of question {name(request)} does not decode. Give a "
            "complete file in a format that Pillow reads, such as PNG or JPEG"
        ) from error


def _require_kinds(settings: Mapping[str, Any]) -> None:
    """Refuses values that would be taken for others, such as the text "false" for true."""
    sampled = settings.get("do_sample", False)
    if not isinstance(sampled, bool):
        raise refused("generation_kwargs.do_sample", sampled, "true or false")
    ends = settings.get("until", [])
    for end in ends if isinstance(ends, list) else [ends]:
        if not isinstance(end, str):
            raise refused("generation_kwargs.until", end, "texts")
    for key in _LIMITS:
        if key in settings:
            whole_number(f"generation_kwargs.{key}", settings[key])
    if "top_k" in settings:
        whole_number("generation_kwargs.top_k", settings["top_k"], 0)  # 0 keeps all tokens
    for key, most in (("temperature", None), ("top_p", 1)):
        if key in settings:
            number(f"generation_kwargs.{key}", settings[key], 0, most)


def _without_images(text: str, image_token: str) -> str:
    """Returns a text without the words that stand for images."""
    return text.replace(IMAGE_TOKEN, "").replace(image_token, "")


def _unsupported(key: str, value: Any) -> str:
    if key in _NEUTRAL:
        accepted = f"Leave it out or give {_NEUTRAL[key]}"
    else:
        accepted = f"Choose from: {', '.join(_SETTINGS)}"
    return f"generation_kwargs: {key}={value!r} is not supported. {accepted}."


def _size(request: Instance) -> tuple[bool, int]:
    return bool(encoded_images(request)), len(request.args[0])
