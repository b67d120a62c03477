"""The time of one question to a model, extrapolated to the layers that the model does not have."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qvlm.models.cache import CACHE, growing_cache
from qvlm.models.llava import Llava
from qvlm.planning.footprint import ANSWER_TOKENS
from qvlm.quantization.hooks import hooked

PACE = 5.0  # seconds of decoding after which no further token is timed


@dataclass(frozen=True)
class QuestionTimes:
    """Seconds that one question takes.

    Attributes:
        vision: Seconds of the vision tower and the projector.
        prefill: Seconds of the language model on the prompt.
        token: Seconds of each token of the answer.
    """

    vision: float
    prefill: float
    token: float

    @property
    def question(self) -> float:
        """Seconds of the whole question, with an answer of 64 tokens."""
        return self.vision + self.prefill + ANSWER_TOKENS * self.token

    def over(self, other: "QuestionTimes") -> "QuestionTimes":
        """Returns how many times faster the other is, part by part."""
        return QuestionTimes(*(a / b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Clock:
    """Times calls of a model that may have only some layers of the full model.

    Attributes:
        model: Model that is timed.
        shapes: Description of each block of the full model, by name (see `shapes_of`).
        whole: Whether the model has all blocks. Then none of them is timed separately.
        timer: Function that returns the time in seconds.
    """

    model: Llava
    shapes: Mapping[str, str]
    whole: bool
    timer: Callable[[], float] = time.perf_counter

    def __call__(self, part: str, call: Callable[[], Any]) -> tuple[Any, float]:
        """Makes a call.

        Args:
            part: Part of the model whose blocks the call runs; their names contain it.
            call: Function to call.

        Returns:
            What the call returns, and the seconds that it takes in the full model.
        """
        spent: dict[str, float] = {}
        with self._timed(spent):
            started = self._now()
            result = call()
            seconds = self._now() - started
        for name, shape in self.shapes.items():
            if spent and name not in spent and part in name:
                alike = [spent[other] for other in spent if self.shapes[other] == shape]
                seconds += statistics.mean(alike)
        return result, seconds

    @contextmanager
    def _timed(self, spent: dict[str, float]) -> Iterator[None]:
        """Adds the seconds of each block that runs to `spent`, unless the model is whole."""

        def enter(name: str, *_: object) -> None:
            spent[name] = -self._now()

        def leave(name: str, *_: object) -> None:
            spent[name] += self._now()

        present = {} if self.whole else dict(self.model.named_modules())
        blocks = {present[name]: name for name in self.shapes if name in present}
        with hooked(
            before={block: partial(enter, name) for block, name in blocks.items()},
            after={block: partial(leave, name) for block, name in blocks.items()},
        ):
            yield

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return self.timer()


@torch.no_grad()
def ask(clock: Clock, prompt: int, tokens: int, image: bool = True) -> QuestionTimes:
    """Times one question.

    Args:
        clock: Clock of the model.
        prompt: Number of tokens of image and text together.
        tokens: Number of tokens of the answer that are timed; fewer where they are slow.
        image: Whether the question has an image. Without one, its vision takes no time.
    """
    model = clock.model
    text, side = model.config.text_config, model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side).to(model.device, torch.bfloat16)
    ids = torch.randint(text.vocab_size, (1, prompt), device=model.device)

    def features() -> Tensor:
        return torch.cat(tuple(model.model.get_image_features(pixels).pooler_output))

    embedded, vision = model.get_input_embeddings()(ids), 0.0
    if image:
        seen, vision = clock("vision_tower", features)
        embedded[0, : len(seen)] = seen
    cached: dict[str, Any] = {CACHE: growing_cache(model)}
    read = partial(model.__call__, inputs_embeds=embedded, logits_to_keep=1, **cached)
    _, prefill = clock("language_model", read)

    def answer(token: Tensor) -> Tensor:
        return model(input_ids=token, **cached).logits.argmax(2)

    each: list[float] = []
    started, token = time.perf_counter(), ids[:, -1:]
    while len(each) < 2 or (len(each) <= tokens and time.perf_counter() - started < PACE):
        token, seconds = clock("language_model", partial(answer, token))
        each.append(seconds)
    # The first token is left out, because it may bring weights into another layout.
    return QuestionTimes(vision, prefill, statistics.median(each[1:]))
