"""What a model takes is predicted from modules without memory, and true of packed ones."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qvlm.cell import inputs as prepare
from qvlm.methods import RTN
from qvlm.models.architectures import KNOWN, WITH_TOWERS, architecture
from qvlm.models.cache import ROOM
from qvlm.models.meta import meta_model
from qvlm.models.networks import image_tokens
from qvlm.packing import pack_model, packed_layers, weight_bytes
from qvlm.packing.uncalibrated import put_empty_layers
from qvlm.planning import footprint, measured
from qvlm.planning.footprint import FULL, GIB, VARIANTS, LiveBytes, Variant
from qvlm.quantization import Walk

pytestmark = pytest.mark.slow

MINIATURES = ("mini_llava", "mini_moe_llava")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model", MINIATURES)
def test_prediction_is_what_packing_gives(model: str, variant: Variant) -> None:
    config = footprint.configuration(model, variant.bits)
    actual = measured.packed_miniature(model, config, variant)
    assert actual is not None
    need = footprint.predict(architecture(model), config, variant, text_tokens=8)
    assert need.weights == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("model", MINIATURES)
def test_prediction_holds_for_a_calibrated_model(model: str) -> None:
    config = footprint.configuration(model, "w4a4")
    loaded = prepare.load(config, "cpu").model
    side = loaded.config.vision_config.image_size
    ids = torch.full((1, image_tokens(loaded.config) + 6), 5)
    ids[:, :-6] = loaded.config.image_token_id
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side)}
    RTN().quantize(Walk(loaded, [batch], prepare.quantization_config(config)))
    pack_model(loaded)
    need = footprint.predict(architecture(model), config, Variant("w4a4", "uniform"), text_tokens=8)
    assert need.weights == pytest.approx(weight_bytes(loaded), rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_planned_forms_are_the_packed_ones(variant: Variant) -> None:
    config = footprint.configuration("mini_moe_llava", variant.bits)
    planned = meta_model(architecture("mini_moe_llava"), torch.float32)
    put_empty_layers(planned, prepare.quantization_config(config), variant.normal_float)
    packed = prepare.load(config, "cpu").model
    measured.pack_blindly(packed, config, variant)
    expected = {name: layer.form for name, layer in packed_layers(packed).items()}
    assert {name: layer.form for name, layer in packed_layers(planned).items()} == expected


@pytest.mark.parametrize(
    ("model", "billions", "tokens"),
    [
        ("llava_13b", 13.3, 256),
        ("llava_7b", 7.0, 256),
        ("moe_llava", 3.2, 576),
        ("moe_llava_phi2", 5.6, 576),
        ("moe_llava_qwen", 3.4, 576),
    ],
)
def test_known_architectures_have_the_published_size(
    model: str, billions: float, tokens: int
) -> None:
    built = architecture(model)
    count = sum(weight.numel() for weight in meta_model(built, torch.bfloat16).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.02)
    assert image_tokens(built) == tokens


@pytest.mark.parametrize(
    ("model", "billions"), [("moe_llava", 2.0), ("moe_llava_phi2", 3.6), ("moe_llava_qwen", 2.2)]
)
def test_a_mixture_activates_what_its_authors_say(model: str, billions: float) -> None:
    """Billions of weights that a token meets outside the tower, from MoE-LLaVA's model zoo."""
    parameters = meta_model(architecture(model), torch.bfloat16).named_parameters()
    met = sum(
        weight.numel() / (2 if ".experts." in name else 1)  # two of four experts
        for name, weight in parameters
        if "vision_tower" not in name
    )
    assert met / 1e9 == pytest.approx(billions, rel=0.04)


def test_every_model_of_the_configuration_is_known() -> None:
    assert set(footprint.MODELS) == {*KNOWN, *WITH_TOWERS, *MINIATURES}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "much"], "argument --budget: invalid float value: 'much'"),
        (["--models", "foo"], "argument --models: invalid choice: 'foo'"),
        (["--budget", "0"], "--budget: 0 is not above 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert footprint.main(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_cache_and_activations() -> None:
    config = footprint.configuration("mini_llava", "fp")
    built = architecture("mini_llava")
    short, long = (footprint.predict(built, config, FULL, text, 4) for text in (10, 20))
    text = built.text_config
    per_token = 2 * 8 * text.num_hidden_layers * text.hidden_size  # keys and values in float64
    assert long.cache - short.cache == 10 * per_token
    assert short.cache == per_token * (image_tokens(built) + 10 + 4 + ROOM)
    assert 0 < short.activations < long.activations


def test_live_bytes_forget_what_is_gone() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        for _ in range(3):
            made = torch.ones(100)
        assert known[:5].sum() + made.view(10, 10).sum() == 100
    assert 800 <= live.peak < 900


def test_a_measured_process_stands_beside_the_prediction(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = measured.without_model()
    need = footprint.predict(
        architecture("mini_llava"),
        footprint.configuration("mini_llava", "w4a4"),
        Variant("w4a4", "uniform"),
        footprint.SCALE_PROMPT - image_tokens(architecture("mini_llava")),
        footprint.SCALE_ANSWER,
    )
    peak = 1.25 * (bare + need.total) / GIB
    (tmp_path / "table4_scale.csv").write_text(
        "model,bits,method,device,weight_gib,peak_memory_gib,extrapolated\n"
        f"mini_llava,W4A4,uniform,cpu,{need.weights / GIB},{peak},time\n"
        'mini_llava,W6A6,uniform,cpu,1,2,"time, memory"\n'
    )
    given = ["--models", "mini_llava", "--budget", "0.01", "--runs", str(tmp_path / "runs")]
    assert footprint.main(given) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mini")]
    cells = {tuple(row.split()[3:6:2]): row.split("|")[-3:-1] for row in rows}
    shown, off = cells["W4A4", "uniform"]
    assert shown.strip() == f"{peak:.2f}"
    assert float(off.split()[0]) == pytest.approx(-20, abs=2)
    assert cells["W6A6", "uniform"][0].strip() == "not measured"


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--models", "mini_llava", "--budget", "0.01", "--runs", str(tmp_path)]
    assert footprint.main(given) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mini")]
    assert len(rows) == len(VARIANTS)
    assert all("0.0 %" in row for row in rows)
    assert all(row.split("|")[-3].strip() == "not measured" for row in rows)
    assert footprint.main(["--budget", "0"]) == 2
    assert "Choose a number above 0" in capsys.readouterr().err


def test_measured_bytes_come_from_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed, simulated = ({"execution": execution} for execution in ("packed", "simulated"))
    runs = [
        {"model": "a", "bits": "W4A4", "method": "AWQ", "weight_bytes": 7, **packed},
        {"model": "a", "bits": "W4A4", "method": "QLoRA", "weight_bytes": 6, **packed},
        {"model": "a", "bits": "W6A6", "method": "AWQ", **packed},
        {"model": "a", "bits": "W8A8", "method": "AWQ", "weight_bytes": 99, **simulated},
        {"model": "a", "bits": "W8A8", "method": "mine", "weight_bytes": 98, **packed},
        {"model": "a", "bits": "FP", "method": "FP", "weight_bytes": 20, **simulated},
    ]
    records = [
        SimpleNamespace(run=run, **{key: run[key] for key in ("model", "bits", "method")})
        for run in runs
    ]
    monkeypatch.setattr(measured, "find_records", lambda folder: records)
    (tmp_path / "table4_scale.csv").write_text(
        "model,bits,method,weight_gib,extrapolated\n"
        "b,W4A4,uniform,2,time\nb,FP,FP,9,time; memory\nb,W4A16,bitsandbytes NF4,,time\n"
    )
    assert measured.recorded(tmp_path / "runs") == {
        ("a", "W4A4", "uniform"): 7,
        ("a", "W4A4", "QLoRA"): 6,
        ("a", "FP", "FP"): 20,
        ("b", "W4A4", "uniform"): 2 * GIB,
    }
