"""Packed layers of ours beside those of other libraries, timed in one run: `make peers`.

`python -m qvlm.tables.peers` draws random weights in the shapes of LLaVA-13B and gives the same to
every peer, which quantizes them in its own way. Two things are measured, each with many rows
(prefill) and with one (decoding): the products of one decoder layer, and a model of a few decoder
layers, attention and norms included. The peers take turns in every repeat.

A peer is a file with a subclass of `Peer` in `base.py`, and an entry in `PEERS` here. Peers that
are PyTorch modules derive from `ModulePeer` in `modules.py`, which needs one method. `measure`
times them, `ranking` says who is first, `page` writes the Markdown. Start with `__main__`.
"""

from qvlm.tables.peers.base import Peer
from qvlm.tables.peers.bf16 import BF16
from qvlm.tables.peers.llama_cpp import Q4_0, Q8_0
from qvlm.tables.peers.nf4 import NF4
from qvlm.tables.peers.onnx_runtime import MATMUL_NBITS
from qvlm.tables.peers.packed import W4A4, W8A8
from qvlm.tables.peers.torch_int4 import TORCH_INT4

# The order of the rows. Ratios are to `BF16` and to `W4A4`.
PEERS: tuple[Peer, ...] = (BF16, W4A4, W8A8, Q4_0, Q8_0, MATMUL_NBITS, NF4, TORCH_INT4)

__all__ = ["BF16", "PEERS", "W4A4", "Peer"]
