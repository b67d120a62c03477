"""What LLaVA-13B in W4A4 should reach with one question at a time, and what it does."""

from collections.abc import Iterator

import pandas as pd

from qvlm.markdown import table
from qvlm.models.architectures import architecture
from qvlm.tables.gpu.forms import ANSWER, BF16, PAPER_SEARCH_HOURS, TEXT, W4A4
from qvlm.tables.gpu.revisions import differences

MODEL = "llava_13b"
IMAGE = 256
PREFILL = f"prefill of {TEXT + IMAGE}"
SEARCH = "all layers, extrapolated, GPU"
DECODING, SPEED, PREFILLING, MEMORY, HOURS = 3.0, 300, 1.5, 3.4, 1


def goals(lines: pd.DataFrame) -> Iterator[str]:
    """Yields the section of goals for the lines of a card, if they hold what goals concern."""
    own = lines[
        (lines["model"] == MODEL)
        & (lines["setting"] == f"{TEXT}+{IMAGE} and {ANSWER}")
        & (lines["batch"] == "1")
        & (lines["section"] == "model")
    ]
    found = {
        (form, measure): float(value)
        for form, measure, value in own[["form", "measure", "value"]].itertuples(index=False)
    }
    rows = []
    for title, measure, goal in (
        ("decoding: times as fast as bf16", "token", DECODING),
        ("prefill: times as fast as bf16", PREFILL, PREFILLING),
        ("weights: times smaller than in bf16", "weights", MEMORY),
    ):
        if (W4A4.name, measure) in found and (BF16, measure) in found:
            ratio = found[BF16, measure] / found[W4A4.name, measure]
            rows.append([title, f"at least {goal}", f"{ratio:.2f}", _reached(ratio >= goal)])
    if (W4A4.name, "decoding") in found:
        speed = found[W4A4.name, "decoding"]
        cells = [f"at least {SPEED}", f"{speed:.0f}", _reached(speed >= SPEED)]
        rows.insert(1, ["decoding: tokens per second", *cells])
    search = lines[(lines["measure"] == SEARCH) & lines["form"].str.startswith("Q-VLM")]
    for hours in search["value"]:
        cells = [f"below {HOURS}", f"{hours}, extrapolated", _reached(float(hours) < HOURS)]
        rows.append(["search: GPU-hours, without VEO", *cells])
    if not rows:
        return
    yield "### Goals"
    yield (
        f"Goals concern LLaVA-13B in {W4A4.name} with one question at a time: {TEXT} tokens of "
        f"text, {IMAGE} of an image, and {ANSWER} of the answer. The paper reports "
        f"{PAPER_SEARCH_HOURS} hours of search for LLaVA-7B, with VEO."
    )
    yield table(["goal", "wanted", "measured", "result"], rows, left=2)
    yield from differences(own[own["form"].isin([BF16, W4A4.name])])
    yield from _bounds(lines, found.get((W4A4.name, "token")))


def _reached(reached: bool) -> str:
    return "met" if reached else "missed"


def _bounds(lines: pd.DataFrame, token: float | None) -> Iterator[str]:
    """Yields what bounds decoding and prefill, if the products of a layer were measured."""
    tile = lines[(lines["section"] == "tile") & lines["setting"].str.startswith("few 4 ")]
    limits = lines[lines["section"] == "limits"]
    layer = dict(zip(tile["measure"], tile["value"], strict=True))
    copied = dict(zip(limits["measure"], limits["value"], strict=True)).get(
        "copy, read and written"
    )
    if token is None or "products of a layer" not in layer or copied is None:
        return
    layers = architecture(MODEL).text_config.num_hidden_layers
    products = layers * float(layer["products of a layer"]) / 1e3
    yield (
        f"A token takes {token:.2f} ms. Of these, {products:.2f} ms are the products of {layers} "
        "layers with the quantization of their inputs. They read weights at "
        f"{layer['weights read']} TB/s, and a copy on this card reaches {copied} TB/s. The "
        "difference, and the other launches of a layer, are what is left to gain. In prefill, the "
        "sum of each chunk of 128 channels leaves the tensor cores to be scaled and added in "
        "float32. A stock product in bf16 or int8 scales once, after all channels. That this "
        "bounds prefill is reasoned, not profiled."
    )
