"""Checkpoints of the families: loaded, asked and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PixtralVisionConfig
from transformers.models.smolvlm import processing_smolvlm

from qvlm.data.prompts import CHAT, Prompting
from qvlm.errors import UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.decoding import decode
from qvlm.models import load_model
from qvlm.models.chat import FamilyModel
from tests.helpers.checkpoints import refused
from tests.helpers.families import (
    TINY,
    Folders,
    Loaded,
    load_tiny,
    picture,
    problems,
    tiny_family,
    tiny_model,
    tiny_tokenizer,
    write_encoding,
)

# What the processor of each family writes around a request with one picture.
PROMPTS = {
    "llava": ("USER: <image>\n", " ASSISTANT:", " A</s>"),
    "qwen2_vl": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>",
    ),
    "smolvlm": (
        "<|im_start|>User:<image>",
        "<end_of_utterance>\nAssistant:",
        " A<end_of_utterance>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\n<start_of_image>",
        "<end_of_turn>\n<start_of_turn>model\n",
        "A<end_of_turn>",
    ),
}


@torch.no_grad()
def last_logits(loaded: FamilyModel, asked: list[dict[str, Any]]) -> Tensor:
    """Logits [problems, vocabulary] of the token after each prompt."""
    batch: dict[str, Any] = loaded.encode(asked)
    positions = loaded.positions(batch["attention_mask"])
    logits: Tensor = loaded.model(**batch, **positions, use_cache=False).logits
    return logits[:, -1]


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers_and_of_each_problem_alone(
    name: str, folder_of: Folders, tiny: Loaded
) -> None:
    loaded = tiny(name)
    batch: dict[str, Any] = loaded.encode(problems())
    with torch.no_grad():
        assert torch.equal(tiny_model(name)(**batch).logits, loaded.model(**batch).logits)
    several = {**problems()[0], "image": [picture(56, 28, seed=8), picture(28, 28, seed=9)]}
    asked = [*problems(), several]
    together = last_logits(loaded, asked)
    for row, problem in zip(together, asked, strict=True):
        torch.testing.assert_close(row, last_logits(loaded, [problem])[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_a_batch_of_one_is_what_the_processor_itself_makes(name: str, tiny: Loaded) -> None:
    loaded = tiny(name)
    for problem in problems():
        made = loaded.encode([problem])
        images = None if problem["image"] is None else [[problem["image"]]]
        prompt = loaded.prompting.prompt(problem)
        begun = prompt.startswith("<bos>")
        own = loaded.processor(
            text=[prompt], images=images, return_tensors="pt", add_special_tokens=not begun
        )
        for key in made:
            assert torch.equal(made[key], own[key].to(made[key].dtype)), key
        assert own.keys() - made.keys() <= {"mm_token_type_ids", "token_type_ids"}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_that_of_the_chat_template(name: str, tiny: Loaded) -> None:
    loaded, (before, after, target) = tiny(name), PROMPTS[name]
    problem = {**problems()[0], "question": f"what is {loaded.processor.image_token}?"}
    prompt = loaded.prompting.prompt(problem)
    assert prompt.startswith(before) and prompt.endswith(after)
    assert prompt.count(loaded.processor.image_token) == 1
    assert loaded.prompting.target(problem) == target
    assert target.endswith(loaded.tokenizer.eos_token)
    assert loaded.prompting.parse(" A", 2) == 0


def test_pictures_take_as_many_tokens_as_their_sizes_ask_for(tiny: Loaded) -> None:
    loaded = tiny("qwen2_5_vl")
    lengths = {len(row) for row in loaded.token_ids(*_prompts(loaded, [(28, 28), (56, 28)]))}
    assert len(lengths) == 2
    with pytest.raises(ValueError, match="exactly one <|image_pad|> for each image"):
        loaded.token_ids(["no picture"], [[picture(28, 28)]])


@pytest.mark.parametrize("name", PROMPTS)
def test_texts_of_tasks_name_pictures_in_one_way(name: str, tiny: Loaded) -> None:
    """As lm-eval's tasks write them: in a bare text, and in a conversation."""
    loaded = tiny(name)
    prompting: Any = loaded.prompting
    (bare,) = loaded.token_ids(["a <image> b"], [[picture(28, 28)]])
    image_token = loaded.tokenizer.convert_tokens_to_ids(loaded.processor.image_token)
    assert image_token in bare
    asked = prompting.chat([{"role": "user", "content": "<image>why?"}])
    before, after = prompting.around(1)
    assert asked == f"{before}why?{after}"
    begun = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "be"}]
    assert prompting.chat(begun, answer_follows=False).endswith("be")


def _prompts(loaded: FamilyModel, shapes: list[tuple[int, int]]) -> tuple[list[str], list[Any]]:
    pictures = [[picture(*shape)] for shape in shapes]
    return ["".join(loaded.prompting.around(1))] * len(pictures), pictures


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava_next"])
def test_rows_that_leave_a_batch_do_not_change_the_others(name: str, tiny: Loaded) -> None:
    loaded = tiny(name)
    options: Callable[[list[int]], dict[str, Any]] = lambda rows: {"pad_token_id": 256}  # noqa: E731
    alone = [_answer(decode(loaded.model, loaded.encode([p]), 8, -1, options)) for p in problems()]
    end = alone[0][2]  # ends the first answer early
    expected = [row[: row.index(end) + 1] if end in row else row for row in alone]
    found = decode(loaded.model, loaded.encode(problems()), 8, end, options).tolist()
    assert [row[: len(wanted)] for row, wanted in zip(found, expected, strict=True)] == expected


def _answer(tokens: Tensor) -> list[int]:
    found: list[int] = tokens[0].tolist()
    return found


def test_positions_of_scored_texts_are_the_models_own(tiny: Loaded) -> None:
    loaded = tiny("qwen2_vl")
    prompts, pictures = _prompts(loaded, [(56, 28)])
    passage = likelihood.continuation(loaded, prompts[0], "A", pictures[0])
    scored = likelihood.logits_of(loaded, [passage])[0][-1]  # predicts the answer
    batch: dict[str, Any] = loaded.encode_prompts(prompts, pictures)
    with torch.no_grad():
        torch.testing.assert_close(scored, loaded.model(**batch).logits[0, -1])


def test_the_processor_that_stands_for_smolvlms_makes_the_same(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # only videos need it
    loaded = tiny("smolvlm")
    kind = processing_smolvlm.SmolVLMProcessor
    monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
    family = tiny_family("smolvlm")
    own = kind(family.image_processor, tiny_tokenizer(family), None, **family.settings)
    for problem in problems()[:3]:
        made = own(
            text=[loaded.prompting.prompt(problem)],
            images=[[problem["image"]]],
            return_tensors="pt",
        )
        encoded = loaded.encode([problem])
        assert all(torch.equal(encoded[key], made[key]) for key in encoded)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"model_type": "unknown_vl"}, "model_type=unknown_vl .* docs/families.md"),
        ("config.json", {"model_type": "llama"}, "is a LLaMA alone.*model=smollm2 model.path="),
        ("config.json", {"vision_config": 3}, "config.json does not describe a model"),
        ("chat_template.jinja", None, "has no chat template.*Add chat_template.jinja"),
        ("model.safetensors", None, "has no weights"),
        ("preprocessor_config.json", None, "the processor in .* does not load"),
        ("tokenizer.json", None, "the processor in .* does not load"),
        ("tokenizer.json", {"model": 3}, "the processor in .* does not load"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_refused(
    file: str, change: dict[str, Any] | None, reason: str, folder_of: Folders, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of("qwen2_vl"), tmp_path / "copy"))
    if change is None:
        (folder / file).unlink()
    else:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=reason):
        load_tiny(folder)


@pytest.mark.parametrize(
    ("file", "before", "after", "reason"),
    [
        ("processor_config.json", '"patch_size": 7', '"patch_size": 14', "tokens: 4, features"),
        ("processor_config.json", '"patch_size": 7, ', "", "unsupported operand"),
        ("processor_config.json", "default", "full", "do not match"),
        ("preprocessor_config.json", ": 28", ": 56", r"\(56\*56\) doesn't match model \(28\*28\)"),
        ("config.json", '_index": 300', '_index": 299', "tokens: 0, features"),
    ],
)
def test_a_processor_of_another_model_is_refused_when_it_is_loaded(
    file: str, before: str, after: str, reason: str, folder_of: Folders, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "copy"))
    content = (folder / file).read_text()
    assert before in content
    (folder / file).write_text(content.replace(before, after))
    wanted = f"does not make of a picture what its network reads .*{reason}.*belong together"
    with pytest.raises(UserError, match=wanted):
        load_tiny(folder)


def test_a_tower_that_the_table_does_not_describe_is_refused(tmp_path: Path) -> None:
    """Pixtral is a LLaVA by its model_type, with a tower of its own."""
    family = tiny_family("llava")
    tower = family.config.vision_config
    sizes = {key: getattr(tower, key) for key in ("hidden_size", "image_size", "patch_size")}
    family.config.vision_config = PixtralVisionConfig(
        **sizes, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlavaForConditionalGeneration(family.config).save_pretrained(tmp_path)
    write_encoding(tmp_path, family)
    with pytest.raises(UserError, match=r"PixtralVisionModel has no model\.vision_tower\.encoder"):
        load_tiny(tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float64"}, "model.dtype=float64 is not possible with Qwen2-VL"),
        ({"image_size": 224}, "model.image_size=224 is not for model.conversation=chat"),
        ({"meta_layers": True}, "stream=true is not for model.conversation=chat"),
    ],
)
def test_options_of_other_models_are_refused(
    options: dict[str, Any], reason: str, folder_of: Folders
) -> None:
    with pytest.raises(UserError, match=reason):
        load_model(folder_of("qwen2_vl"), "hf", Prompting("CQM-A", CHAT), **options)


def test_weights_that_do_not_fit_are_refused(folder_of: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen2_vl"), tmp_path / "copy"))
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] += 1
    content["text_config"]["layer_types"].append("full_attention")
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not every tensor was loaded"):
        load_tiny(folder)


def test_no_code_of_a_checkpoint_runs(folder_of: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen2_vl"), tmp_path / "copy"))
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for file in {*folder.glob("*.json")} - {folder / "tokenizer.json"}:
        content = json.loads(file.read_text())
        names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        content["auto_map"] = dict.fromkeys(names, "evil.Evil")
        content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        file.write_text(json.dumps(content))
    load_tiny(folder)
    assert not marker.exists()


def test_a_part_of_a_batch_that_the_model_would_ignore_is_refused(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny("gemma3")
    assert "token_type_ids" in loaded.encode(problems())

    def forward(self: Any, input_ids: Any, attention_mask: Any, **others: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(loaded.model), "forward", forward)
    refused(lambda: loaded.encode(problems()), "takes no", "token_type_ids")
