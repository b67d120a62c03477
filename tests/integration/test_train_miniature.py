"""The training script: rows of the look-up phase, masks of the joint phase, resumption."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from experiments import train_miniature as training
from experiments.muon import Muon
from experiments.validation import accuracy_by_skill
from qvlm.cell.identity import CHECKPOINT_FILES
from qvlm.data import miniature
from qvlm.models import LoadedModel, load_model
from qvlm.records.provenance import content_hash
from qvlm.tables.claims.plan import FOLDER, TRAINED, Training, find_trainings

TOKENIZER = training.build_tokenizer()
ARROWS = ("Relate force and motion", "Follow a road on a map")


def test_fixed_phrases_are_one_token_each() -> None:
    for phrase in training.PHRASES:
        assert len(TOKENIZER(phrase, add_special_tokens=False)["input_ids"]) == 1, phrase


def test_lookup_rows_have_one_right_answer() -> None:
    lookups = training.Lookups(TOKENIZER, seed=0)
    for size in (12, len(lookups.words)):
        lookups.size = size
        for seed in range(50):
            ids, labels = lookups.row(random.Random(seed))
            options: dict[int, int] = {}
            answered = 0
            for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
                if token == lookups.options:
                    options = {}
                if token in lookups.brackets:
                    options[ids[at + 1]] = lookups.brackets.index(token)
                if label in lookups.letters:
                    ends = (lookups.stop, lookups.turn)
                    begin = max(i for i in range(at - 2) if ids[i] in ends)
                    asked = [options[t] for t in ids[begin:at] if t in options]
                    assert lookups.letters.index(label) in asked
                    answered += 1
            assert 6 <= answered <= 10


def test_fast_pixels_equal_the_processor() -> None:
    loaded = load_model("mini_llava", "mini_llava")
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    expected = loaded.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(training.pixels(images, loaded.image_processor), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "capability", "half"),
    [
        ("cpu", "AVX512", True),
        ("cpu", "AVX2", False),
        ("cpu", "DEFAULT", False),
        ("cuda", "", True),
    ],
)
def test_products_are_in_bfloat16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: str, half: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked = {}
    monkeypatch.setattr(torch, "autocast", lambda *what, **options: asked.update(options))
    training.mixed_precision(torch.device(device))
    assert asked == {"enabled": half}


def test_muon_is_that_of_pytorch_but_for_rounding() -> None:
    torch.manual_seed(0)
    options = dict(lr=0.02, weight_decay=0.01, adjust_lr_fn="original")
    begun = [torch.randn(shape) for shape in ((48, 32), (32, 48), (32, 32), (4, 4))]
    ours, theirs = ([nn.Parameter(start.clone()) for start in begun] for _ in range(2))
    ours[-1].requires_grad_(False)  # an expert that no token reached has no gradient
    theirs[-1].requires_grad_(False)
    optims = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(5):
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optim in optims:
            optim.step()
    for start, mine, other in zip(begun, ours, theirs, strict=True):
        moved = (other - start).norm()
        assert (mine - other).norm() <= 0.02 * moved  # bfloat16 has three digits
    assert not torch.equal(ours[0], begun[0])
    assert torch.equal(ours[-1], begun[-1])
    optims[0].load_state_dict(optims[1].state_dict())  # a training goes on from either


def first_batches(first: int, count: int) -> tuple[LoadedModel, list[training.Batch]]:
    loaded = load_model("mini_llava", "mini_llava")
    batches = training.joint_batches(loaded, 0, 8, first)
    return loaded, [next(batches) for _ in range(count)]


def test_loss_is_taken_on_the_answer_alone() -> None:
    loaded, batches = first_batches(0, 4)
    for batch in batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            learned = labels != training.IGNORED
            text = loaded.decode(labels[learned][None])[0]
            assert "The answer is" in text
            assert "Options:" not in text
            assert torch.equal(ids[learned], labels[learned])


def test_batches_do_not_depend_on_where_a_run_was_cut() -> None:
    _, whole = first_batches(0, 12)
    _, rest = first_batches(9, 3)
    for one, other in zip(whole[9:], rest, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_batches_made_ahead_by_another_process_are_the_same() -> None:
    loaded, expected = first_batches(3, 3)
    recipe = training.Recipe(joint_steps=6, batch_size=8)
    found = training.JointBatches(loaded, recipe, first=3).ahead(workers=1)
    for batch in expected:
        made = next(found)
        assert torch.equal(made.input_ids, batch.input_ids)
        assert torch.equal(made.labels, batch.labels)
        assert (made.pixel_values is None) == (batch.pixel_values is None)
        if batch.pixel_values is not None:
            assert torch.equal(made.pixel_values, batch.pixel_values)


@pytest.mark.parametrize("name", sorted(training.RECIPES))
def test_a_resumed_run_ends_with_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "VALIDATION_PROBLEMS", 8)
    recipe = replace(
        training.RECIPES[name],
        joint_steps=4,
        batch_size=4,
        lookup_batch_size=4,
        lookup_target=-1.0,  # the word set grows at every step
        vision_steps=2,
        vision_batch_size=4,
    )
    training.train(name, recipe, tmp_path / "a", tmp_path / "whole", "cpu", every=2)

    class Killed(Exception):
        pass

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "accuracy_by_skill", die)
        with pytest.raises(Killed):
            training.train(name, recipe, tmp_path / "b", tmp_path / "cut", "cpu", every=2)
    training.train(name, recipe, tmp_path / "b", tmp_path / "cut", "cpu", every=2)
    whole, cut = (load_model(tmp_path / f, name).model.state_dict() for f in ("whole", "cut"))
    for key, value in whole.items():
        assert torch.equal(value, cut[key]), key


def test_the_vision_phase_learns_to_read_arrows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SKILLS", {n: miniature.SKILLS[n] for n in ARROWS})
    loaded = load_model("mini_llava", "mini_llava")
    torch.manual_seed(0)
    fresh = training.build_model("mini_llava", TOKENIZER)
    loaded.model.load_state_dict(fresh.state_dict())
    recipe = replace(training.RECIPES["mini_llava"], vision_steps=60, vision_batch_size=32)
    losses: list[float] = []
    language = loaded.model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    training.train_tower(loaded, recipe, lambda **line: losses.append(line["loss"]))
    assert losses[-1] < 20  # from about 0.7 for each of 700 words
    assert torch.equal(language, loaded.model.model.language_model.layers[0].mlp.up_proj.weight)


def test_training_problems_never_reach_the_test_split() -> None:
    drawn = miniature.stream("train", seed=11)
    trained = {miniature.fingerprint(next(drawn)) for _ in range(1500)}
    tested = {miniature.fingerprint(p) for p in miniature.generate("test", 1500, seed=0)}
    assert not trained & tested


def test_a_restart_repeats_the_decay_and_changes_nothing_before_it() -> None:
    once = training.Recipe(joint_steps=100, decay_share=0.8)
    twice = replace(once, joint_steps=150, restart=100)
    factors = [training.joint_factor(step, twice) for step in range(150)]
    assert factors[:100] == [training.joint_factor(step, once) for step in range(100)]
    assert (factors[0], factors[100]) == (1.0, twice.restart_rate)
    assert factors[99] < 0.01 > factors[149]
    assert all(a >= b for a, b in pairwise(factors[100:]))


SISTERS = [one for found in find_trainings(Path(FOLDER)).values() for one in found if one.path]


@pytest.mark.parametrize("sister", SISTERS, ids=lambda sister: sister.name)
def test_a_sister_is_what_its_training_wrote(sister: Training) -> None:
    assert sister.path is not None
    about = yaml.safe_load((sister.path / TRAINED).read_text())
    assert about["model"] == sister.model
    assert about["recipe"]["seed"] == int(sister.name.rpartition("-seed")[2])
    assert about["weights"] == content_hash(sister.path, CHECKPOINT_FILES)
    shipped = load_model(sister.model, sister.model).model.state_dict()
    loaded = load_model(sister.path, sister.name)
    own = loaded.model.state_dict()
    assert own.keys() == shipped.keys()
    assert not torch.equal(own["lm_head.weight"], shipped["lm_head.weight"])
    found = accuracy_by_skill(loaded, miniature.generate("validation", 100))
    right, asked = (sum(column) for column in zip(*found.values(), strict=True))
    assert right / asked > 0.6
