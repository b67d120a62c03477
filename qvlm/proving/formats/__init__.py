"""The formats that are read: a file for each, which says how it stores codes, scales and zeros."""

from qvlm.proving.formats.awq import Awq
from qvlm.proving.formats.base import Format
from qvlm.proving.formats.bitsandbytes import BitsAndBytes
from qvlm.proving.formats.compressed_tensors import CompressedTensors
from qvlm.proving.formats.gguf import Gguf
from qvlm.proving.formats.gptq import Gptq
from qvlm.proving.formats.own import Own
from qvlm.proving.formats.torchao import TorchAo

__all__ = [
    "Awq",
    "BitsAndBytes",
    "CompressedTensors",
    "Format",
    "Gguf",
    "Gptq",
    "Own",
    "TorchAo",
]
