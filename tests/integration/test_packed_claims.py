"""A packed checkpoint is held to what it says, and the command line to what it settles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvlm.cell import material
from qvlm.cli import main
from qvlm.errors import UserError
from qvlm.packing.formats import pack, unpack
from tests.helpers.cells import run

pytestmark = [pytest.mark.usefixtures("tracked"), pytest.mark.instruction_set]


class Evaluated(Exception):
    """The cell has come to its evaluation."""


@pytest.fixture
def packed(cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves a packed toy of any bit widths, and returns its folder."""

    def evaluated(*arguments: Any, **options: Any) -> None:
        raise Evaluated

    monkeypatch.setattr(material, "evaluate", evaluated)

    def save(bits: str = "w4a4", *overrides: str) -> Path:
        folder = tmp_path / "packed"
        shutil.rmtree(folder, ignore_errors=True)
        return run(cell(f"bits={bits}", f"save_packed={folder}", "evaluate=false", *overrides))

    return save


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def keep_few_codes(folder: Path, bits: int, kept: int) -> None:
    """Leaves `kept` distinct codes of `bits` bits in every packed layer."""
    forms = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, form in forms.items():
        codes = unpack(tensors[f"{name}.codes"], bits, form["in_features"])
        tensors[f"{name}.codes"] = pack(codes % kept * (2**bits // kept), bits)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("bits", "method"),
    [
        *((bits, "rtn") for bits in ("w2a4", "w3a3", "w4a4", "w6a6", "w8a8")),
        *(("w8a8", "zeroquant"), ("w4a4", "qlora"), ("w2a4", "zeroquant")),
    ],
)
def test_what_is_true_is_accepted(
    bits: str, method: str, packed: Callable[..., Path], cell: Any
) -> None:
    folder = packed(bits, f"method={method}")
    with pytest.raises(Evaluated):
        run(cell(f"model.packed={folder}"))


CLAIMS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "more bits": (
        "qvlm.json",
        lambda c: c["options"].update(bits={"weights": 8, "activations": 8}),
        "is not a W8A8 model as its qvlm.json states: its weights have 4 bits, not 8",
    ),
    "fewer bits": (
        "qvlm.json",
        lambda c: c["options"].update(bits={"weights": 2, "activations": 4}),
        "its weights have 4 bits, not 2",
    ),
    "other activations": (
        "qvlm.json",
        lambda c: c["options"].update(bits={"weights": 4, "activations": 3}),
        "its activations have 4 bits, not 3",
    ),
    "nothing expected": ("qvlm.json", lambda c: c.update(expected=[]), "it expects 0 packed"),
    "less expected": ("qvlm.json", lambda c: c["expected"].pop(), "packed layers, and the model"),
    "others expected": (
        "qvlm.json",
        lambda c: c.update(expected=["lm_head", *c["expected"][1:]]),
        "packed layers, and the model",
    ),
    "no tower": (
        "qvlm.json",
        lambda c: c["options"]["quantizer"].update(vision_tower=False),
        "packed layers, and the model",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_false_is_refused(claim: str, packed: Callable[..., Path], cell: Any) -> None:
    file, change, sentence = CLAIMS[claim]
    folder = packed()
    edit(folder / file, change)
    with pytest.raises(UserError) as refused:
        run(cell(f"model.packed={folder}"))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_codes_of_few_values_are_no_wide_ones(packed: Callable[..., Path], cell: Any) -> None:
    folder = packed("w8a8")
    keep_few_codes(folder, 8, 2)
    with pytest.raises(UserError, match="at most 2 values per scale, which 8 bits do not need"):
        run(cell(f"model.packed={folder}"))


def form(**changes: Any) -> Callable[[Any], object]:
    """Changes the form of the first packed layer."""

    def change(config: Any) -> None:
        next(iter(config["quantization_config"]["layers"].values())).update(changes)

    return change


def rename(new: str) -> Callable[[Any], object]:
    def change(config: Any) -> None:
        layers = config["quantization_config"]["layers"]
        layers[new] = layers.pop(next(iter(layers)))

    return change


FORMS: dict[str, Callable[[Any], object]] = {
    "wider": form(weight_bits=8),
    "widest": form(weight_bits=99),
    "no width": form(in_features=0),
    "huge": form(in_features=10**12),
    "text": form(weight_bits="4"),
    "true": form(bias="yes"),
    "group": form(group_size=0),
    "fine groups": form(group_size=1),
    "scales": form(scale_shape=[1, 10**6]),
    "kind": form(weight="other"),
    "inputs": form(inputs="other"),
    "input scales": form(input_shape=[3]),
    "ratio": form(ratio=float("nan")),
    "constants": form(weight="normal_float", constants=[]),
    "unknown": form(more=1),
    "layers": lambda c: c["quantization_config"].update(layers=[]),
    "layer": lambda c: c["quantization_config"].update(layers={"model": 1}),
    "name": rename("model"),
    "empty name": rename(""),
    "no such layer": rename("model.nothing.q_proj"),
    "router": rename("lm_head"),
}


@pytest.mark.parametrize("change", FORMS)
def test_forms_that_do_not_fit_are_refused(
    change: str, packed: Callable[..., Path], cell: Any
) -> None:
    folder = packed()
    edit(folder / "config.json", FORMS[change])
    with pytest.raises(UserError) as refused:
        run(cell(f"model.packed={folder}"))
    assert "\n" not in str(refused.value)


def test_an_order_that_leads_out_of_the_input_is_refused(
    packed: Callable[..., Path], cell: Any
) -> None:
    """The kernel in C reads the input at these places."""
    grouped = [
        "quantizer.language.granularity=per_channel_group",
        "quantizer.language.group_size=16",
    ]
    folder = packed("w4a4", *grouped, "quantizer.weight.granularity=per_group")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    orders = [name for name in tensors if name.endswith(".order")]
    assert orders
    for place in (-1, 10**6, 0):
        tensors[orders[0]] = torch.full_like(tensors[orders[0]], place)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(UserError, match="order of .* is not a permutation"):
            run(cell(f"model.packed={folder}"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=awq"], "method=awq is not how"),
        (["bits=w8a8"], "has bits=w4a4"),
        (["preflight=true", "bits=w8a8"], "has bits=w4a4"),
        (["-m", "method=rtn,awq"], "method=awq is not how"),
        (["-m", "bits=w8a8"], "has bits=w4a4"),
        (["-m", "preflight=true", "bits=w8a8"], "has bits=w4a4"),
    ],
)
def test_the_command_line_contradicts_no_checkpoint(
    words: list[str],
    sentence: str,
    packed: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [*words, f"model.packed={packed()}", f"results_dir={tmp_path}/results"]
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert sentence in err and err.count("\n") == 1 and err.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
