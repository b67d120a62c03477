"""Why a record must not be shown: its layers do not prove its bits, or its numbers are broken.

The proof of bits is the record's `bits.json`: for each quantized layer, the number of distinct
values per scale that entered its product (see `qvlm.quantization.verification`).
"""

import math
from collections.abc import Iterator, Mapping

from qvlm.evaluation.metrics import CLASSES, class_metrics
from qvlm.evaluation.text_metrics import summarize
from qvlm.records.record import Record

_SHARES = ("accuracy", "ci_low", "ci_high", "unparsable")


def fault(record: Record, proven: Mapping[str, str]) -> str | None:
    """Returns why a record must not be shown, or None if it may be shown.

    Args:
        record: Record of any method.
        proven: Name of a record of the same model, by each layer that this record proves.
    """
    reason = _metrics_fault(record)
    weights, activations = record.bit_widths.weights, record.bit_widths.activations
    if reason or weights is None or activations is None:
        return reason
    if not record.layers:
        return "its proof of bits is empty"
    faults = list(_layer_faults(record, weights, activations))
    absent = sorted(proven.keys() - {row["layer"] for row in record.layers})
    faults += [f"{layer}: missing from the proof, which {proven[layer]} has" for layer in absent]
    if not faults:
        return None
    return faults[0] + (f" (and {len(faults) - 1} more)" if faults[1:] else "")


def _layer_faults(record: Record, weights: int, activations: int) -> Iterator[str]:
    """Yields a sentence for each tensor that takes more values than the cell's bits allow."""
    for row in record.layers:
        for part, bits, levels, most in (
            ("weight", row["w_bits"], row["weight_levels"], weights),
            ("input", row["a_bits"], row["input_levels"], activations),
        ):
            if bits > most:
                yield f"{row['layer']}: {bits} bits per {part} value"
            elif levels < 1:
                yield f"{row['layer']}: {part} never seen"
            elif levels > 2**bits:
                yield f"{row['layer']}: {levels} {part} values per scale, {2**bits} allowed"


def _text_fault(record: Record) -> str | None:
    stated, counted = record.metrics["text"], summarize(record.predictions)
    for name in ("perplexity", "kl", "agreement"):
        if (stated.get(name) is None) != (counted[name] is None):
            return f"its {name} does not follow from its documents"
        if counted[name] is not None:
            value = stated[name]["value"]
            if value is None or not math.isclose(value, counted[name]["value"], rel_tol=1e-9):
                return f"its {name} does not follow from its documents"
    return None


def _tasks_fault(record: Record) -> str | None:
    counted = record.predictions.groupby("task")["doc_id"].nunique()
    for task, stated in record.metrics["tasks"].get("n-samples", {}).items():
        if stated["effective"] != counted.get(task):
            return f"its results of {task} do not follow from its samples"
    return None


def _metrics_fault(record: Record) -> str | None:
    if record.kind == "text":
        return _text_fault(record)
    if record.kind == "tasks":
        return _tasks_fault(record)
    for name in CLASSES:
        row = record.metrics.get("classes", {}).get(name)
        if row is None:
            return f"class {name} is missing from its metrics"
        for key in _SHARES if row["n"] else ():
            value = row[key]
            if value is None or not (math.isfinite(value) and 0 <= value <= 100):
                return f"{key} of class {name} is {value}"
    overall = record.metrics["classes"]["Avg"]
    right, n = int(record.predictions["correct"].sum()), len(record.predictions)
    if overall["n"] != n or (n and abs(overall["accuracy"] - 100 * right / n) > 1e-6):
        return f"its metrics do not follow from its predictions ({right} of {n} right)"
    for name, counted in class_metrics(record.predictions).items():
        row = record.metrics["classes"][name]
        off = (abs(row[key] - counted[key]) > 1e-6 for key in _SHARES if counted["n"])
        if row["n"] != counted["n"] or any(off):
            return f"its metrics of class {name} do not follow from its predictions"
    return None
