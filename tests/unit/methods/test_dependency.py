"""Dependency mining against distributions whose entropy is known, and equations written out."""

from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvlm.errors import UserError
from qvlm.methods.qvlm import dependency
from qvlm.methods.qvlm.dependency import (
    JOINTS,
    Activation,
    assignment,
    conditional_entropy,
    element_joint,
    entropy,
    lane,
    mine,
    quantization_error,
    token_histograms,
    token_joint,
)
from qvlm.quantization import (
    QuantizationConfig,
    QuantSpec,
    TokenQuantizer,
    UniformQuantizer,
    Walk,
    activation_quantizer,
)
from tests.helpers.toy import toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

CONFIG = QuantizationConfig(
    QuantSpec(4, "per_channel"),
    QuantSpec(4, "per_channel_group", 16),
    QuantSpec(3, "per_token"),
)
DECODER = "model.language_model.layers"


def grid(bits: int, scale: float, zero_point: int = 0) -> UniformQuantizer:
    return UniformQuantizer(bits, torch.tensor(scale), torch.tensor(float(zero_point)))


def equation_5(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """p(x = q_m) in double precision, a point at a time; scale and zero broadcast to x."""
    points = [scale * (m - zero) for m in range(2**bits)]
    exponents = np.stack([-((x - q) ** 2) / scale for q in points], -1)
    weights = np.exp(exponents - exponents.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def shannon(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


# --- entropy --------------------------------------------------------------------------------


def test_entropy_of_known_distributions_is_exact() -> None:
    def found(joint: list[list[float]] | np.ndarray) -> float:
        return float(conditional_entropy(torch.tensor(joint, dtype=torch.float64)))

    independent = np.outer([0.2, 0.8], [0.5, 0.25, 0.25])
    assert found(independent) == pytest.approx(1.5 * log(2), abs=1e-15)
    assert found(np.diag([0.1, 0.2, 0.7])) == pytest.approx(0, abs=1e-15)
    assert found(np.full((16, 16), 1 / 256)) == pytest.approx(log(16), abs=1e-14)
    # The second is a fair coin if the first is 0, and certain if it is 1.
    chain = np.array([[0.15, 0.15], [0.0, 0.7]])
    assert found(chain) == pytest.approx(0.3 * log(2), abs=1e-15)
    backwards = 0.85 * shannon(np.array([0.15, 0.7]) / 0.85)
    assert found(chain.T) == pytest.approx(backwards, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**30))
def test_conditional_entropy_is_joint_minus_first(rows: int, columns: int, seed: int) -> None:
    """H(second | first) = H(first, second) - H(first), between 0 and H(second); zeros are fine."""
    random = np.random.default_rng(seed)
    joint = random.random((rows, columns)) * (random.random((rows, columns)) < 0.7)
    joint[0, 0] += 0.1
    joint /= joint.sum()
    found = float(conditional_entropy(torch.from_numpy(joint)))
    assert found == pytest.approx(shannon(joint.ravel()) - shannon(joint.sum(1)), abs=1e-12)
    assert -1e-12 <= found <= shannon(joint.sum(0)) + 1e-12


# --- assignment -----------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token", "per_channel"])
@pytest.mark.parametrize("scale_free", [False, True])
def test_assignment_is_equation_5(granularity: str, scale_free: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 6).double() * torch.logspace(-1, 1, 6).double()
    bits = 3
    quantizer = activation_quantizer(x.float(), QuantSpec(bits, granularity))
    fixed = quantizer.for_tokens(x)
    assert isinstance(fixed, UniformQuantizer)
    scale, zero = numpy_of(fixed.scale), numpy_of(fixed.zero_point)
    # In units of the scale, x / s on a grid of distance 1: that is what being free of it means.
    expected = (
        equation_5(numpy_of(x) / scale, np.ones_like(scale), zero, bits)
        if scale_free
        else equation_5(numpy_of(x), scale, zero, bits)
    )
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        found = numpy_of(assignment(x.to(dtype), quantizer, scale_free))
        np.testing.assert_allclose(found, expected, atol=tolerance)
    assert expected.shape == (9, 6, 8)


def test_only_the_scale_free_assignment_keeps_when_the_unit_changes() -> None:
    x = torch.linspace(-3, 4, 50)[:, None].double()
    for scale_free, equal in ((True, True), (False, False)):
        one = assignment(x, grid(3, 1.0, 3), scale_free)
        ten = assignment(x * 8, grid(3, 8.0, 3), scale_free)
        assert torch.allclose(one, ten, atol=1e-12) == equal
    assert assignment(x * 8, grid(3, 8.0, 3)).amax(-1).mean() > one.amax(-1).mean()


def test_a_sharp_assignment_is_the_rounding() -> None:
    quantizer = grid(4, 1000.0, 5)
    x = (torch.arange(200) * 77.7 - 5500.0)[:, None]
    assert torch.equal(assignment(x, quantizer).argmax(-1), quantizer.quantize(x).long())
    off = (x / 1000 - (x / 1000).round()).abs() < 0.4
    assert assignment(x, quantizer).amax(-1)[off].min() > 0.999


@pytest.mark.parametrize("scale_free", [False, True])
def test_a_silent_channel_that_wakes_up_is_no_nan(scale_free: bool) -> None:
    seen = torch.randn(20, 3) * torch.tensor([1.0, 0.0, 2.0])
    quantizer = activation_quantizer(seen, QuantSpec(4, "per_channel"))
    x = torch.full((5, 3), 7.0, requires_grad=True)
    p = assignment(x, quantizer, scale_free)
    (gradient,) = torch.autograd.grad(p.square().sum(), x)
    assert bool(torch.isfinite(p).all()) and bool(torch.isfinite(gradient).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(5, 3))


def test_gradient_of_an_assignment_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    quantizer = activation_quantizer(x.float(), QuantSpec(3, "per_channel"))
    assert torch.autograd.gradcheck(lambda x: assignment(x, quantizer), x)
    assert torch.autograd.gradcheck(lambda x: assignment(x, quantizer, True), x)


@pytest.mark.parametrize("pairing", ["elements", "tokens"])
def test_gradient_of_an_entropy_is_that_of_finite_differences(pairing: str) -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(5, width, dtype=torch.float64) for width in (4, 6))
    grids = [grid(2, 0.9, 1), grid(3, 0.5, 4)]

    def value(first: Tensor, second: Tensor) -> Tensor:
        pair = [Activation(x, q) for x, q in zip((first, second), grids, strict=True)]
        return conditional_entropy(JOINTS[pairing](*pair))

    inputs = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(value, inputs)


def test_what_has_no_uniform_grid_is_refused() -> None:
    grouped = UniformQuantizer(4, torch.ones(2, 1), torch.zeros(2, 1), group_size=4)
    with pytest.raises(UserError, match="uniform"):
        assignment(torch.randn(3, 8), grouped)


# --- joints ---------------------------------------------------------------------------------


def sharp(codes: Tensor, bits: int) -> Activation:
    """An activation that sits on its rounding points, whose distance makes the softmax hard."""
    return Activation(codes.float() * 1000, grid(bits, 1000.0))


@pytest.mark.parametrize("pairing", ["elements", "tokens"])
def test_in_the_sharp_limit_a_dependency_is_that_of_the_codes(pairing: str) -> None:
    """One channel, so that both pairings are counts of codes: exact whatever the distribution."""
    random = torch.Generator().manual_seed(0)
    first = torch.randint(4, (5000, 1), generator=random)
    coin = torch.randint(2, (5000, 1), generator=random)
    measure = entropy(JOINTS[pairing])
    assert measure(sharp(first, 2), sharp(first, 2)) == pytest.approx(0, abs=1e-6)
    assert measure(sharp(first, 2), sharp(3 - first, 2)) == pytest.approx(0, abs=1e-6)
    # Known up to a coin: the entropy of the coin. The other way round nothing is left open.
    doubled = 2 * first + coin
    counts = np.bincount((8 * first + doubled).flatten().numpy(), minlength=32).reshape(4, 8)
    p = counts / counts.sum()
    found = measure(sharp(first, 2), sharp(doubled, 3))
    assert found == pytest.approx(shannon(p.ravel()) - shannon(p.sum(1)), abs=1e-5)
    assert found == pytest.approx(log(2), abs=1e-3)
    assert measure(sharp(doubled, 3), sharp(first, 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pairing", ["elements", "tokens"])
def test_of_independent_layers_everything_is_left_open(pairing: str) -> None:
    """Every pair of codes once, a pair per token: exactly independent, soft or sharp."""
    first, second = (
        torch.arange(4).repeat_interleave(8)[:, None],
        torch.arange(8).repeat(4)[:, None],
    )
    measure = entropy(JOINTS[pairing])
    assert measure(sharp(first, 2), sharp(second, 3)) == pytest.approx(log(8), abs=1e-5)
    soft = Activation(first * 0.3, grid(2, 0.3)), Activation(second * 0.2, grid(3, 0.2))
    histogram = numpy_of(token_histograms(soft[1].samples, soft[1].quantizer)).mean(0)
    assert measure(*soft) == pytest.approx(shannon(histogram), abs=1e-5)


def test_of_identical_soft_layers_the_softness_is_left_open() -> None:
    """Assignments know the value but not the draw: -sum p(m) p(n) log sum p(n | m)."""
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    quantizer = grid(2, 0.8, 1)
    p = equation_5(numpy_of(x), np.array(np.float32(0.8)), np.array(1.0), 2).reshape(-1, 4)
    joint = p.T @ p / len(p)
    expected = shannon(joint.ravel()) - shannon(joint.sum(1))
    activation = Activation(x, quantizer)
    found = entropy(element_joint)(activation, activation)
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0.1 < found < shannon(p.mean(0))
    # Averaging over channels forgets what belongs to what: nearly independent.
    assert entropy(token_joint)(activation, activation) > found


@pytest.mark.parametrize("widths", [(6, 6), (6, 4), (4, 12), (5, 3)])
def test_joints_are_their_definitions(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pair, p = [], []
    for width, bits in zip(widths, (3, 2), strict=True):
        x = torch.randn(7, width)
        quantizer = activation_quantizer(x, QuantSpec(bits, "per_token"))
        fixed = quantizer.for_tokens(x)
        assert isinstance(fixed, UniformQuantizer)
        scale, zero = numpy_of(fixed.scale), numpy_of(fixed.zero_point)
        pair.append(Activation(x, quantizer))
        p.append(equation_5(numpy_of(x), scale, zero, bits))
    by_element, by_token = np.zeros((8, 4)), np.zeros((8, 4))
    wide = max(widths)
    for token in range(7):
        for channel in range(wide):
            one, other = (channel * width // wide for width in widths)
            by_element += np.outer(p[0][token, one], p[1][token, other]) / (7 * wide)
        by_token += np.outer(p[0][token].mean(0), p[1][token].mean(0)) / 7
    np.testing.assert_allclose(numpy_of(element_joint(*pair)), by_element, atol=1e-6)
    np.testing.assert_allclose(numpy_of(token_joint(*pair)), by_token, atol=1e-6)


@pytest.mark.parametrize("piece", [1, 100, 700])
@pytest.mark.parametrize("granularity", ["per_token", "per_channel_group"])
def test_pieces_give_what_one_go_gives(
    piece: int, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    samples = torch.randn(23, 8), torch.randn(23, 4)
    spec = QuantSpec(3, granularity, 2)

    def measured() -> list[Tensor]:
        pair = [Activation(x, activation_quantizer(x, spec)) for x in samples]
        return [joint(*pair) for joint in JOINTS.values()]

    whole = measured()
    sizes = []

    def counting(x: Tensor, *rest: object) -> Tensor:
        sizes.append(x.numel() * 8)
        return assignment(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(dependency, "_PIECE", piece)
    monkeypatch.setattr(dependency, "assignment", counting)
    for one, other in zip(measured(), whole, strict=True):
        torch.testing.assert_close(one, other)
    assert max(sizes) <= max(piece, 8 * 8)  # no more than asked for, but a token at least


def test_the_other_proxy_is_the_mean_relative_error() -> None:
    torch.manual_seed(0)
    pair = [Activation(torch.randn(30, 8), grid(bits, 0.5, 2)) for bits in (2, 3)]
    errors = []
    for activation in pair:
        x = numpy_of(activation.samples)
        top = 2**activation.quantizer.bits - 1
        x_hat = (np.clip(np.rint(x / 0.5) + 2, 0, top) - 2) * 0.5
        errors.append(((x_hat - x) ** 2).sum() / (x**2).sum())
    assert quantization_error(*pair) == pytest.approx(sum(errors) / 2, rel=1e-5)


# --- mining ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["routed", "mixtral"])
def test_no_dependency_across_experts_or_without_tokens(text: str) -> None:
    walk = Walk(toy_llava(text, vision_layers=2), toy_batches(2), CONFIG)
    chains = {c.name: c for c in mine(walk, entropy(element_joint), "linear", 64)}
    assert list(chains) == walk.names
    chain = chains[f"{DECODER}.0"]
    pairs = dict(zip(pairwise(chain.units), chain.dependencies, strict=True))
    for (first, second), value in pairs.items():
        home = [name.rpartition(".")[0] if "experts" in name else "" for name in (first, second)]
        silent = text == "routed" and "experts.2." in second
        assert (value is None) == (home[0] != home[1] or silent)
        assert value is None or 0 <= value <= log(16)
    assert sum(value is None for value in pairs.values()) == (5 if text == "routed" else 4)
    for name, other in chains.items():
        if "experts" not in "".join(other.units):
            assert None not in other.dependencies
        assert other.part == ("vision" if "vision" in name else "language")
    assert not walk.uncalibrated  # looking quantizes nothing


def test_mining_measures_what_the_float_model_reads() -> None:
    """Each dependency again, from hooks on the whole model."""
    model, batches = toy_llava(vision_layers=2), toy_batches(2)
    walk = Walk(model, batches, CONFIG)
    chains = mine(walk, entropy(element_joint), "linear", 10**6)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(f"{chain.name}.{unit}").register_forward_pre_hook(
            lambda module, args, name=f"{chain.name}.{unit}": seen.setdefault(name, []).append(
                args[0].detach().flatten(0, -2)
            )
        )
        for chain in chains
        for unit in chain.units
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for chain in chains:
        spec = CONFIG.vision if chain.part == "vision" else CONFIG.language
        read = []
        for unit in chain.units:
            x = torch.cat(seen[f"{chain.name}.{unit}"])
            read.append(Activation(x, activation_quantizer(x, spec)))
        expected = [entropy(element_joint)(*pair) for pair in pairwise(read)]
        assert chain.dependencies == pytest.approx(expected, rel=1e-4)
        if chain.part == "vision":
            assert isinstance(read[0].quantizer, TokenQuantizer)


def test_whole_layers_form_a_chain_per_kind() -> None:
    walk = Walk(toy_llava("routed", decoder_layers=3), toy_batches(2), CONFIG)
    chains = mine(walk, entropy(element_joint), "layer", 64)
    assert [chain.name for chain in chains] == ["vision", "projector", "language"]
    assert [len(chain.units) for chain in chains] == [3, 1, 3]
    assert [name for chain in chains for name in chain.units] == walk.names
    reads = {block.name: next(iter(block.linear_inputs(64).values())) for block in walk.blocks()}
    for chain in chains:
        spec = CONFIG.vision if chain.part == "vision" else CONFIG.language
        layers = [
            Activation(reads[name], activation_quantizer(reads[name], spec)) for name in chain.units
        ]
        expected = [entropy(element_joint)(*pair) for pair in pairwise(layers)]
        assert chain.dependencies == pytest.approx(expected, rel=1e-6)


def test_a_part_that_no_token_reaches_has_no_dependency() -> None:
    walk = Walk(toy_llava(vision_layers=2), toy_batches(2, image=False), CONFIG)
    for granularity in ("linear", "layer"):
        for chain in mine(walk, entropy(element_joint), granularity, 64):
            language = DECODER in chain.units[0] or DECODER in chain.name
            assert (None in chain.dependencies) == (not language and len(chain.units) > 1)


def test_a_lane_is_the_innermost_parallel_module() -> None:
    walk = Walk(toy_llava("routed", vision_layers=2), toy_batches(1), CONFIG)
    block = next(b for b in walk.blocks() if b.name == f"{DECODER}.0")
    lanes = {name: lane(block, name) for name in block.linears}
    assert lanes["self_attn.q_proj"] == lanes["self_attn.o_proj"] == ""
    assert lanes["mlp.experts.1.up_proj"] == "mlp.experts.1"
    assert len(set(lanes.values())) == 4


def test_pairs_that_never_occur_have_no_gradient() -> None:
    joint = torch.zeros(4, 5)
    joint[0, 1], joint[0, 2], joint[2, 3] = 0.25, 0.25, 0.5
    joint.requires_grad_()
    entropy = conditional_entropy(joint)
    entropy.backward()
    assert entropy.item() == pytest.approx(0.5 * log(2), rel=1e-6)
    assert joint.grad is not None
    assert bool(torch.isfinite(joint.grad).all())
    assert bool((joint.grad[joint == 0] == 0).all())
