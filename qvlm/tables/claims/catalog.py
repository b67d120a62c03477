"""Claims that a miniature can test, the paper's and ours: one method beats another."""

from dataclasses import dataclass

from qvlm.tables.labels import BASELINE, CDM, ERROR_PROXY, LAYERWISE, OURS, QVLM, VEO
from qvlm.tables.published import published

TOKEN = "ZeroQuant-V2, per token"


@dataclass(frozen=True)
class Claim:
    """The claim that one method is more accurate than another.

    Attributes:
        text: The claim in words.
        bits: Label of the bit widths, such as "W4A4".
        first: Our name of the method that should be ahead.
        second: Our name of the method that should be behind.
        printed: Where the paper claims it: table, model, and its names of the two methods. None
            for a control of ours.
    """

    text: str
    bits: str
    first: str
    second: str
    printed: tuple[str, str, str, str] | None = None

    @property
    def points(self) -> float | None:
        """Difference in points that the paper prints, or None for a control of ours."""
        if self.printed is None:
            return None
        name, model, *methods = self.printed
        whole = published(name)
        own = whole[whole["model"] == model]
        if "bits" in whole:
            own, column = own[own["bits"] == self.bits], "Avg" if "Avg" in whole else "accuracy"
        else:
            column = f"{self.bits}_accuracy"
        values = own.set_index("proxy" if "proxy" in whole else "method")[column]
        return float(values[methods[0]] - values[methods[1]])


_13B, _7B = "LLaVA-13B, Table", "LLaVA-7B, Table"
_QLORA, _AWQ = (("table2", "llava_13b", QVLM, other) for other in ("QLoRA", "AWQ"))
_OTHERS = ("table2", "llava_13b", "QLoRA", "AWQ")
_PARTS = {part: ("table1", "llava_7b", f"QLoRA+{part}", "QLoRA") for part in ("CDM", "VEO")}
_PROXIES = ("table5", "llava_7b", "entropy", "quantization error")
_PER_TOKEN = ("table6", "llava_7b", QVLM, "ZeroQuant-V2")
CLAIMS = (
    Claim(f"Q-VLM beats QLoRA ({_13B} 2)", "W6A6", QVLM, "QLoRA", _QLORA),
    Claim(f"Q-VLM beats QLoRA ({_13B} 2)", "W4A4", QVLM, "QLoRA", _QLORA),
    Claim(f"Q-VLM beats AWQ ({_13B} 2)", "W6A6", QVLM, "AWQ", _AWQ),
    Claim(f"Q-VLM beats AWQ ({_13B} 2)", "W4A4", QVLM, "AWQ", _AWQ),
    Claim(f"QLoRA beats AWQ ({_13B} 2)", "W4A4", "QLoRA", "AWQ", _OTHERS),
    Claim(f"CDM helps ({_7B} 1)", "W4A4", CDM, LAYERWISE, _PARTS["CDM"]),
    Claim(f"VEO helps ({_7B} 1)", "W4A4", VEO, LAYERWISE, _PARTS["VEO"]),
    Claim(f"Entropy beats the error as proxy ({_7B} 5)", "W4A4", CDM, ERROR_PROXY, _PROXIES),
    Claim(f"Q-VLM beats per-token ranges ({_7B} 6)", "W4A4", QVLM, TOKEN, _PER_TOKEN),
    Claim("Layer-wise search helps (the control)", "W4A4", LAYERWISE, BASELINE),
    Claim("Q-VLM helps at all (the control)", "W4A4", QVLM, BASELINE),
)
_OURS_TOKEN = f"{OURS}, per token"
# RoCo's: ahead of the paper's methods with the same ranges, and what a range per token adds.
OWN = (
    *(Claim(f"{OURS} beats {other}", "W4A4", OURS, other) for other in ("AWQ", "QLoRA")),
    *(Claim(f"{OURS} beats {other}", "W4A4", OURS, other) for other in (LAYERWISE, QVLM)),
    Claim(f"{_OURS_TOKEN}, beats ZeroQuant-V2", "W4A4", _OURS_TOKEN, TOKEN),
    Claim(f"{_OURS_TOKEN}, beats static {OURS}", "W4A4", _OURS_TOKEN, OURS),
)
