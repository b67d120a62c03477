"""A decoder for GPUs: greedy decoding of a LLaMA with few launches, which CUDA graphs replay.

Decoding a token takes a few hundred short launches, and the gaps between them cost as much as the
products of a packed model. `Decoder` therefore runs the decoder layers of transformers'
`LlamaModel` with

- a cache that is allocated in advance and written in place. Its position lies on the device, so one
  graph serves every token;
- queries, keys and values in one product, and gate and up in one, if their inputs are quantized
  alike (`joined.py`);
- one kernel each for the residual and the norm, for rotary embedding and cache, for attention of a
  token to the cache (split among programs, then combined), and for the gated activation
  (`launches.py`). Norm and gate quantize what they compute if the next layer is packed.

A model in floating point runs the same way with cuBLAS' products, so a comparison of both compares
their products. Values are rounded where transformers rounds them.

Left out: models other than LLaMA, sampling, sequences of different lengths, and prompts after the
first. The code needs Triton, so nothing else of qvlm imports this package.
"""

from qvlm.packing.decoder.llama import Decoder

__all__ = ["Decoder"]
