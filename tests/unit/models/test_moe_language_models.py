"""MoE-LLaVA on Phi-2 and on Qwen: the original computations, written out, on their own tensors.

The references read tensors by the names of the original files and compute a text's logits one step
at a time, as the released modeling code does, with none of our classes. Sources:
`modeling_qwen.py`, `modeling_phi.py`, `llava_qwen_moe.py` and `llava_phi_moe.py` of MoE-LLaVA.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from qvlm.data import miniature
from qvlm.data.prompts import Prompting
from qvlm.methods.awq.rescaling import find_rescalings
from qvlm.models import LoadedModel, load_model
from qvlm.models.checkpoints.tokenizer import load_tokenizer
from qvlm.quantization import QuantizationConfig, QuantSpec, Walk
from qvlm.records.record import Record
from tests.helpers.cells import run
from tests.helpers.checkpoints import PROBLEM, change, read, refused
from tests.helpers.configs import load
from tests.helpers.standins import PHI_ADDED, PHI_END, QWEN_END, StandIn, byte_ranks, merge, write

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

Tensors = dict[str, Tensor]
LAYERS, HEADS = 4, 4


def tensors_of(standin: StandIn) -> Tensors:
    """The tensors of the files, in float32."""
    found: Tensors = {}
    for shard in sorted(standin.folder.glob("*.bin")):
        found |= torch.load(shard, weights_only=True)
    return {name: tensor.float() for name, tensor in found.items()}


def linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    """A product with a weight [out, in], and with a bias where there is one."""
    product = x @ tensors[f"{name}.weight"].T
    return product + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else product


def rotate(x: Tensor, rotated: int) -> Tensor:
    """Turns the first `rotated` dimensions of each head by the token's position.

    Dimension i goes with i + rotated / 2. x is [tokens, heads, width of a head].
    """
    half = rotated // 2
    out = x.clone()
    for position in range(len(x)):
        for i in range(half):
            angle = position / 10_000 ** (2 * i / rotated)
            a, b = x[position, :, i], x[position, :, i + half]
            out[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, rotated: int) -> Tensor:
    """Causal attention; all [tokens, width]."""
    tokens, width = query.shape
    q, k, v = (x.view(tokens, HEADS, width // HEADS) for x in (query, key, value))
    q, k = rotate(q, rotated), rotate(k, rotated)
    out = torch.zeros_like(v)
    for head in range(HEADS):
        for t in range(tokens):
            scores = k[: t + 1, head] @ q[t, head] / math.sqrt(width // HEADS)
            out[t, head] = scores.softmax(0) @ v[: t + 1, head]
    return out.view(tokens, width)


def mixed(x: Tensor, tensors: Tensors, mlp: str, expert: Callable[[Tensor, str], Tensor]) -> Tensor:
    """An MLP, or DeepSpeed's mixture of four, where the files have one."""
    if f"{mlp}.deepspeed_moe.gate.wg.weight" not in tensors:
        return expert(x, mlp)
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        gates = linear(token, tensors, f"{mlp}.deepspeed_moe.gate.wg").softmax(0)
        best = sorted(range(4), key=lambda e: -float(gates[e]))[:2]
        for e in best:
            weight = gates[e] / gates[best].sum()
            out[t] += weight * expert(token, f"{mlp}.deepspeed_moe.experts.deepspeed_experts.{e}")
    return out


def qwen(tensors: Tensors, x: Tensor) -> Tensor:
    """Qwen's logits of embedded tokens [tokens, width]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * tensors[f"{name}.weight"]

    def expert(x: Tensor, name: str) -> Tensor:
        gated = linear(x, tensors, f"{name}.w1") * silu(linear(x, tensors, f"{name}.w2"))
        return linear(gated, tensors, f"{name}.c_proj")

    width = x.shape[1]
    for layer in range(LAYERS):
        h = f"transformer.h.{layer}"
        stacked = linear(norm(x, f"{h}.ln_1"), tensors, f"{h}.attn.c_attn")
        query, key, value = stacked[:, :width], stacked[:, width : 2 * width], stacked[:, -width:]
        seen = attend(query, key, value, rotated=width // HEADS)
        x = x + linear(seen, tensors, f"{h}.attn.c_proj")
        x = x + mixed(norm(x, f"{h}.ln_2"), tensors, f"{h}.mlp", expert)
    return linear(norm(x, "transformer.ln_f"), tensors, "lm_head")


def phi(tensors: Tensors, x: Tensor) -> Tensor:
    """Phi's logits of embedded tokens [tokens, width]."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return layer_norm(x, x.shape[1:], weight, bias, eps=1e-5)

    def expert(x: Tensor, name: str) -> Tensor:
        inner = gelu(linear(x, tensors, f"{name}.fc1"), approximate="tanh")
        return linear(inner, tensors, f"{name}.fc2")

    for layer in range(LAYERS):
        h = f"model.layers.{layer}"
        read_by_both = norm(x, f"{h}.input_layernorm")
        query, key, value = (
            linear(read_by_both, tensors, f"{h}.self_attn.{part}_proj") for part in "qkv"
        )
        rotated = int(0.4 * x.shape[1] // HEADS)
        seen = linear(attend(query, key, value, rotated), tensors, f"{h}.self_attn.dense")
        x = x + seen + mixed(read_by_both, tensors, f"{h}.mlp", expert)
    return linear(norm(x, "model.final_layernorm"), tensors, "lm_head")


REFERENCES = {"moe_llava_phi2": phi, "moe_llava_qwen": qwen}
NEW = list(REFERENCES)


@pytest.mark.parametrize("family", NEW)
def test_logits_equal_the_originals_mathematics_written_out(tmp_path: Path, family: str) -> None:
    standin = write(family, tmp_path)
    loaded, tensors = read(standin), tensors_of(standin)
    width = loaded.model.config.text_config.hidden_size
    x = torch.randn(11, width, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        actual = loaded.model(inputs_embeds=x[None]).logits[0]
    expected = REFERENCES[family](tensors, x)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_half_of_the_layers_have_experts_and_nothing_else_is_left_out(
    tmp_path: Path, family: str
) -> None:
    standin = write(family, tmp_path)
    loaded = read(standin).model
    routers = [name for name, _ in loaded.named_modules() if name.endswith("router")]
    assert routers == [f"model.language_model.layers.{i}.mlp.router" for i in (0, 2)]
    own = sum(p.numel() for name, p in loaded.named_parameters() if "vision_tower" not in name)
    assert own == sum(tensor.numel() for tensor in tensors_of(standin).values())


# --- what is particular to Phi


def test_attention_scores_beyond_half_precision_do_not_overflow(tmp_path: Path) -> None:
    """Phi-2's do; the released code computes them in float32, and so does PyTorch's attention."""
    standin = write("moe_llava_phi2", tmp_path, shards=1)
    file = standin.folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    for part in "qk":
        tensors[f"model.layers.1.self_attn.{part}_proj.bias"].fill_(200)  # 10 * 200^2 > 65504
    torch.save(tensors, file)
    half, whole = read(standin, dtype="float16"), read(standin)
    with torch.no_grad():
        actual = half.model(**half.encode([PROBLEM])).logits.float()
        expected = whole.model(**whole.encode([PROBLEM])).logits
    assert actual.isfinite().all()
    # Scores of 10^5 leave no bits for what tells tokens apart, so only the range is compared.
    assert actual.abs().max() == pytest.approx(expected.abs().max(), rel=0.5)


# --- what is particular to Qwen


def test_a_text_beyond_seq_length_is_refused(tmp_path: Path) -> None:
    standin = write("moe_llava_qwen", tmp_path)
    change(standin.folder / "config.json", seq_length=20)
    loaded = read(standin)
    model: Any = loaded.model
    width = model.config.text_config.hidden_size
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 20, width))
        refused(lambda: model(inputs_embeds=torch.randn(1, 21, width)), "21 tokens", "of 20")
    ids = torch.ones(1, 18, dtype=torch.long)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 21)
    refused(lambda: model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4), "21 tokens")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kv_channels", 16, ["kv_channels", "Choose one of: 8."]),
        ("no_bias", False, ["no_bias"]),
        ("rotary_pct", 0.25, ["rotary_pct"]),
        ("seq_length", None, ["lacks seq_length"]),
        ("intermediate_size", 48, ["c_proj", "shape (32, 48)", "asks for (32, 24)"]),
        ("hidden_size", 64, ["kv_channels"]),
    ],
)
def test_a_qwen_that_is_no_qwen2_is_refused(
    tmp_path: Path, key: str, value: object, words: list[str]
) -> None:
    standin = write("moe_llava_qwen", tmp_path)
    change(standin.folder / "config.json", **{key: value})
    refused(lambda: read(standin), *words)


def test_a_stacked_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    standin = write("moe_llava_qwen", tmp_path, shards=1)
    file = standin.folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = tensors[name][:64]  # grouped heads would look like this
    torch.save(tensors, file)
    refused(lambda: read(standin), name, "shape (64, 32)", "asks for (96, 32)")


# --- tokens


def flat(parts: list[str | int]) -> list[int]:
    """The ids of words cut by hand, their byte pairs merged; a number stands for itself."""
    ranks, ids = byte_ranks(), []
    for part in parts:
        ids += [part] if isinstance(part, int) else [ranks[x] for x in merge(part.encode())]
    return ids


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Which is air?\n\nThe rock", ["Which", " is", " air", "?\n\n", "The", " rock"]),
        ("USER: naïve 漢字 🙂\n123", ["USER", ":", " naïve", " 漢字", " 🙂\n", "1", "2", "3"]),
        ("e\u0301 don't (A)   Context", ["é", " don", "'t", " (", "A", ")", "  ", " Context"]),
        ("air<|endoftext|>", ["air", QWEN_END]),
        ("<|im_start|>air<|im_end|>\n", [QWEN_END + 1, "air", QWEN_END + 2, "\n"]),
        ("<|extra_0|><|extra_204|><|extra_205|>", [QWEN_END + 3, QWEN_END + 207, "<|", "extra"]),
    ],
)
def test_qwens_tokens_are_those_of_its_pattern(
    tmp_path: Path, text: str, parts: list[str | int]
) -> None:
    standin = write("moe_llava_qwen", tmp_path)
    config = json.loads((standin.folder / "config.json").read_text())
    encoding = load_tokenizer(standin.folder, config, "toy")
    ids = encoding.tokenizer(text)["input_ids"]
    assert ids[: len(flat(parts))] == flat(parts)
    if "205" not in text:  # which is no special token
        assert ids == flat(parts)
    assert len(encoding.tokenizer) == QWEN_END + 208
    assert encoding.tokenizer.eos_token_id == QWEN_END
    assert encoding.tokenizer.pad_token_id == config["pad_token_id"]
    assert not encoding.begins_with_bos


def test_a_short_file_of_byte_pairs_is_found(tmp_path: Path) -> None:
    standin = write("moe_llava_qwen", tmp_path)
    file = standin.folder / "qwen.tiktoken"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    refused(lambda: read(standin), "qwen.tiktoken has byte pairs up to", f"the id {QWEN_END}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Which is air? The rock", ["Which", " is", " air", "?", " The", " rock"]),
        ("USER: naïve 漢字 123\n", ["USER", ":", " naïve", " 漢字", " 123", "\n"]),
        ("don't (A)", ["don", "'t", " (", "A", ")"]),
        ("The  rock\n   air", ["The", PHI_ADDED["  "], "rock", "\n", PHI_ADDED["   "], "air"]),
        ("\t\tair", [PHI_ADDED["\t\t"], "air"]),
        ("air<|endoftext|>", ["air", PHI_END]),
    ],
)
def test_phis_tokens_are_codegens_and_runs_of_blanks(
    tmp_path: Path, text: str, parts: list[str | int]
) -> None:
    standin = write("moe_llava_phi2", tmp_path)
    encoding = load_tokenizer(standin.folder, {}, "toy")
    ids = encoding.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == flat(parts)
    assert encoding.tokenizer.eos_token_id == PHI_END
    assert encoding.tokenizer.pad_token_id == PHI_ADDED["<|extra_0|>"]
    assert not encoding.begins_with_bos


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("vocab.json", None, ["vocab.json"]),
        ("vocab.json", "{}", ["merges.txt has more tokens"]),
        ("merges.txt", None, ["no tokenizer", "vocab.json with merges.txt"]),
        ("tokenizer_config.json", '{"tokenizer_class": "BartTokenizer"}', ["BartTokenizer"]),
        ("added_tokens.json", '{"  ": 7}', ["gives '  ' the id 7"]),
    ],
)
def test_damaged_tokenizer_of_phi(
    tmp_path: Path, file: str, content: str | None, words: list[str]
) -> None:
    standin = write("moe_llava_phi2", tmp_path)
    if content is None:
        (standin.folder / file).unlink()
    else:
        (standin.folder / file).write_text(content)
    refused(lambda: read(standin), "real", *words)


# --- prompts, and the whole line


@pytest.mark.parametrize(
    ("family", "conversation"), [("moe_llava_phi2", "phi"), ("moe_llava_qwen", "qwen")]
)
def test_a_prompt_word_for_word_and_token_by_token(
    tmp_path: Path, family: str, conversation: str
) -> None:
    problem = {**PROBLEM, "question": "Which is air?", "hint": "The rock is air."}
    loaded = read(write(family, tmp_path))
    assert loaded.prompting == Prompting("CQM-A", conversation)
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "Context: The rock is air.\nQuestion: Which is air?\nOptions: (A) air (B) a rock\n"
        "Answer with the option's letter from the given choices directly. ASSISTANT:"
    )
    assert loaded.prompting.prompt(problem) == expected
    assert loaded.prompting.target(problem) == " A<|endoftext|>"
    ids = loaded.encode([problem])["input_ids"][0].tolist()
    image = loaded.model.config.image_token_id
    before, after = expected.split("<image>")
    pieces = [ids[: ids.index(image)], ids[ids.index(image) + 16 :]]
    assert ids.count(image) == 16
    assert [loaded.tokenizer.decode(piece) for piece in pieces] == [before, after]


def test_awq_finds_its_places_in_a_block_with_one_norm(tmp_path: Path) -> None:
    loaded = read(write("moe_llava_phi2", tmp_path))
    batches = [loaded.encode([PROBLEM], with_target=True)]
    spec = QuantSpec(4, "per_channel")
    walk = Walk(loaded.model, batches, QuantizationConfig(spec, spec, spec))
    language = [find_rescalings(block) for block in walk.blocks() if block.kind == "language"]
    attention = tuple(f"self_attn.{part}_proj" for part in "qkv")
    for layer, (behind_norm, behind_value) in enumerate(language):
        experts = tuple(f"mlp.experts.{e}.fc1" for e in range(4))
        assert behind_norm.source == "input_layernorm"
        assert behind_norm.readers == attention + (("mlp.fc1",) if layer % 2 else experts)
        assert behind_norm.routers == (() if layer % 2 else ("mlp.router",))
        assert behind_value.source == "self_attn.v_proj"
        assert behind_value.readers == ("self_attn.dense",)


def test_the_hero_runs_on_an_original_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of Q-VLM, the fine-tuning of the tower too, at the least that it can be."""
    monkeypatch.setattr(LoadedModel, "decode", lambda _, ids, kept=(): ["A"] * len(ids))
    standin = write("moe_llava_phi2", tmp_path)
    config = load(
        *("model=moe_llava_phi2", f"model.path={standin.folder}"),
        *(f"model.vision_tower={standin.tower}", "model.dtype=float32"),
        *("model.weight_group_size=8", "method=qvlm", "bits=w4a4"),
        *("method.percentiles=[1.0,0.99]", "method.max_depth=2", "method.veo_epochs=1"),
        *("calibration.samples=2", "evaluation.limit=2", "evaluation.max_new_tokens=1"),
        *("device=cpu", f"results_dir={tmp_path}/results", "tracking=off"),
    )
    record = Record.load(run(config))
    assert (record.method, record.bits, record.run["exceeding"]) == ("Q-VLM", "W4A4", [])


@pytest.mark.parametrize("family", NEW)
def test_a_cell_quantizes_proves_packs_and_loads_again(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights name no letter, and a model that never does is refused.
    monkeypatch.setattr(LoadedModel, "decode", lambda _, ids, kept=(): ["A"] * len(ids))
    standin = write(family, tmp_path)
    common = (
        f"results_dir={tmp_path}/results",
        "evaluation.max_new_tokens=2",
        "device=cpu",
        "tracking=off",
    )
    config = load(
        *(f"model={family}", f"model.path={standin.folder}", f"model.vision_tower={standin.tower}"),
        *("model.dtype=float32", "model.weight_group_size=8", "method=rtn", "bits=w4a4"),
        *("calibration.samples=4", f"save_packed={tmp_path}/packed", *common),
        "evaluation.limit=6",
    )
    record = Record.load(run(config))
    assert (record.model, record.method, record.bits) == (family, "RTN", "W4A4")
    assert record.run["exceeding"] == []
    assert max(row["weight_levels"] for row in record.layers) <= 16
    assert max(row["input_levels"] for row in record.layers) <= 16
    inside = [row["layer"].split("language_model.layers.")[-1] for row in record.layers]
    attention, mlp = {
        "moe_llava_phi2": (("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2")),
        "moe_llava_qwen": (
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            ("gate_proj", "up_proj", "down_proj"),
        ),
    }[family]
    for layer in range(LAYERS):
        experts = [f"experts.{e}.{part}" for e in range(4) for part in mlp]
        wanted = [f"{layer}.self_attn.{part}" for part in attention]
        wanted += [f"{layer}.mlp.{part}" for part in (mlp if layer % 2 else experts)]
        assert sorted(name for name in inside if name.startswith(f"{layer}.")) == sorted(wanted)
    assert not any("router" in name or "lm_head" in name for name in inside)

    again = load_model(f"{tmp_path}/packed", family, Prompting("CQM-A", config.model.conversation))
    fresh = read(standin)
    problems = miniature.generate("test", 6, seed=0)
    prompts = [fresh.prompting.prompt(problem) for problem in problems]
    images = [[problem["image"]] if problem["image"] else [] for problem in problems]
    encoded = [loaded.encode_prompts(prompts, images)["input_ids"] for loaded in (fresh, again)]
    assert torch.equal(*encoded)
    odd = "The  rock\n   air naïve<|endoftext|>"
    assert fresh.tokenizer(odd)["input_ids"] == again.tokenizer(odd)["input_ids"]
