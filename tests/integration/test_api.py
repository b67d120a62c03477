"""The Python API gives the command line's numbers, and transformers opens its packed models."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import qvlm
from qvlm.errors import RunError, UserError
from qvlm.quantization import QuantLinear
from qvlm.records.record import Record
from tests.helpers.cells import Tracked, run
from tests.helpers.families import write_family
from tests.helpers.language_models import save_language_model, write_texts
from tests.helpers.problems import make_dataset, make_problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(checkpoint: Path, tracked: Tracked) -> qvlm.Model:
    """The toy, with the options that `cell` gives it."""
    return qvlm.load(
        "mini_llava",
        "model.name=toy",
        f"model.path={checkpoint}",
        "model.dtype=float32",
        "model.weight_group_size=16",
        "model.vision_weight_group_size=16",
        "calibration.samples=6",
        "evaluation.max_new_tokens=4",
        "device=cpu",
    )


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_it_gives_the_numbers_of_the_cell(method: str, model: qvlm.Model, cell: Any) -> None:
    options = [f"method={method}", "bits=w4a4", "model.dtype=float32"]
    record = Record.load(run(cell(*options)))
    report = qvlm.quantize(model, method, "w4a4")
    assert report.candidates == record.run["report"]["candidates"]
    assert [vars(layer) for layer in qvlm.prove(model).layers] == record.layers
    evaluation = qvlm.evaluate(model)
    assert list(evaluation.predictions["text"]) == list(record.predictions["text"])
    assert evaluation.metrics["classes"] == record.metrics["classes"]


def test_a_saved_model_gives_the_same_answers(model: qvlm.Model, tmp_path: Path) -> None:
    qvlm.quantize(model, "rtn", "w4a4")
    qvlm.save(model, tmp_path / "a folder, packed")
    assert model.is_packed
    packed = qvlm.evaluate(model)
    again = qvlm.load(tmp_path / "a folder, packed", "device=cpu", "evaluation.max_new_tokens=4")
    assert (again.method, again.bits.label, again.is_packed) == ("RTN", "W4A4", True)
    assert qvlm.prove(again).holds
    assert list(qvlm.evaluate(again).predictions["text"]) == list(packed.predictions["text"])
    qvlm.save(again, tmp_path / "a folder, packed")  # what was loaded can be saved again


def test_a_layer_that_keeps_its_float_input_is_found(model: qvlm.Model, tmp_path: Path) -> None:
    qvlm.quantize(model, "rtn", "w4a4")
    assert qvlm.prove(model).holds
    network = model.loaded.model
    name, layer = next((n, m) for n, m in network.named_modules() if isinstance(m, QuantLinear))
    plain = torch.nn.Linear(layer.in_features, layer.out_features)
    network.set_submodule(name, plain)
    assert qvlm.prove(model).failing == [name]
    with pytest.raises(RunError, match=rf"{re.escape(name)} .* Nothing is saved"):
        qvlm.save(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_any_data_set_of_the_schema_is_evaluated(model: qvlm.Model) -> None:
    own = make_dataset(make_problems(7, seed=5))
    evaluation = qvlm.evaluate(model, own)
    assert evaluation.metrics["classes"]["Avg"]["n"] == 7
    assert len(qvlm.evaluate(model, own, limit=3).predictions) == 3
    assert len(qvlm.evaluate(model, limit=11).predictions) == 11
    with pytest.raises(UserError, match="data holds no problems"):
        qvlm.evaluate(model, own.select([]))
    for limit in (0, 8):
        with pytest.raises(UserError, match=f"limit={limit} is not a whole number from 1 to 7"):
            qvlm.evaluate(model, own, limit=limit)
    with pytest.raises(UserError, match="image='photo.png' is not an image"):
        model.ask("g h", ["r", "s"], "photo.png")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="choices='rs' is one text"):
        model.ask("g h", "rs")
    with pytest.raises(UserError, match="column 'hint' is missing"):
        qvlm.evaluate(model, own.remove_columns("hint"))
    with pytest.raises(UserError, match="data, row 1"):
        rows = [{**row, "choices": []} if i == 1 else row for i, row in enumerate(own.to_list())]
        qvlm.evaluate(model, datasets.Dataset.from_list(rows, features=own.features))


def test_steps_out_of_order_are_one_sentence(model: qvlm.Model, tmp_path: Path) -> None:
    for step in (qvlm.prove, lambda given: qvlm.save(given, tmp_path / "packed")):
        with pytest.raises(UserError, match="full precision. Quantize it first"):
            step(model)
    with pytest.raises(UserError, match="bits=w9a9 is not a known option"):
        qvlm.quantize(model, "rtn", "w9a9")
    with pytest.raises(UserError, match="not an option of quantize"):
        qvlm.quantize(model, "rtn", "w4a4", "model=mini_moe_llava")
    qvlm.quantize(model, "rtn", "w4a4")
    with pytest.raises(UserError, match="quantized already"):
        qvlm.quantize(model, "rtn", "w4a4")
    with pytest.raises(UserError, match="nowhere is not a model. .* mini_llava, mini_moe_llava"):
        qvlm.load("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        qvlm.lode  # type: ignore[attr-defined]  # noqa: B018


IMPORTS = ["import qvlm", "from transformers import AutoModelForImageTextToText, AutoProcessor"]
ANSWER = """
import sys
{imports}
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained({folder!r})
processor = AutoProcessor.from_pretrained({folder!r})
prompt = processor.prompt("g h", ["r", "s"], image=True)
inputs = processor(images=Image.new("RGB", (20, 12), "red"), text=prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(out, skip_special_tokens=True))
"""


@pytest.mark.parametrize("order", [1, -1])
def test_transformers_opens_what_was_saved(order: int, model: qvlm.Model, tmp_path: Path) -> None:
    from PIL import Image

    qvlm.quantize(model, "rtn", "w4a4")
    qvlm.save(model, tmp_path / "packed")
    script = ANSWER.format(imports="\n".join(IMPORTS[::order]), folder=str(tmp_path / "packed"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = model.ask("g h", ["r", "s"], Image.new("RGB", (20, 12), "red"))
    assert done.stdout.strip() == str([said])


OTHERS = """
import sys
{imports}
import torch
kinds = AutoModelForCausalLM, AutoModelForImageTextToText
tokens = torch.arange(3, 11)[None]
for kind, folder in zip(kinds, sys.argv[1:]):
    with torch.no_grad():
        logits = kind.from_pretrained(folder)(input_ids=tokens).logits
        wanted = qvlm.load(folder).loaded.model(input_ids=tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("order", [1, -1])
def test_transformers_opens_packed_models_that_have_its_own_model_type(
    order: int, tmp_path: Path
) -> None:
    """A LLaMA alone and a model of a family, whose packed layers were left at random."""
    save_language_model(tmp_path / "text")
    write_texts(tmp_path / "texts")
    write_family(tmp_path / "family", "llava")
    few = ["device=cpu", "calibration.samples=2"]
    text = ["data=text", f"data.source={tmp_path / 'texts'}", "calibration.tokens=8"]
    models = {
        "llama": ("smollm2", f"model.path={tmp_path / 'text'}", *text, *few),
        "llava": ("hf", f"model.path={tmp_path / 'family'}", *few),
    }
    for name, words in models.items():
        loaded = qvlm.load(*words)
        qvlm.quantize(loaded, "rtn", "w4a4")
        qvlm.save(loaded, tmp_path / name)
    auto = "from transformers import AutoModelForCausalLM, AutoModelForImageTextToText"
    script = OTHERS.format(imports="\n".join(["import qvlm", auto][::order]))
    folders = [str(tmp_path / name) for name in models]
    words = [sys.executable, "-c", script, *folders]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, qvlm, qvlm.config.compose\n"
        "assert not {'torch', 'transformers', 'rich'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert {"load", "quantize", "prove", "evaluate", "save"} <= {*qvlm.__all__}
    assert all(callable(getattr(qvlm, name)) for name in qvlm.__all__)


def test_the_readme_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert len(block.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    for word in ("limit=500", '"awq"'):
        assert word in block
    exec(block.replace("limit=500", "limit=8").replace('"awq"', '"rtn"'), {})
    assert "proven: True" in capsys.readouterr().out
    assert (tmp_path / "packed" / "qvlm.json").is_file()
