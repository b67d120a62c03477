"""What a model in full precision makes of texts, kept in a file for all cells that need it.

The float model is gone once it is quantized. What is kept of it are the final states of the scored
tokens and its output head, from which its logits follow exactly. States take a tenth of the memory
that the logits would: 60 MiB for 1,024 answers of a miniature in float64, about 0.5 GiB for 256
answers of a LLaVA-13B.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from qvlm.evaluation import likelihood
from qvlm.models.loaded import LoadedModel
from qvlm.records.files import write_file


@dataclass(frozen=True)
class SavedStates:
    """What a model in full precision makes of passages.

    Attributes:
        states: Last hidden states at the positions of the scored tokens, [scored, width] for each
            passage.
        head: Weight of the output head, [vocabulary, width].
        bias: Bias of the output head, [vocabulary], or None.
        file: File that `keep` writes, or None if it is there or there is to be none.
    """

    states: list[Tensor]
    head: Tensor
    bias: Tensor | None = None
    file: Path | None = field(default=None, compare=False)

    def keep(self) -> None:
        """Writes the file for other cells. A cell that is refused before it does leaves nothing."""
        if self.file is not None and not self.file.is_file():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, lambda path: save_file(_tensors(self), path))

    def logits(self, number: int, like: Tensor, part: slice = slice(None)) -> Tensor:
        """Returns the logits [scored, vocabulary] of some scored tokens of a passage.

        Args:
            number: Number of the passage.
            like: Tensor whose device and type the logits have.
            part: Which of its scored tokens.
        """
        bias = None if self.bias is None else self.bias.to(like)
        return functional.linear(self.states[number][part].to(like), self.head.to(like), bias)


def kept_states(
    loaded: LoadedModel, file: Path | None, compute: Callable[[], list[Tensor]]
) -> SavedStates:
    """Returns the states that a file keeps, or computes them, for `keep` to write.

    Args:
        loaded: Model in full precision. Its weights may change afterwards.
        file: File whose name identifies the model and the passages, or None to keep nothing.
        compute: Function that returns the states of all passages, in their order.
    """
    if file is not None and (saved := read_states(file)) is not None:
        return saved
    head = likelihood.output_head(loaded)
    weight, bias = (_copy(getattr(head, name, None)) for name in ("weight", "bias"))
    assert weight is not None
    return SavedStates(compute(), weight, bias, file)


def read_states(file: Path) -> SavedStates | None:
    """Reads the states that another cell left, or returns None if there are none."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        # Copies lie in memory as computed ones do, on which the last bit of a sum may depend.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    head, bias = tensors.pop("head"), tensors.pop("bias", None)
    states = [tensors[f"states.{number}"] for number in range(len(tensors))]
    return SavedStates(states, head, bias)


def _tensors(saved: SavedStates) -> dict[str, Tensor]:
    tensors = {f"states.{number}": part for number, part in enumerate(saved.states)}
    tensors["head"] = saved.head
    if saved.bias is not None:
        tensors["bias"] = saved.bias
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _copy(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().clone()
