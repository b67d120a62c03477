"""Table 4 at full scale, in toy size: what is placed, how it is timed, what is written."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

from qvlm.models.architectures import architecture
from qvlm.packing import packed_layers, weight_bytes
from qvlm.planning import footprint
from qvlm.planning.footprint import FULL, VARIANTS, Variant
from qvlm.tables.cost import COLUMNS
from qvlm.tables.table4_scale import measure
from qvlm.tables.table4_scale.__main__ import main
from qvlm.tables.table4_scale.clock import Clock, QuestionTimes, ask
from qvlm.tables.table4_scale.measure import Row
from qvlm.tables.table4_scale.mixture import Mixture, ask_both
from qvlm.tables.table4_scale.models import OURS, PEER, changer, place, shapes_of, shortened
from qvlm.tables.table4_scale.page import targets
from qvlm.tables.table4_scale.search import estimate_search

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model", ["mini_llava", "mini_moe_llava"])
def test_a_placed_model_weighs_what_is_predicted(model: str, variant: Variant) -> None:
    built = architecture(model)
    placed = place(built, changer(model, variant), "cpu")
    config = footprint.configuration(model, variant.bits)
    config.model.dtype = "bfloat16"
    assert weight_bytes(placed) == pytest.approx(
        footprint.predict(built, config, variant, 8).weights, rel=0.05
    )
    assert bool(packed_layers(placed)) == (variant != FULL)
    times = ask(Clock(placed, shapes_of(built), whole=True), 44, 2)
    assert times.question > times.prefill > 0


def test_an_average_question_weighs_both_kinds() -> None:
    with_image = QuestionTimes(vision=1.0, prefill=10.0, token=0.1)
    mixed = Mixture(with_image, QuestionTimes(vision=0.0, prefill=2.0, token=0.05))
    assert mixed.question == pytest.approx(0.48 * (11 + 20.5) + 0.52 * (2 + 10.25))


def test_a_question_without_an_image_does_not_look() -> None:
    built = architecture("mini_llava")
    placed = place(built, changer("mini_llava", FULL), "cpu")
    clock = Clock(placed, shapes_of(built), whole=True)
    assert ask(clock, 20, 2, image=False).vision == 0
    both = ask_both(clock, 36, 2)
    assert both.with_image.vision > 0 == both.without_image.vision


def test_layers_that_did_not_run_count() -> None:
    built = architecture("mini_moe_llava")
    shapes = shapes_of(built)
    small = shortened(built, 2, 2)
    placed = place(small, changer("mini_moe_llava", FULL), "cpu")
    now = [0.0]
    clock = Clock(placed, shapes, whole=False, timer=lambda: now[0])
    present = dict(placed.named_modules())
    names = [name for name in shapes if name in present and "language_model" in name]
    assert len(names) == 2
    assert len({shapes[name] for name in names}) == 2  # one with experts and one without

    def call() -> None:
        for name in names:
            part: nn.Module = present[name]
            for hook in part._forward_pre_hooks.values():
                hook(part, ())
            now[0] += 3 if "experts" in shapes[name] else 1
            for hook in part._forward_hooks.values():
                hook(part, (), None)

    layers = [shape for name, shape in shapes.items() if "language_model" in name]
    seconds = clock("language_model", call)[1]
    assert seconds == sum(3 if "experts" in shape else 1 for shape in layers)
    assert not any(present[name]._forward_hooks for name in names)


def test_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--models", "mini_llava", "--repeats", "1", "--layers", "2", "--prompt", "50"]
    monkeypatch.setattr(measure, "in_fresh_process", lambda function, *given: function(*given))
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "table4_scale.csv")
    assert tuple(frame.columns) == COLUMNS
    assert frame["accuracy"].isna().all()
    assert (frame["extrapolated"] == "time").all()  # two layers of six
    assert (frame["speed_ratio"].iloc[0], frame["memory_ratio"].iloc[0]) == (1, 1)
    own = frame[frame["method"] != PEER.method]
    assert len(own) == len(OURS)
    assert (own["peak_memory_gib"] > own["weight_gib"]).all()
    page = capsys.readouterr().out
    assert page == (tmp_path / "table4_scale.md").read_text()
    assert "on a GPU: not measured" in page
    assert "48 % with an\nimage, and answers of 205 tokens" in page
    table = page[page.index("faster than bf16 | paper h") :]
    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    *_, seconds, hours, ratio, _, _ = next(
        line for line in lines if line[1:3] == ["mini_llava", "FP"]
    )
    assert float(seconds) > 0 and ratio == "1.00 (1.00 to 1.00)"
    assert float(hours) == pytest.approx(float(seconds) * 4241 / 3600, abs=0.02)
    assert "qvlm.tables.table4_scale --models mini_llava --repeats 1 --layers 2" in page


def test_bad_options_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats", "0"]) == 2
    assert main(["--memory", "0"]) == 2
    assert main(["--device", "cuda:9"]) == 2
    assert main(["--models", "mini_llava", "--prompt", "36"]) == 2
    assert "36 image tokens" in capsys.readouterr().err


def row(bits: str, method: str, **columns: Any) -> Row:
    own = {"model": "llava_13b", "bits": bits, "method": method}
    own |= {"weight_gib": 1.0, "memory_ratio": 4.0, **columns}
    return Row(own, 1.0, prefill_ratios=[1.0, 1.1], decoding_ratios=[4.0, 5.0])


def test_targets_need_llava_13b() -> None:
    assert targets([row("W4A4", "uniform", model="mini_llava")]) == []
    rows = [
        row(bits, method)
        for bits in ("W8A8", "W4A4")
        for method in ("uniform", "uniform, clusters")
    ]
    rows[-1].prefill_ratios[:] = [1.4, 1.5]
    rows += [row("FP", "FP")]
    met = {(target, method): verdict for target, method, _, _, verdict in targets(rows)}
    assert met["decoding faster, W4A4", "uniform"] == "yes"
    assert met["prefill faster, W4A4", "uniform"] == "no"
    assert met["prefill faster, W4A4", "uniform, clusters"] == "yes"


def test_a_search_is_estimated_from_what_layers_took() -> None:
    once = QuestionTimes(vision=2.0, prefill=3.0, token=0.0)
    found = estimate_search("llava_13b", [once], prompt=512)
    # 7 linears of a decoder layer: 35 settings, or 2 x 125 + 5; 6 of a vision layer: 30, or 250.
    language, vision = 3.0 * 4096 / 512, 2.0 * 4096 / 256
    assert found.alone == pytest.approx(35 * language + 30 * vision)
    assert found.jointly == pytest.approx(255 * language + 250 * vision)
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert found.alone_flops > 35 * 2 * 4096 * weights
