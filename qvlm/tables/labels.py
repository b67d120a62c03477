"""Names of methods as tables print them, and the order of a table's rows."""

from qvlm.bits import BitWidths

FP = "FP"  # full precision, both as bit widths and as a method
BASELINE = "RTN"
LAYERWISE = "Layer-wise"
QVLM = "Q-VLM"
OURS = "RoCo"  # with static scales; its other forms add words to the name
REAL = "smollm2_llava"  # the model whose language model is a real one
# The parts of Q-VLM, each switched on alone (see `qvlm.methods.qvlm`).
CDM = f"{QVLM}, CDM only"
VEO = f"{QVLM}, VEO only"
ERROR_PROXY = f"{CDM}, error proxy"
# The paper's methods in its order, controls first. Other methods follow these, ours last.
PAPER = (FP, BASELINE, "AWQ", "QLoRA", LAYERWISE, QVLM)
_WIDEST = 16  # bits of full precision in the paper, more than any quantized value has


def is_part_of_qvlm(method: str) -> bool:
    """Whether a method is Q-VLM with only some of its parts, which have tables of their own."""
    return method.startswith(f"{QVLM}, ")


def is_ours(method: str) -> bool:
    """Whether a method is this project's own, in one of its forms."""
    return method.split(",")[0] == OURS


def bits_order(bits: BitWidths) -> tuple[int, int]:
    """Sorts bit widths as the paper does: full precision first, then from wide to narrow."""
    return -(bits.weights or _WIDEST), -(bits.activations or _WIDEST)


def method_order(method: str) -> tuple[int, str]:
    """Sorts methods: controls, the paper's methods, any other method, ours."""
    rank = PAPER.index(method) if method in PAPER else len(PAPER) + is_ours(method)
    return rank, method
