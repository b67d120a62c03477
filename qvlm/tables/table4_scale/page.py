"""The Markdown page of Table 4 at full scale."""

import statistics
from collections.abc import Sequence
from importlib.util import find_spec

from qvlm.data.sizes import PUBLISHED_QUESTIONS
from qvlm.markdown import bullets, table
from qvlm.planning.footprint import ANSWER_TOKENS, SCALE_ANSWER
from qvlm.records.environment import revision_in_words, surroundings
from qvlm.tables.cost import median_and_range
from qvlm.tables.labels import FP
from qvlm.tables.table4_scale.measure import SIDE_BY_SIDE, Measured, Row, Setting
from qvlm.tables.table4_scale.mixture import NOTE, mixture_table
from qvlm.tables.table4_scale.models import CLUSTERS, PEER, WITHOUT_KERNELS
from qvlm.tables.table4_scale.search import SEARCH_TOKENS, SearchEstimate

_NAMES = ("model", "bits", "method")

SEARCH = """\
What a search of ranges would take, estimated: the number of settings times what a simulated layer
took here for {prompt} tokens, scaled to {tokens}. *jointly* is every setting of three linears at a
time, the most that Q-VLM tries. It tries fewer where layers do not depend on each other, and it
does not compute the outputs of linears before the first changed one again. Visual encoder
optimization is not included. {gpu}The products alone are the operations (PFLOP) in float32."""


def page(models: Sequence[Measured], setting: Setting) -> str:
    """Returns the page.

    Args:
        models: What was measured, by model.
        setting: How they were measured.
    """
    rows = [row for model in models for row in model.rows]
    threads = rows[0].columns["threads"]
    gpu = "On a GPU: not measured. " if setting.device == "cpu" else ""
    parts = [
        "# Table 4 at full scale, with random weights",
        _notes(setting, threads),
        _costs(rows),
        _ratios(rows),
        NOTE,
        _mixtures(models),
        SEARCH.format(prompt=setting.prompt, tokens=SEARCH_TOKENS, gpu=gpu),
        _searches({model.model: model.search for model in models}),
    ]
    if reached := targets(rows):
        header = ["times", "activations", "target", "measured", "met"]
        parts += ["Targets, LLaVA-13B:", table(header, reached, 2)]
    return "\n\n".join(parts) + "\n"


def _notes(setting: Setting, threads: int) -> str:
    """Returns the list of how the page was made and of what its columns mean."""
    about = surroundings()
    hardware = about["hardware"]
    gpu = "; on a GPU: not measured" if setting.device == "cpu" else f"; {hardware['gpu']}"
    notes = [
        f"Command: `{setting.command}`",
        f"Revision: {revision_in_words(about['git'])}",
        f"Device: {setting.device}; {hardware['cpu']}, {threads} threads, "
        f"{hardware['memory_gib']} GiB{gpu}.",
        f"A question has {setting.prompt} tokens of image and text. Its answer has {ANSWER_TOKENS} "
        f"tokens, of which at most {SIDE_BY_SIDE} were timed for ratios and {SCALE_ANSWER} in "
        "whole models. Weights are random, so there is no accuracy.",
        "FP is bf16. *uniform* is the form of every method but QLoRA, which has NormalFloat. The "
        "paper's row beside it is that of Q-VLM. Its activations are the default's: each channel "
        "has a static scale of its own, folded into the weights. In *clusters*, 128 sorted "
        "channels share a scale, and weights are grouped cluster by cluster "
        "(`quantizer=clusters`).",
        f"*paper* columns are what the paper prints, hours for {PUBLISHED_QUESTIONS:,} questions "
        "on its own hardware.",
        "Peak is the resident set of a fresh process while it answers, including Python and its "
        "libraries. *predicted* is the sum of `make fit` and what such a process takes without a "
        "model.",
        "*extrapolated* time is what ran plus, for each layer that did not run, what a layer of "
        "its shape took. Extrapolated memory is the prediction.",
        f"Ratios to bf16 come from {setting.repeats} repeats side by side on a layer of each "
        "shape, extrapolated to all layers: median (lowest to highest). Above 1 is faster than "
        "bf16.",
    ]
    if not find_spec("bitsandbytes"):
        notes.append("bitsandbytes is not installed: its NF4 was not measured.")
    elif setting.device == "cpu" and not find_spec("kernels"):
        notes.append(WITHOUT_KERNELS)
    return bullets(notes)


def _costs(rows: Sequence[Row]) -> str:
    """Returns the table of memory and time."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = []
    for row in rows:
        columns = row.columns
        memory = (columns.get("weight_gib"), columns.get("peak_memory_gib"), row.predicted_gib)
        times = ("vision_s", "prefill_s", "tokens_per_s", "seconds_per_question")
        lines.append(
            [
                *(columns[name] for name in _NAMES),
                *map(number, (*memory, columns.get("memory_ratio"))),
                *(number(columns[name]) for name in times),
                columns["extrapolated"],
                *(number(columns.get(name)) for name in ("paper_memory_gib", "paper_hours")),
            ]
        )
    header = [*_NAMES, "weights GiB", "peak GiB", "predicted", "ratio", "vision s", "prefill s"]
    header += ["tokens/s", "s/question", "extrapolated", "paper GiB", "paper h"]
    return table(header, lines, left=3)


def _ratios(rows: Sequence[Row]) -> str:
    """Returns the table of speed-ups over bf16."""
    lines = []
    for row in rows:
        median, low, high = (row.columns[f"speed_ratio{end}"] for end in ("", "_low", "_high"))
        lines.append(
            [
                *(row.columns[name] for name in _NAMES),
                median_and_range(row.prefill_ratios),
                median_and_range(row.decoding_ratios),
                f"{median:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    return table([*_NAMES, "prefill", "decoding", "question"], lines, left=3)


def _mixtures(models: Sequence[Measured]) -> str:
    """Returns the table of ScienceQA's questions."""
    rows = [(model.rows[0].mixtures, row) for model in models for row in model.rows]
    return mixture_table(
        _NAMES,
        [full for full, _ in rows],
        [row.mixtures for _, row in rows],
        [[row.columns[name] for name in _NAMES] for _, row in rows],
        [row.columns.get("paper_hours") for _, row in rows],
    )


def _searches(estimates: dict[str, SearchEstimate]) -> str:
    """Returns the table of estimated searches."""
    lines = [
        [
            model,
            *(f"{seconds / 3600:.1f}" for seconds in (cost.alone, cost.jointly)),
            *(f"{flops / 1e15:.1f}" for flops in (cost.alone_flops, cost.jointly_flops)),
        ]
        for model, cost in estimates.items()
    ]
    return table(["model", "alone, h", "jointly, h", "alone, PFLOP", "jointly, PFLOP"], lines)


def targets(rows: Sequence[Row]) -> list[list[str]]:
    """Compares LLaVA-13B at W4A4 and W8A8 with what it should reach against bf16.

    Returns:
        Cells of a table: what is compared, form of the activations, target, measured ratio, and
        whether the median reaches the target. Empty without rows of LLaVA-13B.
    """
    own = {
        (row.columns["bits"], row.columns["method"]): row
        for row in rows
        if row.columns["model"] == "llava_13b"
    }
    if not own:
        return []
    full, peer = own[FP, FP], own.get((PEER.label, PEER.method))
    found: list[list[str]] = []
    for method in ("uniform", CLUSTERS[0].method):
        four, eight = own["W4A4", method], own["W8A8", method]
        weights = full.columns["weight_gib"] / four.columns["weight_gib"]
        aims = [
            ("weights smaller, W4A4", 3.4, [weights]),
            ("peak memory smaller, W4A4", 3.0, [four.columns["memory_ratio"]]),
            ("decoding faster, W4A4", 3.5, four.decoding_ratios),
            ("prefill faster, W4A4", 1.3, four.prefill_ratios),
            ("decoding faster, W8A8", 1.7, eight.decoding_ratios),
        ]
        if peer:
            both = zip(four.decoding_ratios, peer.decoding_ratios, strict=True)
            aims.append(("decoding against bitsandbytes NF4, W4A4", 1.0, [a / b for a, b in both]))
        for name, target, ratios in aims:
            met = "yes" if statistics.median(ratios) >= target else "no"
            found.append([name, method, f"{target:g}", median_and_range(ratios), met])
    return found
