"""qvlm: what 4-bit quantization really does to a vision-language model, measured."""

__version__ = "0.1.0"
