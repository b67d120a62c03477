"""Architectures, routing against a written-out reference, encoding, and checkpoints that fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from qvlm.data import miniature
from qvlm.errors import UserError
from qvlm.models import LoadedModel, MoeStableLmConfig, load_model
from qvlm.models.load import MINIATURES
from qvlm.models.mixture import MixtureOfExperts, within_capacity

pytestmark = pytest.mark.slow

NAMES = ("mini_llava", "mini_moe_llava")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param, request.param)


def test_routing_equals_a_slow_reference() -> None:
    torch.manual_seed(0)
    config = MoeStableLmConfig(hidden_size=16, intermediate_size=24, num_experts=4)
    mixture = MixtureOfExperts(config, StableLmMLP).eval()
    hidden = torch.randn(3, 7, 16)
    expected = torch.zeros_like(hidden)
    for row in range(3):
        for token in range(7):
            x = hidden[row, token]
            gates = torch.softmax(mixture.router(x), 0)
            first = int(gates.argmax())
            second = max((e for e in range(4) if e != first), key=lambda e: float(gates[e]))
            total = gates[first] + gates[second]
            for expert in (first, second):
                expected[row, token] += gates[expert] / total * mixture.experts[expert](x)
    assert torch.allclose(mixture(hidden), expected, atol=1e-5)


def slow_top2(
    mixture: MixtureOfExperts, x: torch.Tensor, factor: float, least: int
) -> torch.Tensor:
    """DeepSpeed's top-2 gating at evaluation, one token at a time; [tokens, width] in and out."""
    experts = len(mixture.experts)
    gates = [torch.softmax(mixture.router(token), 0) for token in x]
    capacity = max(int(np.ceil(np.float32(factor * 2) * np.float32(len(x) / experts))), least)
    taken = [0] * experts
    served: list[list[int]] = [[] for _ in x]
    for rank in (0, 1):  # every first choice is placed before any second one
        for position, gate in enumerate(gates):
            expert = sorted(range(experts), key=lambda e: -float(gate[e]))[rank]
            if taken[expert] < capacity:
                served[position].append(expert)
            taken[expert] += 1
    output = torch.zeros_like(x)
    for position, gate in enumerate(gates):
        total = sum(float(gate[e]) for e in served[position])
        for expert in served[position]:
            output[position] += float(gate[expert]) / total * mixture.experts[expert](x[position])
    return output


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33])
@pytest.mark.parametrize(("factor", "least"), [(2.0, 0), (1.0, 4), (0.5, 0), (0.3, 2), (1.1, 0)])
def test_capacity_equals_a_slow_reference(tokens: int, factor: float, least: int) -> None:
    torch.manual_seed(tokens)
    config = MoeStableLmConfig(
        hidden_size=16, intermediate_size=24, capacity_factor=factor, min_capacity=least
    )
    mixture = MixtureOfExperts(config, StableLmMLP).eval()
    hidden = torch.randn(1, tokens, 16)
    hidden[:, : tokens // 2] = hidden[:, :1]  # a crowd that wants the same two experts
    with torch.no_grad():
        expected = slow_top2(mixture, hidden[0], factor, least)
        assert torch.allclose(mixture(hidden)[0], expected, atol=1e-5)


def test_a_tight_capacity_drops_late_tokens_and_a_released_one_drops_none() -> None:
    crowd = torch.tensor([[0, 1]]).repeat(8, 1)
    served = within_capacity(crowd, experts=4, capacity_factor=0.5, min_capacity=0)
    assert served.tolist() == [[True, True]] * 2 + [[False, False]] * 6
    assert within_capacity(crowd, 4, 0.5, min_capacity=3)[:, 0].sum() == 3
    # 4 experts, top 2, factor 2.0, as MoE-LLaVA states: as many places as there are tokens.
    for tokens in range(1, 70):
        chosen = torch.rand(tokens, 4).topk(2).indices
        assert within_capacity(chosen, 4, 2.0, 0).all()


def test_first_choices_are_served_before_second_ones() -> None:
    chosen = torch.tensor([[0, 1], [1, 0], [1, 0]])  # two places at each of two experts
    served = within_capacity(chosen, experts=2, capacity_factor=0.5, min_capacity=0)
    assert served.tolist() == [[True, False], [True, True], [True, False]]


def test_a_token_that_is_dropped_twice_gets_nothing() -> None:
    torch.manual_seed(0)
    config = MoeStableLmConfig(hidden_size=16, intermediate_size=24, capacity_factor=0.5)
    mixture = MixtureOfExperts(config, StableLmMLP).eval()
    hidden = torch.randn(1, 1, 16).repeat(1, 8, 1)
    output = mixture(hidden)[0]
    assert output[:2].abs().amin(1).min() > 0
    assert torch.equal(output[2:], torch.zeros_like(output[2:]))


def test_no_capacity_is_the_default_of_the_miniature() -> None:
    loaded = load_model("mini_moe_llava", "mini_moe_llava")
    mixtures = [m for m in loaded.model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(mixtures) == 2
    assert all(mixture.capacity_factor is None for mixture in mixtures)


def test_balance_loss_is_one_for_an_even_load_and_grows_with_collapse() -> None:
    config = MoeStableLmConfig(hidden_size=4, intermediate_size=8, num_experts=4)
    mixture = MixtureOfExperts(config, StableLmMLP).train()
    mixture.router.weight.data = torch.eye(4) * 50
    mixture(torch.eye(4))
    assert mixture.balance_loss is not None
    assert mixture.balance_loss.item() == pytest.approx(1.0, abs=1e-4)
    mixture(torch.eye(4)[:1].repeat(8, 1))
    assert mixture.balance_loss.item() == pytest.approx(4.0, abs=1e-3)


def test_answer_does_not_depend_on_the_batch(loaded: LoadedModel) -> None:
    problems = miniature.generate("validation", 12, seed=3)
    together = loaded.encode(problems)
    with torch.no_grad():
        logits = loaded.model(**together).logits[:, -1]
        for row, problem in enumerate(problems):
            alone = loaded.model(**loaded.encode([problem])).logits[0, -1]
            assert torch.allclose(logits[row], alone, atol=2e-3)


def test_encoding_pads_left_and_expands_the_image(loaded: LoadedModel) -> None:
    problems = miniature.generate("validation", 40, seed=1)
    pictured = next(p for p in problems if p["image"] is not None)
    plain = min(
        (p for p in problems if p["image"] is None), key=lambda p: len(loaded.prompting.prompt(p))
    )
    batch = loaded.encode([pictured, plain])
    token = loaded.model.config.image_token_id
    assert (batch["input_ids"] == token).sum(1).tolist() == [loaded.image_tokens, 0]
    assert batch["pixel_values"].shape == (1, 3, loaded.image_size, loaded.image_size)
    assert batch["attention_mask"][1, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert "pixel_values" not in loaded.encode([plain])


def test_prompt_without_its_image_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="exactly one <image>"):
        loaded.encode_prompts(["no picture here"], [[Image.new("RGB", (48, 48))]])


def test_every_word_of_every_problem_is_known(loaded: LoadedModel) -> None:
    for problem in miniature.generate("test", 600, seed=5):
        ids = loaded.encode([problem], with_target=True)["input_ids"]
        assert loaded.tokenizer.unk_token_id not in ids, problem


def test_decoded_target_parses(loaded: LoadedModel) -> None:
    for problem in miniature.generate("validation", 60, seed=2):
        ids = loaded.tokenizer(loaded.prompting.target(problem), add_special_tokens=False)
        text = loaded.decode(torch.tensor([ids["input_ids"]]))[0]
        assert loaded.prompting.parse(text, len(problem["choices"])) == problem["answer"], text


def test_features_come_from_the_layer_before_the_last(loaded: LoadedModel) -> None:
    problem = next(p for p in miniature.generate("validation", 20) if p["image"] is not None)
    pixels = loaded.encode([problem])["pixel_values"]
    with torch.no_grad():
        before = loaded.model.get_image_features(pixels).pooler_output[0]
        last = loaded.model.model.vision_tower.encoder.layers[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        after = loaded.model.get_image_features(pixels).pooler_output[0]
    assert before.shape == (loaded.image_tokens, loaded.model.config.text_config.hidden_size)
    assert torch.equal(before, after)


def test_the_two_miniatures_have_the_architectures_they_stand_for() -> None:
    llava = json.loads((MINIATURES / "mini_llava/config.json").read_text())
    moe = json.loads((MINIATURES / "mini_moe_llava/config.json").read_text())
    assert (llava["projector_type"], llava["text_config"]["model_type"]) == ("linear", "llama")
    assert moe["projector_type"] == "mlp2x_gelu"
    assert moe["text_config"]["num_experts"] == 4
    assert moe["text_config"]["num_experts_per_token"] == 2
    for config in (llava, moe):
        assert config["vision_feature_layer"] == -2
        assert config["vision_feature_select_strategy"] == "default"


@pytest.mark.parametrize("name", NAMES)
def test_weights_fit_the_repository(name: str) -> None:
    assert (MINIATURES / name / "model.safetensors").stat().st_size <= 12 * 2**20


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(MINIATURES / "mini_llava", tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        load_model(folder, "broken")


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(MINIATURES / "mini_llava", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="model.safetensors is truncated or damaged"):
        load_model(folder, "broken")


def test_config_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(MINIATURES / "mini_llava", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tensors are missing, first the one for .*layers\.4\."):
        load_model(folder, "broken")


def test_the_head_reads_no_slice(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last token's logits too: its product would copy the whole weight."""
    seen: list[torch.Tensor] = []
    head = loaded.model.get_output_embeddings()
    linear = type(head).forward
    monkeypatch.setattr(
        head, "forward", lambda x: (seen.append(x), linear(head, x))[1], raising=False
    )
    ids = torch.full((2, 5), 7)
    with torch.no_grad():
        last = loaded.model(input_ids=ids, logits_to_keep=1).logits
        every = loaded.model(input_ids=ids).logits
    assert torch.allclose(last, every[:, -1:], atol=1e-4)
    assert [x.stride() for x in seen] == [(x.shape[1] * x.shape[2], x.shape[2], 1) for x in seen]
