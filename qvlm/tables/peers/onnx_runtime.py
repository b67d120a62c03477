"""ONNX Runtime's MatMulNBits: weights of 4 bits and sums of integers (`accuracy_level=4`).

The seven products of a decoder layer are one ONNX model. Inputs are float32, the type of which this
operator quantizes rows by itself. It has no whole model here, because that would need an export.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from qvlm.quantization.targets import quantizable
from qvlm.tables.peers.base import Loaded, Peer, rounded

GROUP_SIZE = 128


class _MatMulNBits(Peer):
    name = "ONNX Runtime MatMulNBits"
    bits = 4
    dtype = torch.float32
    packages: ClassVar = {"onnx": "onnx", "onnxruntime": "onnxruntime"}

    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        (layer,) = model.model.layers
        weights = {name: linear.weight for name, linear in quantizable(layer).items()}
        graph = layer_graph(weights)
        session = _session(graph)

        def multiply(inputs: Mapping[int, Tensor]) -> list[Tensor]:
            arrays = {str(width): x.numpy() for width, x in inputs.items()}
            return [torch.from_numpy(y) for y in session.run(None, arrays)]

        stored = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
        return Loaded(stored, lambda: multiply)


MATMUL_NBITS = _MatMulNBits()


def layer_graph(weights: Mapping[str, Tensor]) -> Any:
    """Returns an ONNX model of products, whose inputs are named by their widths.

    Args:
        weights: Weights [out, in] by name. `GROUP_SIZE` divides `in`.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, initializers = [], []
    for name, weight in weights.items():
        codes, scale = rounded(weight, GROUP_SIZE)
        halves = codes.view(len(codes), -1, GROUP_SIZE // 2, 2)
        bytes_ = (halves[..., 0] | halves[..., 1] << 4).numpy()
        parts = {f"{name}.codes": bytes_, f"{name}.scale": scale.numpy()}
        initializers += [numpy_helper.from_array(part, key) for key, part in parts.items()]
        sizes = {"N": weight.shape[0], "K": weight.shape[1], "block_size": GROUP_SIZE, "bits": 4}
        nodes.append(
            helper.make_node(
                *("MatMulNBits", [str(weight.shape[1]), *parts], [name]),
                domain="com.microsoft",
                accuracy_level=4,
                **sizes,
            )
        )

    def value(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])

    graph = helper.make_graph(
        nodes,
        "layer",
        [value(str(width), width) for width in dict.fromkeys(w.shape[1] for w in weights.values())],
        [value(name, weight.shape[0]) for name, weight in weights.items()],
        initializers,
    )
    operators = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=operators, ir_version=8)


def _session(graph: Any) -> Any:
    """Returns an inference session with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
