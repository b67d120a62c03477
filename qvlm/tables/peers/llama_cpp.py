"""llama.cpp through llama-cpp-python: a whole model, in the types Q4_0 and Q8_0.

Its library has no call for a single product, so only the model of a few decoder layers is timed. It
is written as a GGUF file and read like any other, which lets llama.cpp rearrange the weights for
this CPU. A step is one batch, and all rows are outputs: otherwise llama.cpp would compute the last
layer for the last row only.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from qvlm.errors import RunError
from qvlm.tables.peers.base import Loaded, Peer, Step
from qvlm.tables.peers.gguf_file import write_gguf

CONTEXT = 1024  # most rows of a sequence


class LlamaCpp(Peer):
    """llama.cpp with matrices of one type.

    Args:
        kind: Type of the matrices, such as "Q4_0".
        bits: Bits of a weight, its share of a scale left out.
    """

    dtype = torch.float32
    packages: ClassVar = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}

    def __init__(self, kind: str, bits: int) -> None:
        self.name, self.kind, self.bits = f"llama.cpp {kind}", kind, bits

    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        import llama_cpp

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            stored = write_gguf(path, model, layers, self.kind)
            llama = llama_cpp.Llama(
                str(path),
                n_ctx=CONTEXT,
                n_batch=CONTEXT,
                n_ubatch=CONTEXT,
                n_threads=threads,
                n_threads_batch=threads,
                pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE,
                use_mmap=False,  # the file is removed
                verbose=False,
            )
        llama_cpp.llama_set_embeddings(llama.ctx, True)
        return Loaded(stored, model=lambda: _begin(llama, model.config.hidden_size))


def _begin(llama: Any, hidden: int) -> Step:
    """Empties the context of a model, and returns what appends rows to it."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
    length = 0

    def step(x: Tensor) -> Tensor:
        nonlocal length
        rows = len(x)
        batch = llama_cpp.llama_batch_init(rows, hidden, 1)
        batch.n_tokens = rows
        ctypes.memmove(batch.embd, x.contiguous().data_ptr(), x.nbytes)
        for row in range(rows):
            batch.pos[row], batch.n_seq_id[row] = length + row, 1
            batch.seq_id[row][0], batch.logits[row] = 0, 1
        failed = llama_cpp.llama_decode(llama.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RunError(f"llama.cpp did not take a batch of {rows} rows (code {failed}).")
        length += rows
        found = llama_cpp.llama_get_embeddings(llama.ctx)
        return torch.from_numpy(np.ctypeslib.as_array(found, (rows, hidden)).copy())

    return step


Q4_0, Q8_0 = LlamaCpp("Q4_0", 4), LlamaCpp("Q8_0", 8)
