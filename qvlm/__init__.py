"""qvlm: what 4-bit quantization really does to a vision-language model, measured.

`load`, `quantize`, `prove`, `evaluate` and `save` are the Python API; `qvlm.api` documents them.
They are imported when they are first used, because they import PyTorch.

`import qvlm` is also enough for transformers' `AutoModelForImageTextToText` and `AutoProcessor` to
open packed checkpoints (`qvlm.registration`).

Importing it sets the environment variable THP_MEM_ALLOC_ENABLE, an option of PyTorch on Linux,
unless it is set.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qvlm.registration import register_lazily

if TYPE_CHECKING:
    from qvlm.api import Model, Proof, evaluate, load, prove, quantize, save

__version__ = "0.2.0"
__all__ = ["Model", "Proof", "evaluate", "load", "prove", "quantize", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qvlm.api"), name)


# With this, PyTorch asks for huge pages of memory from its first tensor on. A token of an answer
# reads all weights, and reads them faster from few pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

register_lazily()
