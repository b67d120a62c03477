"""A model in pieces on several devices computes what it does on one; here a CPU and a disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qvlm.cell import checks
from qvlm.cell import inputs as prepare
from qvlm.cell.checks import check_options
from qvlm.errors import UserError
from qvlm.models import LoadedModel, load_model, placement
from qvlm.models.placement import distribute, memory_limits
from qvlm.packing import weight_bytes
from qvlm.records.record import Record
from tests.helpers.cells import run
from tests.helpers.configs import load

pytestmark = pytest.mark.usefixtures("tracked")

MODELS = ["mini_llava", "mini_moe_llava"]


def ask(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy tokens of two prompts, one with a picture."""
    batch = loaded.encode_prompts(
        ["Hello", "<image> Hi"], [[], [Image.new("RGB", (40, 30), "red")]]
    )
    with torch.inference_mode():
        logits = loaded.model(**batch).logits
        return logits, loaded.model.generate(**batch, max_new_tokens=2, do_sample=False)


def in_two(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """Keeps half of a model in main memory and half on the disk."""
    distribute(loaded.model, {"cpu": weight_bytes(loaded.model) // 2}, folder=folder)
    return loaded.model.hf_device_map


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_two_places_answers_as_in_one(name: str, tmp_path: Path) -> None:
    whole, parts = (load_model(name, name) for _ in range(2))
    places = in_two(parts, tmp_path)
    assert set(places.values()) == {"cpu", "disk"}
    assert all(torch.equal(*pair) for pair in zip(ask(whole), ask(parts), strict=True))


def test_layers_stay_in_one_piece(tmp_path: Path) -> None:
    parts = load_model("mini_moe_llava", "m")
    size = weight_bytes(parts.model)
    language = weight_bytes(parts.model.model.language_model)
    distribute(parts.model, {"cpu": size - language // 5}, folder=tmp_path)
    split = [part for part in parts.model.hf_device_map if ".language_model.layers." in part]
    assert split
    assert all(part.rpartition(".")[2].isdigit() for part in split)


def test_a_packed_model_in_two_places(cell: Any, tmp_path: Path) -> None:
    config = cell(f"save_packed={tmp_path}/packed")
    run(config)
    folder = cell(f"model.packed={tmp_path}/packed")
    whole, parts = (prepare.load(folder, "cpu") for _ in range(2))
    assert "disk" in in_two(parts, tmp_path / "disk").values()
    assert all(torch.equal(*pair) for pair in zip(ask(whole), ask(parts), strict=True))


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_cell_with_hooks_everywhere_is_the_same_cell(
    method: str,
    cell: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The map of a machine whose only card is its main memory."""
    options = [f"method={method}", f"save_packed={tmp_path}/packed"]
    alone = Record.load(run(cell(*options)))
    for module in (prepare, checks):
        monkeypatch.setattr(module, "find_device", lambda name: name)
    dispatched = []

    def observed(model: Any, places: Any, **options: Any) -> None:
        dispatched.append(places)
        placement_dispatch(model, places, **options)

    placement_dispatch = placement.dispatch_model
    monkeypatch.setattr(placement, "dispatch_model", observed)
    config = load("device=map", "max_memory=[1GiB]")
    assert config.max_memory == ["1GiB"]
    again = cell(*options, "force=true", "device=map", "max_memory=[1GiB]")
    spread_out = Record.load(run(again))
    assert len(dispatched) == 1
    assert spread_out.run["hash"] == alone.run["hash"]
    assert spread_out.run["device"] == "map"
    assert spread_out.layers == alone.layers
    assert spread_out.predictions.equals(alone.predictions)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    loaded = load_model("mini_llava", "m")
    with pytest.raises(UserError, match="too little memory for the whole model.* max_memory"):
        distribute(loaded.model, {"cpu": 1000})
    assert loaded.model.device.type == "cpu"
    with pytest.raises(UserError, match="all weights in float32, .* model.packed=FOLDER"):
        distribute(loaded.model, {"cpu": 1000}, to_be_quantized=True, folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device=map"], "device=map is not on this machine. Choose one of: auto, cpu"),
        (["max_memory=[1GiB]"], "max_memory is not for one device. Give device=map"),
        (["device=map", "stream=true", "save_packed=x"], "Stream with device=auto"),
    ],
)
def test_a_map_needs_a_card(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=said):
        check_options(load(*words))


def test_the_limits_are_what_is_free_unless_sizes_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = placement.get_max_memory
    free = {0: 100, 1: 200, "cpu": 300}
    monkeypatch.setattr(
        placement, "get_max_memory", lambda given=None: true(given) if given else free
    )
    assert memory_limits([]) == {0: 90, 1: 180, "cpu": 300}
    assert memory_limits(["2KiB", "3KB"]) == {0: 2048, 1: 3000, "cpu": 300}
    with pytest.raises(UserError, match="4 sizes are too many. .* each of the 2 GPUs"):
        memory_limits(["1GiB"] * 4)
    with pytest.raises(
        UserError, match="max_memory: 'much' is not a size. Give sizes such as 20GiB"
    ):
        memory_limits(["much"])
