"""What was found in a checkpoint, for people and for programs."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from qvlm.markdown import bullets, table
from qvlm.proving.proof import Proof

_WHY = {
    "said": "left out, as it says",
    "outside": "nothing beside it is quantized",
    "skipped": "should be quantized",
}


def page(proof: Proof) -> str:
    """Returns the page of a proof in Markdown, without its verdict."""
    parts = [
        f"# {proof.path}\n\n{proof.format}: {proof.claim}",
        _layers(proof),
        _floats(proof),
        _inputs(proof),
        _notes(proof),
    ]
    if proof.found:
        sentences = [f"{part}: {fault}" for part, fault in proof.found]
        parts.append(f"## What is wrong\n\n{bullets(sentences)}")
    return "\n\n".join(part for part in parts if part)


def verdict(proof: Proof) -> str:
    """Returns whether the checkpoint is what it says, in one line."""
    share = f"{100 * proof.float_share:.1f} % of the parameters are in floating point"
    if not proof.holds:
        part, fault = proof.found[0]
        faults = "1 fault" if len(proof.found) == 1 else f"{len(proof.found)} faults"
        return f"not proven ({faults}): {part}: {fault}; {share}"
    bits = Counter(layer.bits for layer in proof.layers)
    said = ", ".join(f"{count} layers of {width} bits" for width, count in sorted(bits.items()))
    proven = "weights and inputs" if proof.inputs else "weights"
    return f"proven in its {proven}: {said}; {share}"


def content(proof: Proof) -> dict[str, Any]:
    """Returns everything that was found as plain values, for `--json`."""
    return {
        "holds": proof.holds,
        "verdict": verdict(proof),
        "float_share": proof.float_share,
        **asdict(proof),
    }


def _layers(proof: Proof) -> str:
    rows = [
        [
            layer.layer,
            " x ".join(map(str, layer.shape)),
            str(layer.bits),
            str(layer.values),
            str(layer.per_scale),
            str(layer.sharing),
            "yes" if not layer.faults else "no",
        ]
        for layer in proof.layers
    ]
    header = ["layer", "shape", "bits", "codes taken", "at a scale", "weights a scale", "sound"]
    return f"## Quantized layers\n\n{table(header, rows, left=2)}" if rows else ""


def _floats(proof: Proof) -> str:
    total = sum(part.count for part in proof.floats)
    if not total:
        return ""
    kinds: Counter[str] = Counter()
    for part in proof.floats:
        kinds[part.kind] += part.count
    shares = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
    said = f"{total} parameters, {100 * proof.float_share:.1f} % of all: {shares}."
    rows = [[part.name, str(part.count), _WHY[part.why]] for part in proof.floats if part.why]
    listed = table(["linear in floating point", "parameters", "why"], rows) if rows else ""
    return f"## In floating point\n\n{said}" + (f"\n\n{listed}" if listed else "")


def _inputs(proof: Proof) -> str:
    if not proof.inputs:
        return "What enters the products is not in a file of weights, and was not measured."
    rows = [
        [
            row.layer,
            str(row.a_bits),
            str(row.input_levels),
            "random numbers" if row.probed else "problems",
        ]
        for row in proof.inputs
    ]
    header = ["layer", "bits of its input", "codes that entered", "from"]
    return f"## What enters the products\n\n{table(header, rows)}"


def _notes(proof: Proof) -> str:
    said = [
        f"{layer.layer}: {layer.empty} scales are zero above weights that are zero."
        for layer in proof.layers
        if layer.empty
    ]
    said += [f"{name}: no calibration token reached it." for name in proof.uncalibrated]
    return f"## Notes\n\n{bullets(said)}" if said else ""
