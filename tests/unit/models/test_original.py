"""Checkpoints in their authors' formats: equal logits, a sentence for each thing that is wrong."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from qvlm.cell import inputs as prepare
from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.methods.qvlm.dependency import element_joint
from qvlm.methods.qvlm.vision_loss import Tuning, loss_terms, reference
from qvlm.models import load_model
from qvlm.models.checkpoints import hub
from qvlm.models.checkpoints.tokenizer import load_tokenizer
from qvlm.models.loaded import pad_to_square
from qvlm.models.mixture import MixtureOfExperts
from tests.helpers import standins
from tests.helpers.checkpoints import PLAIN, PROBLEM, STABLELM, change, read, refused
from tests.helpers.configs import load as compose
from tests.helpers.standins import StandIn, write

pytestmark = pytest.mark.slow

# --- what loads


@pytest.mark.parametrize("family", standins.FAMILIES)
@pytest.mark.parametrize(
    ("shards", "safetensors", "carry_tower"),
    [(1, False, False), (3, False, True), (1, True, True), (2, True, False)],
)
def test_logits_equal_those_of_the_same_weights_placed_directly(
    tmp_path: Path, family: str, shards: int, safetensors: bool, carry_tower: bool
) -> None:
    standin = write(
        family, tmp_path, shards=shards, safetensors=safetensors, carry_tower=carry_tower
    )
    loaded = read(standin)
    batch = loaded.encode([PROBLEM, PLAIN])
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, standin.model(**batch).logits)
    placed = standin.model.state_dict()
    assert {k: v.shape for k, v in loaded.model.state_dict().items()} == {
        k: v.shape for k, v in placed.items()
    }
    assert all(torch.equal(v, placed[k]) for k, v in loaded.model.state_dict().items())


def test_a_carried_tower_is_used_with_the_config_of_the_given_one(tmp_path: Path) -> None:
    standin = write("llava", tmp_path, carry_tower=True)
    assert standin.tower is not None
    (standin.tower / "pytorch_model.bin").unlink()
    place = "vision_tower.embeddings.class_embedding"
    loaded = read(standin).model.model.get_parameter(place)
    assert torch.equal(loaded, standin.model.model.get_parameter(place))


def test_an_image_takes_its_patches_and_the_placeholder_is_no_word(tmp_path: Path) -> None:
    loaded = read(write("llava", tmp_path))
    ids = loaded.encode([PROBLEM, PLAIN])["input_ids"]
    token = loaded.model.config.image_token_id
    assert token == loaded.model.config.text_config.vocab_size == len(standins.pieces())
    assert loaded.model.lm_head.out_features == token  # it can never be answered
    assert (ids == token).sum(1).tolist() == [16, 0]


def test_generation_runs_over_the_placeholder(tmp_path: Path) -> None:
    loaded = read(write("llava", tmp_path))
    batch = loaded.encode([PROBLEM])
    model: Any = loaded.model
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 3
    assert isinstance(loaded.decode(ids[:, -3:])[0], str)


@pytest.mark.parametrize("family", ["llava", "moe_llava_phi2"])
def test_the_tower_is_tuned_over_the_placeholder(tmp_path: Path, family: str) -> None:
    """Q-VLM's L_reg counts words by the float model's trust in them, and an image is no word."""
    loaded = read(write(family, tmp_path))
    model, image = loaded.model, loaded.model.config.image_token_id
    batch = loaded.encode([PROBLEM], with_target=True)
    kept = reference(model, batch)
    terms = loss_terms(model, batch, kept, {}, {}, element_joint, Tuning(entropy=0, error=0))
    with torch.no_grad():
        chances = model(**batch).logits[0].softmax(-1)
    ids = batch["input_ids"][0].tolist()
    expected, losses = [], []
    for place, word in enumerate(ids[1:]):
        chance = 0.0 if word == image else float(chances[place, word])
        expected.append(chance)
        losses.append(0.0 if word == image else -math.log(chance) * chance)
    assert kept.trust[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert terms.total.item() == pytest.approx(sum(losses) / sum(expected), rel=1e-4)


def test_dtype_is_the_one_that_was_asked_for_and_routers_stay_in_float32(tmp_path: Path) -> None:
    loaded = read(write("moe_llava", tmp_path), dtype="bfloat16")
    kinds = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert {kinds[name] for name in kinds if ".router." not in name} == {torch.bfloat16}
    assert {kinds[name] for name in kinds if ".router." in name} == {torch.float32}


def test_expert_capacity_is_the_checkpoints_and_can_be_lifted(tmp_path: Path) -> None:
    standin = write("moe_llava", tmp_path)
    moe = json.loads((standin.folder / "config.json").read_text())["moe"]
    change(standin.folder / "config.json", moe={**moe, "eval_capacity_factor": 0.25})
    tight, free = read(standin), read(standin, expert_capacity="unlimited")
    found = [m for m in tight.model.modules() if isinstance(m, MixtureOfExperts)]
    assert [(m.capacity_factor, m.min_capacity) for m in found] == [(0.25, 0)] * 2
    batch = tight.encode([PROBLEM])
    with torch.no_grad():
        wanted = standin.model(**batch).logits  # a factor of 2 drops nothing either
        assert torch.allclose(free.model(**batch).logits, wanted, atol=1e-5)
        assert not torch.allclose(tight.model(**batch).logits, wanted, atol=1e-2)


def test_images_may_be_wrapped_in_tokens(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    rows = len(standins.pieces())
    config = standin.folder / "config.json"
    change(config, mm_use_im_start_end=True)
    with pytest.raises(UserError, match="wraps images in <im_start>"):
        read(standin)
    # Two rows for the two tokens, as the released training adds them.
    added = {"<im_start>": rows, "<im_end>": rows + 1}
    (standin.folder / "added_tokens.json").write_text(json.dumps(added))
    change(config, vocab_size=rows + 2)
    tensors = {}
    for shard in sorted(standin.folder.glob("*.bin")):
        tensors |= torch.load(shard, weights_only=True)
        shard.unlink()
    (standin.folder / "pytorch_model.bin.index.json").unlink()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(2, 32).half()])
    standins.write_weights(standin.folder, tensors)
    ids = read(standin).encode([PROBLEM])["input_ids"][0].tolist()
    assert ids.index(rows) + 1 == ids.index(rows + 2)  # the image comes right after its start
    assert ids[ids.index(rows + 2) + 16] == rows + 1


# --- tokens


def test_sentencepiece_equals_a_slow_reference(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    tokenizer = load_tokenizer(standin.folder, {}, "toy").tokenizer
    texts = (
        *(
            "Which is a rock?",
            "USER: The air ASSISTANT:",
            " two  blanks ",
            "",
            "Context",
            "\nWhich",
        ),
        *("naïve 漢字 🙂", "ContextContext Question", "123 Th The"),
    )
    for text in texts:
        assert tokenizer(text)["input_ids"] == standins.slow_sentencepiece(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    specials = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert specials == (0, 1, 2)
    assert tokenizer("air</s>")["input_ids"][-1] == 2


def test_byte_pairs_equal_a_slow_reference(tmp_path: Path) -> None:
    standin = write("moe_llava", tmp_path)
    config = json.loads((standin.folder / "config.json").read_text())
    encoding = load_tokenizer(standin.folder, config, "toy")
    ranks = standins.byte_ranks()

    def slow(word: str) -> list[int]:
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [
                (ranks[parts[i] + parts[i + 1]], i)
                for i in range(len(parts) - 1)
                if parts[i] + parts[i + 1] in ranks
            ]
            if not pairs:
                return [ranks[part] for part in parts]
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    # A text, cut by hand as the released pattern cuts it.
    for words in (
        ["Which", " is", " air", "?", "\n\n", "The", " rock"],
        ["USER", ":", " naïve", " 漢字", " 🙂", "\n", "1", "2", "3"],
        ["don", "'t", " (", "A", ")", "  ", " Context"],
    ):
        text = "".join(words)
        ids = encoding.tokenizer(text)["input_ids"]
        assert ids == [part for word in words for part in slow(word)]
        assert encoding.tokenizer.decode(ids) == text
    end = encoding.tokenizer("air<|endoftext|>")["input_ids"][-1]
    assert end == encoding.tokenizer.eos_token_id == standins.END_OF_TEXT
    assert not encoding.begins_with_bos


def test_the_text_after_an_image_begins_anew(tmp_path: Path) -> None:
    """As `tokenizer_image_token` does: each piece on its own, so a blank stands before the line."""
    loaded = read(write("llava", tmp_path))
    image = loaded.model.config.image_token_id
    ids = loaded.encode_prompts(["Which <image>\nair"], [[Image.new("RGB", (9, 9))]])["input_ids"]
    table = {piece: index for index, (piece, _, _) in enumerate(standins.pieces())}
    before = [1, table["\u2581Which"], table["\u2581"]]
    after = [table["\u2581"], table["<0x0A>"], table["a"], table["i"], table["r"]]
    assert ids[0].tolist() == [*before, *[image] * 16, *after]


# --- what is checked together


@pytest.mark.parametrize(
    ("option", "family", "format", "conversation", "side", "fit"),
    [
        ("llava_13b", "llava", "QCM-LEA", "vicuna_v1", 224, "crop"),
        ("llava_7b", "llava", "QCM-LEPA", "vicuna_v1", 224, "crop"),
        ("llava_v15_7b", "llava_v15", "CQM-A", "vicuna_v1", 336, "pad"),
        ("llava_v15_13b", "hub", "CQM-A", "vicuna_v1", 336, "pad"),
        ("moe_llava", "moe_llava", "CQM-A", "stablelm", 336, "crop"),
        ("moe_llava_phi2", "moe_llava_phi2", "CQM-A", "phi", 336, "crop"),
        ("moe_llava_qwen", "moe_llava_qwen", "CQM-A", "qwen", 336, "crop"),
    ],
)
def test_a_models_yaml_fits_its_family(
    tmp_path: Path,
    option: str,
    family: str,
    format: str,
    conversation: str,
    side: int,
    fit: str,
) -> None:
    standin = write(family, tmp_path)
    tower = [f"model.vision_tower={standin.tower}"] if standin.tower else []
    config = compose(f"model={option}", f"model.path={standin.folder}", *tower)
    loaded = prepare.load(config, "cpu")
    assert loaded.name == option
    assert loaded.prompting == Prompting(format, conversation)
    assert (loaded.image_size, loaded.image_fit) == (side, fit)
    assert loaded.model.dtype == torch.float16
    batch = loaded.encode([PROBLEM])
    assert batch["pixel_values"].shape == (1, 3, side, side)


def test_pad_and_crop_are_what_they_say(tmp_path: Path) -> None:
    wide = Image.new("RGB", (8, 4), (255, 255, 255))
    square = pad_to_square(wide, (0.5, 0.25, 0.0))
    assert square.size == (8, 8)
    assert [square.getpixel((3, y)) for y in (1, 2, 5, 6)] == [
        (127, 63, 0),
        (255, 255, 255),
        (255, 255, 255),
        (127, 63, 0),
    ]
    standin = write("llava_v15", tmp_path)
    sides = {
        fit: read(standin, image_fit=fit).encode([PROBLEM])["pixel_values"][0, 0]
        for fit in ("crop", "pad")
    }
    color = (200 / 255 - 0.48145466) / 0.26862954
    assert torch.allclose(sides["crop"], torch.tensor(color), atol=1e-3)
    assert sides["pad"][168, 168] == pytest.approx(color, abs=1e-3)
    assert sides["pad"][2].abs().max() < 0.02  # the mean color, to a 255th


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompting": STABLELM}, ["model.conversation", "stablelm", "<|endoftext|>", "</s>"]),
        ({"image_size": 336}, ["model.image_size", "336", "model.image_size=224"]),
        ({"vision_tower": "nowhere"}, ["model.vision_tower", "nowhere"]),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    refused(lambda: read(write("llava", tmp_path), **options), *words)


# --- what can be wrong, each in one sentence


def first_shard(standin: StandIn) -> Path:
    return sorted(standin.folder.glob("pytorch_model-*.bin"))[0]


def edit_shard(standin: StandIn, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the tensors of the first shard, and nothing else."""
    tensors = torch.load(first_shard(standin), weights_only=True)
    edit(tensors)
    torch.save(tensors, first_shard(standin))


def reindex(standin: StandIn) -> None:
    """Makes the index say what the shards hold."""
    index = standin.folder / "pytorch_model.bin.index.json"
    placed = {
        name: shard.name
        for shard in standin.folder.glob("*.bin")
        for name in torch.load(shard, weights_only=True)
    }
    change(index, weight_map=placed)


def test_missing_tensor(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    edit_shard(standin, lambda tensors: tensors.pop("lm_head.weight"))
    refused(lambda: read(standin), "lacks tensor lm_head.weight", "index")
    reindex(standin)
    refused(lambda: read(standin), "1 tensors are missing", "lm_head.weight")


def test_unexpected_tensor(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    edit_shard(standin, lambda tensors: tensors.update(stranger=torch.ones(2)))
    refused(lambda: read(standin), "tensor stranger", "no place")


def test_a_second_projector_layer_is_unexpected_in_a_linear_one(tmp_path: Path) -> None:
    standin = write("llava_v15", tmp_path)
    change(standin.folder / "config.json", mm_projector_type=None)
    refused(lambda: read(standin), "model.mm_projector.2.", "no place")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("intermediate_size", 64, ["mlp", "shape (48, 32)", "asks for (64, 32)"]),
        ("vocab_size", 400, ["asks for (400, 32)"]),
        ("num_hidden_layers", 4, ["tensors are missing", "layers.3"]),
        ("num_hidden_layers", 2, ["layers.2", "no place"]),
        ("num_key_value_heads", 2, ["asks for (16, 32)"]),
        ("rope_theta", 500.0, ["inv_freq", "follows from config.json"]),
        ("mm_hidden_size", 30, ["model.vision_tower", "width 30", "has width 24"]),
        ("hidden_size", None, ["lacks hidden_size"]),
        ("hidden_size", "wide", ["config.json", "hidden_size"]),
        ("rope_scaling", {"kind": "x"}, ["config.json", "type"]),
        ("mm_vision_tower", None, ["lacks mm_vision_tower"]),
        ("image_aspect_ratio", "anyres", ["image_aspect_ratio", "'anyres'", "'square', 'pad'"]),
        ("mm_vision_select_feature", "all", ["mm_vision_select_feature", "'patch'"]),
        ("mm_projector_type", "resampler", ["mm_projector_type", "'resampler'", "'linear'"]),
        ("architectures", ["LlavaMptForCausalLM"], ["LlavaMptForCausalLM", "LlavaLlamaForCausal"]),
    ],
)
def test_config_that_is_not_the_weights(
    tmp_path: Path, key: str, value: object, words: list[str]
) -> None:
    standin = write("llava", tmp_path)
    change(standin.folder / "config.json", **{key: value})
    refused(lambda: read(standin), "real", *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("top_k_experts", 1, ["top_k_experts", "Choose one of: 2."]),
        ("num_experts", [4, 2], ["num_experts"]),
        ("use_residual", True, ["use_residual"]),
        ("eval_capacity_factor", None, ["lacks eval_capacity_factor"]),
        ("moe_layers_idx", [0, 1], ["layers.1.mlp", "no place"]),
    ],
)
def test_mixture_that_is_not_supported(
    tmp_path: Path, key: str, value: object, words: list[str]
) -> None:
    standin = write("moe_llava", tmp_path)
    moe = json.loads((standin.folder / "config.json").read_text())["moe"]
    change(standin.folder / "config.json", moe={**moe, key: value})
    refused(lambda: read(standin), *words)


def test_other_mixtures_are_refused_with_the_accepted_ones(tmp_path: Path) -> None:
    standin = write("moe_llava", tmp_path)
    change(standin.folder / "config.json", architectures=["MoELLaVAMistralForCausalLM"])
    accepted = [f"MoELLaVA{name}ForCausalLM" for name in ("Stablelm", "Phi", "QWen")]
    refused(lambda: read(standin), "MoELLaVAMistralForCausalLM", "Choose one of", *accepted)


def test_missing_shard(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    first_shard(standin).unlink()
    refused(lambda: read(standin), "pytorch_model-00001-of-00002.bin is missing", "Download it")


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_shard(tmp_path: Path, safetensors: bool, kept: float) -> None:
    standin = write("llava", tmp_path, safetensors=safetensors)
    shard = sorted(standin.folder.glob("*-00001-of-*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content))])
    refused(lambda: read(standin), shard.name, "damaged")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    standin = write("llava", tmp_path, shards=1)
    target = tmp_path / "executed"
    file = standin.folder / "pytorch_model.bin"
    if zipped:
        torch.save({"lm_head.weight": Evil(target)}, file)
    else:
        file.write_bytes(pickle.dumps({"lm_head.weight": Evil(target)}))
    refused(lambda: read(standin), "pytorch_model.bin", "other things than tensors")
    assert not target.exists()


def test_weights_that_are_no_dictionary_of_tensors(tmp_path: Path) -> None:
    standin = write("llava", tmp_path, shards=1)
    torch.save({"model": {"lm_head.weight": torch.ones(2)}}, standin.folder / "pytorch_model.bin")
    refused(lambda: read(standin), "other things than tensors")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", ["config.json is missing"]),
        ("tokenizer.model", ["no tokenizer", "tokenizer.json, tokenizer.model"]),
        ("pytorch_model.bin", ["no weights", "pytorch_model.bin"]),
    ],
)
def test_missing_file(tmp_path: Path, file: str, words: list[str]) -> None:
    standin = write("llava", tmp_path, shards=1)
    (standin.folder / file).unlink()
    refused(lambda: read(standin), *words)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"{", ["config.json is not JSON"]),
        ("config.json", b"[]", ["not a JSON object"]),
        ("tokenizer.model", b"\x0a\xff", ["tokenizer", "cannot be read"]),
        ("tokenizer.model", b"", ["tokenizer", "not a sentencepiece BPE model"]),
        ("pytorch_model.bin.index.json", b"{}", ["not an index of shards"]),
        ("added_tokens.json", b'{"<im_start>": 7}', ["<im_start>", "the id 7, which is not free"]),
    ],
)
def test_damaged_file(tmp_path: Path, file: str, content: bytes, words: list[str]) -> None:
    standin = write("llava", tmp_path)
    (standin.folder / file).write_bytes(content)
    refused(lambda: read(standin), *words)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    standin = write("hub", tmp_path)
    change(standin.folder / "config.json", image_token_index=7)
    refused(lambda: read(standin), "<image> at 7", "tokenizer")
    other = write("llava", tmp_path / "other")
    (other.folder / "added_tokens.json").write_text(json.dumps({"<x>": len(standins.pieces())}))
    refused(lambda: read(other), "vocabulary of")


def test_tower_without_its_weights_or_preprocessor(tmp_path: Path) -> None:
    standin = write("llava", tmp_path)
    assert standin.tower is not None
    (standin.tower / "preprocessor_config.json").rename(tmp_path / "kept")
    refused(lambda: read(standin), "preprocessor_config.json is missing")
    (tmp_path / "kept").rename(standin.tower / "preprocessor_config.json")
    change(standin.tower / "preprocessor_config.json", crop_size=336)
    refused(lambda: read(standin), "cuts images to 336 x 336", "takes 224 x 224")
    (standin.tower / "pytorch_model.bin").unlink()
    refused(lambda: read(standin), "vision tower", "no weights")


def test_a_tower_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    """MoE-LLaVA's checkpoints for 384 pixels have a SigLIP."""
    standin = write("moe_llava", tmp_path)
    assert standin.tower is not None
    change(standin.tower / "config.json", model_type="siglip")
    refused(lambda: read(standin), "vision tower", "a siglip", "Give a CLIP")


def test_half_a_tower_is_missing_tensors(tmp_path: Path) -> None:
    standin = write("llava", tmp_path, shards=1, carry_tower=True)
    file = standin.folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    dropped = [name for name in tensors if "vision_model.encoder.layers.1" in name]
    torch.save({name: value for name, value in tensors.items() if name not in dropped}, file)
    refused(lambda: read(standin), f"{len(dropped)} tensors are missing", "vision_tower")


def test_a_checkpoint_with_its_own_tower_takes_no_other(tmp_path: Path) -> None:
    standin = write("hub", tmp_path)
    refused(lambda: read(standin, vision_tower="somewhere"), "model.vision_tower", "its own")
    refused(lambda: load_model("mini_llava", "m", vision_tower="x"), "model.vision_tower")


def test_another_tower_than_the_carried_one_is_refused(tmp_path: Path) -> None:
    standin = write("llava", tmp_path, carry_tower=True)
    assert standin.tower is not None
    standins.write_tower(standin.tower, standins.tiny("llava", seed=9))
    words = ["model.vision_tower: model real", str(standin.tower), "Leave model.vision_tower out"]
    refused(lambda: read(standin), *words)


def test_a_tied_head_that_is_not_the_embeddings_is_refused(tmp_path: Path) -> None:
    standin = write("hub", tmp_path)
    text = json.loads((standin.folder / "config.json").read_text())["text_config"]
    change(standin.folder / "config.json", text_config={**text, "tie_word_embeddings": True})
    refused(lambda: read(standin), "lm_head.weight", "Set tie_word_embeddings=false")


def test_a_tensor_outside_the_index_is_seen(tmp_path: Path) -> None:
    standin = write("llava", tmp_path, safetensors=True)
    shard = sorted(standin.folder.glob("model-*"))[0]
    save_file({**load_file(shard), "stranger": torch.ones(1)}, shard)
    refused(lambda: read(standin), "tensor stranger")


# --- the hub


def serve(folder: Path, asked: list[list[str]]) -> Callable[..., str]:
    """Stands for the hub: notes what is asked for, and gives a folder."""

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    return snapshot


def test_a_repository_is_fetched_without_code_and_with_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin = write("llava", tmp_path)
    asked: list[list[str]] = []
    monkeypatch.setattr(hub, "snapshot_download", serve(standin.folder, asked))
    assert hub.local_folder("owner/model", "model.path") == standin.folder
    assert asked[1] == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert not any(pattern.endswith((".py", "*")) for patterns in asked for pattern in patterns)


def test_small_files_are_enough_where_no_weights_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(hub, "snapshot_download", serve(tmp_path, asked))
    hub.local_folder("owner/model", "model.path", weights=False)
    assert len(asked) == 1


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("no", response=RESPONSE), ["Accept its terms", "hf auth login"]),
        (RepositoryNotFoundError("no", response=RESPONSE), ["the hub has no owner/model"]),
        (LocalEntryNotFoundError("no"), ["HF_HUB_OFFLINE", "local cache"]),
        (OSError("disk full"), ["disk full", "Try again"]),
    ],
)
def test_what_the_hub_refuses_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    refused(lambda: hub.local_folder("owner/model", "model.path"), "model.path=FOLDER", *words)


def test_a_name_that_is_neither_folder_nor_repository() -> None:
    refused(lambda: hub.local_folder("no/such/folder", "model.path"), "owner/name on the hub")
