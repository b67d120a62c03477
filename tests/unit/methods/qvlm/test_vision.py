"""Visual encoder optimization: its loss written out, its gradients against finite differences."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.errors import RunError, UserError
from qvlm.methods.qvlm import vision_loss
from qvlm.methods.qvlm.dependency import JOINTS, Activation, conditional_entropy, element_joint
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.methods.qvlm.simulation import freeze, simulate, tower_layers, unwind
from qvlm.methods.qvlm.vision import computed_again, fine_tune, schedule, with_images
from qvlm.methods.qvlm.vision_loss import Reference, Tuning, jacobian_norms, loss_terms, reference
from qvlm.quantization import (
    QuantizationConfig,
    Quantizer,
    QuantLinear,
    QuantSpec,
    TokenQuantizer,
    UniformQuantizer,
    Walk,
    activation_quantizer,
)
from qvlm.validation import shown
from tests.helpers.toy import IMAGE_TOKEN, IMAGE_TOKENS, toy_batch, toy_batches, toy_llava

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

TOWER = "model.vision_tower.encoder.layers"
PROJECTOR = "model.multi_modal_projector"
EVERYTHING = Tuning(regression=0.7, entropy=0.3, error=1.3, eta=0.6)


def config(bits: int = 4, vision: str = "per_token") -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_channel", p=0.5),
        QuantSpec(bits, "per_channel_group", 16, p=0.5),
        QuantSpec(bits, vision, p=0.5),
    )


def build(seed: int = 0) -> nn.Module:
    return toy_llava(vision_layers=2, decoder_layers=1, seed=seed)


def double(model: nn.Module) -> nn.Module:
    """The model in double precision throughout: its own norms compute in single."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
    for module in model.modules():
        if not isinstance(module, Quantizer):
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.double()
    return model


def simulated(bits: int = 4, vision: str = "per_token") -> tuple[nn.Module, list[Reference]]:
    """A model quantized for fine-tuning, and what it made of `toy_batches(2)` before."""
    model = build()
    references = [reference(model, batch) for batch in toy_batches(2)]
    simulate(Walk(model, toy_batches(2), config(bits, vision)), SearchOptions())
    return model, references


def tower_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith(TOWER)}


@contextmanager
def only_tower(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Gradients for the tower's parameters only."""
    model.requires_grad_(False)
    parameters = list(tower_parameters(model).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield parameters
    for parameter in parameters:
        parameter.grad = None


# --- finite differences ---------------------------------------------------------------------


def agree(
    value: Any, parameters: list[nn.Parameter], gradients: list[Tensor], step: float, rel: float
) -> None:
    """Gradients against central differences of `value()` along their own and random directions."""
    random = torch.Generator().manual_seed(0)
    norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert norm > 0
    directions = [[g.double() / norm for g in gradients]]
    for _ in range(3):
        noise = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in parameters]
        length = sum(float(n.square().sum()) for n in noise) ** 0.5
        directions.append([n / length for n in noise])
    for direction in directions:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, part in zip(parameters, direction, strict=True):
                    parameter += sign * step * part
                ends.append(float(value()))
                for parameter, part in zip(parameters, direction, strict=True):
                    parameter -= sign * step * part
        difference = (ends[0] - ends[1]) / (2 * step)
        slope = sum(
            float((g.double() * d).sum()) for g, d in zip(gradients, direction, strict=True)
        )
        assert difference == pytest.approx(slope, abs=rel * norm)


@pytest.mark.parametrize(
    ("term", "pairing"),
    [
        ("regression", "elements"),
        ("error", "elements"),
        ("entropy", "elements"),
        ("entropy", "tokens"),
        ("total", "tokens"),
    ],
)
def test_gradients_without_rounding_are_those_of_finite_differences(
    term: str, pairing: str
) -> None:
    """Float linears in double precision: the loss is smooth, and L_ent has fixed grids."""
    model, batch = double(build()), toy_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    target = reference(double(build(seed=1)), batch)
    names = [f"{TOWER}.0.self_attn.out_proj", f"{TOWER}.0.mlp.fc1", f"{TOWER}.0.mlp.fc2"]
    layers, jacobians = {}, dict(zip(names, (0.5, 0.2, 0.3), strict=True))
    for name in names:
        width = model.get_submodule(name).in_features
        layers[name] = (
            model.get_submodule(name),
            activation_quantizer(torch.randn(50, width), QuantSpec(3, "per_channel")),
        )

    def value() -> Tensor:
        terms = loss_terms(model, batch, target, layers, jacobians, JOINTS[pairing], EVERYTHING)
        return getattr(terms, term)

    with only_tower(model) as parameters:
        found = torch.autograd.grad(value(), parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        agree(value, parameters, gradients, step=1e-5, rel=1e-6)


class Linearised(Quantizer):
    """Q(x) near the x of the first call: x plus what rounding added there, constant if clamped."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.bits)
        self.quantizer = quantizer
        self.grid: UniformQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            grid = self.quantizer.for_tokens(x)
            assert isinstance(grid, UniformQuantizer)
            steps = (x.detach().float() / grid.scale).round()
            self.inside = (steps >= grid.lowest) & (steps <= grid.highest)
            self.rest = (grid(x.detach()) - x.detach() * self.inside).double()
            self.grid = grid
            return grid(x)
        return x * self.inside + self.rest

    def for_tokens(self, x: Tensor) -> UniformQuantizer:
        """The grid of the first call; for the same tokens, flattened."""
        assert self.grid is not None
        ends = self.grid.scale.reshape(-1, 1), self.grid.zero_point.reshape(-1, 1)
        return UniformQuantizer(self.bits, *ends)

    def quantize(self, x: Tensor) -> Tensor:
        return self.quantizer.quantize(x)

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.quantizer.dequantize(codes)

    def group_index(self, x: Tensor) -> Tensor:
        return self.quantizer.group_index(x)


def test_straight_through_gradients_are_those_of_the_linearised_rounding() -> None:
    """The whole loss, with simulated quantization everywhere, against finite differences."""
    model, references = simulated(bits=3)
    batch, target = toy_batches(2)[0], references[0]
    layers = tower_layers(model)
    jacobians = dict.fromkeys(layers, 1 / len(layers))
    with only_tower(model) as parameters:
        terms = loss_terms(model, batch, target, layers, jacobians, element_joint, EVERYTHING)
        found = torch.autograd.grad(terms.total, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
    smooth = copy.deepcopy(model)
    for module in smooth.modules():
        if isinstance(module, QuantLinear):
            module.input_quantizer = Linearised(module.input_quantizer)
            if module.float_weight is not None:
                module.weight_quantizer = Linearised(module.weight_quantizer)
    with torch.no_grad():
        smooth(**batch)  # where rounding is linearised
    double(smooth)
    batch = {**batch, "pixel_values": batch["pixel_values"].double()}
    kept = Reference(target.vision.double(), target.final.double(), target.trust.double())
    smooth_layers = tower_layers(smooth)

    def value() -> Tensor:
        return loss_terms(
            smooth, batch, kept, smooth_layers, jacobians, element_joint, EVERYTHING
        ).total

    with torch.no_grad():
        assert float(value()) == pytest.approx(terms.total.item(), rel=1e-4)
    with only_tower(smooth) as parameters:
        agree(value, parameters, gradients, step=1e-5, rel=1e-3)


# --- the loss -------------------------------------------------------------------------------


def test_the_loss_is_equation_10() -> None:
    """Every term again, from hooks and written out."""
    model, references = simulated()
    batch = toy_batches(2)[0]
    layers = tower_layers(model)
    jacobians = {name: float(index) for index, name in enumerate(layers)}
    seen: dict[str, Tensor] = {}
    watched = [PROJECTOR, "lm_head", *layers]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0])
        )
        for name in watched
    ]
    with torch.no_grad():
        logits = model(**batch).logits.double()
        for hook in hooks:
            hook.remove()
        terms = loss_terms(
            model, batch, references[0], layers, jacobians, element_joint, EVERYTHING
        )

        ids, exact = batch["input_ids"], build()
        chances = exact(**batch).logits.double().softmax(-1)
        losses, weights = [], []
        for row in range(len(ids)):
            for position in range(ids.shape[1] - 1):
                following = ids[row, position + 1]
                losses.append(-logits[row, position].log_softmax(-1)[following])
                counts = following != IMAGE_TOKEN
                weights.append(chances[row, position, following] * counts)
        weight = torch.stack(weights)
        regression = float((torch.stack(losses) * weight).sum() / weight.sum())
        assert int((weight > 0).sum()) == len(ids) * (ids.shape[1] - IMAGE_TOKENS)

        # In the order of execution, without the layer whose weight is zero.
        names = [name for name in seen if jacobians.get(name)]
        entropy = 0.0
        for first, second in pairwise(names):
            pair = [
                Activation(seen[name].flatten(0, 1), TokenQuantizer(4, layers[name][1].ratio))
                for name in (first, second)
            ]
            entropy += jacobians[first] * float(conditional_entropy(element_joint(*pair)))

        error = 0.0
        for name, share in ((PROJECTOR, 1.0), ("lm_head", EVERYTHING.eta)):
            clean: list[Tensor] = []
            hook = exact.get_submodule(name).register_forward_pre_hook(
                lambda module, args, clean=clean: clean.append(args[0])
            )
            exact(**batch)
            hook.remove()
            apart = (seen[name] - clean[0]).flatten(1).norm(dim=1) / clean[0].flatten(1).norm(dim=1)
            error += share * float(apart.mean())
    assert terms.regression.item() == pytest.approx(regression, rel=1e-4)
    assert terms.entropy.item() == pytest.approx(entropy, rel=1e-4)
    assert terms.error.item() == pytest.approx(error, rel=1e-4)
    assert min(regression, entropy, error) > 0.01
    total = 0.7 * regression + 0.3 * entropy + 1.3 * error
    assert terms.total.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("alone", ["regression", "entropy", "error"])
def test_a_term_without_weight_is_not_there(alone: str) -> None:
    model, references = simulated()
    tuning = Tuning(**{**dict.fromkeys(("regression", "entropy", "error"), 0.0), alone: 2.0})
    layers = tower_layers(model)
    jacobians = dict.fromkeys(layers, 1.0)
    with torch.no_grad():
        terms = loss_terms(
            model, toy_batch(), references[0], layers, jacobians, element_joint, tuning
        )
    for name in ("regression", "entropy", "error"):
        assert (getattr(terms, name).item() > 0) == (name == alone)
    assert terms.total.item() == pytest.approx(2 * getattr(terms, alone).item())


def test_labels_say_where_the_answer_is() -> None:
    model, batch = build(), toy_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    batch["labels"] = labels
    target = reference(model, batch)
    assert target.trust.sum() == 2 * len(labels) and bool((target.trust[:, -2:] == 1).all())
    with torch.no_grad():
        terms = loss_terms(model, batch, target, {}, {}, element_joint, Tuning(entropy=0))
        logits = model(**{key: x for key, x in batch.items() if key != "labels"}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert terms.regression.item() == pytest.approx(float(expected), rel=1e-5)
    assert terms.error.item() == pytest.approx(0, abs=1e-6)


def test_few_tokens_are_enough_for_an_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different width give the same tokens to their joint."""
    model, references = simulated()
    layers = tower_layers(model)
    seen = []

    def noting(first: Activation, second: Activation) -> Tensor:
        seen.append((len(first.samples), len(second.samples)))
        return element_joint(first, second)

    monkeypatch.setattr(vision_loss, "_PIECE", 5 * 64 * 16)
    with torch.no_grad():
        loss_terms(
            model, toy_batch(), references[0], layers, dict.fromkeys(layers, 1.0), noting, Tuning()
        )
    assert set(seen) == {(5, 5)} and len(seen) == len(layers) - 1


# --- the Jacobian ---------------------------------------------------------------------------


def test_jacobian_norms_are_those_of_gradients_and_finite_differences() -> None:
    """J_k of eq. 8 for float layers in double precision; the last layer is not on the way."""
    model, batches = double(build()), toy_batches(2)
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].double()
    references = [reference(double(build(seed=1)), batch) for batch in batches]
    names = [f"{TOWER}.0.self_attn.out_proj", f"{TOWER}.0.mlp.fc1", f"{TOWER}.0.mlp.fc2"]
    names.append(f"{TOWER}.1.mlp.fc1")  # features come from layer -2
    spec = UniformQuantizer(4, torch.ones(()), torch.zeros(()))
    layers = {name: (model.get_submodule(name), spec) for name in names}
    with only_tower(model):
        found = jacobian_norms(model, batches, references, layers)

    def distance(name: str, index: int, shift: Tensor | None) -> Tensor:
        """Sum over rows of the relative error of what the head reads, with a shifted input."""
        final: list[Tensor] = []
        hooks = [
            model.lm_head.register_forward_pre_hook(lambda module, args: final.append(args[0])),
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args: None if shift is None else (args[0] + shift,)
            ),
        ]
        model(**batches[index])
        for hook in hooks:
            hook.remove()
        target = references[index].final.flatten(1)
        return ((final[0].flatten(1) - target).norm(dim=1) / target.norm(dim=1)).sum()

    squares = dict.fromkeys(names, 0.0)
    model.requires_grad_(False)
    for name in names[:3]:
        width = model.get_submodule(name).in_features
        for index, batch in enumerate(batches):
            rows = len(batch["pixel_values"])
            shift = torch.zeros(rows, IMAGE_TOKENS + 1, width, dtype=torch.float64)
            shift.requires_grad_()
            (gradient,) = torch.autograd.grad(distance(name, index, shift), shift)
            length = gradient.norm()
            with torch.no_grad():
                ends = [distance(name, index, s * 1e-5 * gradient / length) for s in (1, -1)]
            assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(length), rel=1e-5)
            squares[name] += float(length) ** 2
    norms = {name: square**0.5 for name, square in squares.items()}
    total = sum(norms.values())
    assert found == pytest.approx({name: norm / total for name, norm in norms.items()}, rel=1e-6)
    assert found[names[-1]] == 0 and sum(found.values()) == pytest.approx(1)


def test_without_an_error_or_without_layers_no_layer_has_weight() -> None:
    model, batch = build(), toy_batch()
    target = reference(model, batch)
    layer = model.get_submodule(f"{TOWER}.0.mlp.fc1")
    quantizer = UniformQuantizer(4, torch.ones(()), torch.zeros(()))
    with torch.enable_grad():
        assert jacobian_norms(model, [batch], [target], {"fc1": (layer, quantizer)}) == {"fc1": 0}
        assert jacobian_norms(model, [batch], [target], {}) == {}


# --- fine-tuning ----------------------------------------------------------------------------


def tune(model: nn.Module, references: list[Reference], **options: Any) -> dict[str, Any]:
    tuning = Tuning(**{"epochs": 2, "batch_size": 2, "learning_rate": 1e-3, **options})
    layers = tower_layers(model)
    return fine_tune(model, toy_batches(2), references, layers, element_joint, tuning)


def test_fine_tuning_lowers_the_loss_and_changes_the_tower_only() -> None:
    model, references = simulated()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    record = tune(model, references, epochs=6)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (record["pairs"], record["steps"]) == (4, 12)
    losses = record["losses"]
    assert len(losses) == 6 and losses[-1]["total"] < 0.99 * losses[0]["total"]
    for epoch in losses:
        assert min(epoch.values()) > 0
        weighed = epoch["regression"] + 0.1 * epoch["entropy"] + epoch["error"]
        assert epoch["total"] == pytest.approx(weighed, rel=1e-5)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(key.startswith(TOWER) for key in changed)
    # Weights, biases and norms of the layer that the features come from; not the grids, nor the
    # last layer, which nothing reads.
    kinds = ("float_weight", "bias", "norm1.weight", "norm2.bias")
    assert all(any(key.endswith(kind) for key in changed) for kind in kinds)
    assert not any("scale" in key or "zero_point" in key for key in changed)
    assert not any(key.startswith(f"{TOWER}.1.") for key in changed)


@pytest.mark.parametrize("alone", ["regression", "entropy", "error"])
def test_each_term_can_be_lowered(alone: str) -> None:
    model, references = simulated()
    weights = {**dict.fromkeys(("regression", "entropy", "error"), 0.0), alone: 1.0}
    losses = tune(model, references, epochs=6, **weights)["losses"]
    assert losses[-1][alone] < losses[0][alone]


def test_twice_gives_the_same_weights_and_the_seed_the_order() -> None:
    weights = []
    for seed in (0, 0, 1):
        model, references = simulated()
        tune(model, references, seed=seed)
        weights.append(model.get_submodule(f"{TOWER}.0.mlp.fc2").float_weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_batches_make_steps_of_the_size_asked_for() -> None:
    sizes = [3, 1, 2, 4, 1]
    steps = schedule(sizes, Tuning(epochs=3, batch_size=4))
    for epoch in range(3):
        own = [step for number, step in steps if number == epoch]
        assert sorted(index for step in own for index in step) == list(range(5))
        pairs = [sum(sizes[index] for index in step) for step in own]
        assert all(count >= 4 for count in pairs[:-1])
        assert all(sum(sizes[index] for index in step[:-1]) < 4 for step in own)
    assert len({str(step) for _, step in steps}) > len(steps) / 3  # not one order for all


def test_layers_that_are_computed_again_change_no_bit_and_keep_less() -> None:
    tuned, kept = [], []
    for checkpointing in (False, True):
        model, references = simulated()
        tune(model, references, checkpointing=checkpointing)
        tuned.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert "forward" not in model.get_submodule(f"{TOWER}.0").__dict__
        kept.append(bytes_kept(model, references[0], checkpointing))
    for name, tensor in tuned[0].items():
        assert torch.equal(tensor, tuned[1][name]), name
    assert kept[1] < kept[0] / 3


def bytes_kept(model: nn.Module, kept: Reference, checkpointing: bool) -> int:
    """Bytes that one backward pass through the model finds in memory, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    with only_tower(model), computed_again(model, checkpointing):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tuning = Tuning(entropy=0.0)
            terms = loss_terms(model, toy_batch(), kept, {}, {}, element_joint, tuning)
        terms.total.backward()
    return sum(size for address, size in sizes.items() if address not in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_is_tuned_in_copies_of_the_tower(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    batches = [
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in one.items()}
        for one in toy_batches(2)
    ]
    references = [reference(model, batch) for batch in batches]
    floats = simulate(Walk(model, batches, config()), SearchOptions())
    decoder = model.get_submodule("model.language_model.layers.0.mlp.down_proj")
    assert decoder.weight.dtype == torch.bfloat16
    assert model.get_submodule(f"{TOWER}.0.mlp.fc1").float_weight.dtype == torch.float32
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning = Tuning(epochs=8, learning_rate=1e-3)
    found = fine_tune(model, batches, references, tower_layers(model), JOINTS["elements"], tuning)
    losses = [epoch["total"] for epoch in found["losses"]]
    assert losses[-1] < losses[0]
    assert sum(found["jacobian_norms"].values()) == pytest.approx(1)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed
    assert all(name.startswith(TOWER) for name in changed)
    unwind(model, floats)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    model, references = simulated()
    references[0].vision.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        tune(model, references)


def test_a_tower_in_half_precision_is_refused() -> None:
    model = build()
    references = [reference(model, batch) for batch in toy_batches(2)]
    model.model.vision_tower.half()
    with pytest.raises(UserError, match=r"^method\.veo=true .*float32"):
        tune(model, references)


# --- simulation and back --------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_token", "per_channel"])
def test_unwinding_gives_the_float_model_with_the_tuned_tower(granularity: str) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    walk = Walk(model, toy_batches(2), config(4, granularity))
    floats = simulate(walk, SearchOptions())
    quantized = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(floats) == quantized
    layer = model.get_submodule(f"{TOWER}.0.mlp.fc1")
    with torch.no_grad():
        layer.float_weight *= 2
        layer.bias += 1
    unwind(model, floats)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key == f"{TOWER}.0.mlp.fc1.weight":
            value = 2 * value
        if key == f"{TOWER}.0.mlp.fc1.bias":
            value = value + 1
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7)


def test_freezing_rounds_what_was_tuned() -> None:
    model, references = simulated()
    tune(model, references)
    with torch.no_grad():
        before = model(**toy_batch(seed=5)).logits
        freeze(model)
        assert torch.equal(model(**toy_batch(seed=5)).logits, before)
    layer = model.get_submodule(f"{TOWER}.0.mlp.fc1")
    assert layer.float_weight is None
    assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.weight)


# --- what is refused ------------------------------------------------------------------------


def test_a_calibration_set_without_images_is_refused() -> None:
    assert len(with_images(toy_batches(3))) == 2
    with pytest.raises(UserError, match=r"^method\.veo=true .*no image\. Choose"):
        with_images(toy_batches(3, image=False))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("epochs", 0, "a whole number of at least 1"),
        ("epochs", 2.5, "a whole number of at least 1"),
        ("batch_size", -1, "a whole number of at least 1"),
        ("batch_size", True, "a whole number of at least 1"),
        ("learning_rate", float("nan"), "a finite number of at least 0"),
        ("learning_rate", "1e-4", "a finite number of at least 0"),
        ("regression", -0.1, "a finite number of at least 0"),
        ("entropy", float("inf"), "a finite number of at least 0"),
        ("error", None, "a finite number of at least 0"),
        ("eta", False, "a finite number of at least 0"),
    ],
)
def test_impossible_tuning_is_refused(option: str, value: Any, expected: str) -> None:
    with pytest.raises(
        UserError, match=rf"^method\.veo_{option}={shown(value)} is not {expected}\.$"
    ):
        Tuning(**{option: value})
    with pytest.raises(UserError, match=r"^method\.seed=-1 is not a whole number of at least 0\.$"):
        Tuning(seed=-1)
