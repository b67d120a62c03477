"""The joint search against brute force over quantized linears built here, and layer-wise search."""

import itertools
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvlm.errors import RunError, UserError
from qvlm.methods.objective import output_error
from qvlm.methods.qvlm.search import minimize, search_block, unsearched
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.methods.qvlm.trial import Trial
from qvlm.quantization import (
    Block,
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    TokenQuantizer,
    Walk,
    activation_quantizer,
    folded_weight,
    mse,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.hooks import hooked
from qvlm.quantization.ranges import RangeEstimator
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

VISION = "model.vision_tower.encoder.layers.0"
DECODER = "model.language_model.layers.0"
GRID = (1.0, 0.985, 0.97)
MIXED = (0.9, 1.0, 0.97)
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

Run = Sequence[Sequence[str]]


def config(language: str = "per_channel_group") -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(3, "per_group", 16), QuantSpec(3, language, 16), QuantSpec(3, "per_token")
    )


def get_block(name: str, text: str = "llama", language: str = "per_channel_group") -> Block:
    """A block of the float model with whatever comes before it in floating point."""
    walk = Walk(toy_llava(text, vision_layers=2), toy_batches(2), config(language))
    return next(block for block in walk.blocks() if block.name == name)


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


# --- the oracle -----------------------------------------------------------------------------


def rule(p: float, clip: str) -> RangeEstimator | None:
    if p == 1 or clip == "percentile":
        return None if p == 1 else percentile(p)

    def tighter(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        ends = mse(groups, spec), percentile(p)(groups, spec)
        (low, high), (lower, higher) = ends
        return low.maximum(lower), high.minimum(higher)

    return tighter


def quantized(block: Block, name: str, x: Tensor, p: float, search: SearchOptions) -> QuantLinear:
    """A linear that saw x, whose input and weight ranges are those of a percentile."""
    linear = block.linears[name]
    weights, activations = block.spec(name)
    inputs = activation_quantizer(x, activations, rule(p, search.clip))
    weight = folded_weight(linear.weight, inputs)
    how = rule(p, search.clip) if search.clip_weights else None
    return QuantLinear.from_linear(linear, weight_quantizer(weight, weights, how, inputs), inputs)


def observe(block: Block, layers: dict[str, nn.Module], names: Sequence[str]) -> list[Tensor]:
    """Outputs of the block with these layers, for a while: its own, or those of its linears."""
    for name in block.linears:
        put(block.module, name, layers.get(name, block.linears[name]))
    seen: list[Tensor] = []
    hooks = [
        block.module.get_submodule(name).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        for name in names
    ]
    outputs = block.run()
    for hook in hooks:
        hook.remove()
    for name in block.linears:
        block.restore(name)
    return seen if names else outputs


def error_of(ours: list[Tensor], exact: list[Tensor], normalize: bool) -> float:
    """Mean over tokens of the squared error, or of its share of the token's energy."""
    shares = []
    for output, target in zip(ours, exact, strict=True):
        x, y = (np.asarray(t.double()).reshape(-1, t.shape[-1]) for t in (output, target))
        energy = (y**2).sum(1) if normalize else 1.0
        shares.append(((x - y) ** 2).sum(1) / energy)
    return float(np.concatenate(shares).mean())


class Brute:
    """All settings of a run of a block, one by one, the runs before already chosen."""

    def __init__(self, block: Block, search: SearchOptions) -> None:
        self.block, self.search = block, search
        self.samples, self.exact = block.linear_inputs(), block.run()
        self.layers = {
            (name, p): quantized(block, name, x, p, search)
            for name, x in self.samples.items()
            for p in search.percentiles
            if len(x)
        }
        self.chosen: dict[str, nn.Module] = {}

    def error(self, run: Run, choice: Sequence[float], first: int = 0) -> float:
        """Of the first layers of a run; those from `first` on are what is compared with float."""
        layers = dict(self.chosen)
        before = dict(self.chosen)
        for index, (unit, p) in enumerate(zip(run, choice, strict=False)):
            for name in unit:
                layers[name] = self.layers[name, p]
                if index < first:
                    before[name] = self.layers[name, p]
        if self.search.output == "layer":
            return error_of(observe(self.block, layers, []), self.exact, self.search.normalize)
        named = [name for unit in run[first : len(choice)] for name in unit]
        last = self.samples[named[-1]]
        named = [name for name in named if torch.equal(self.samples[name], last)]
        ours, exact = (observe(self.block, which, named) for which in (layers, before))
        return error_of(ours, exact, self.search.normalize)

    def layerwise(self, run: Run) -> tuple[float, ...]:
        choice: tuple[float, ...] = ()
        for unit in range(len(run)):
            options = [(*choice, p) for p in self.search.percentiles]
            choice = min(options, key=lambda option: self.error(run, option, unit))
        return choice

    def jointly(self, run: Run) -> tuple[float, ...]:
        options = itertools.product(self.search.percentiles, repeat=len(run))
        return min(options, key=lambda option: self.error(run, option))

    def keep(self, run: Run, choice: Sequence[float]) -> None:
        for unit, p in zip(run, choice, strict=True):
            self.chosen |= {name: self.layers[name, p] for name in unit}


# --- the search -----------------------------------------------------------------------------

TOWER = [
    [["self_attn.q_proj"], ["self_attn.k_proj"], ["self_attn.v_proj"]],
    [["self_attn.out_proj"], ["mlp.fc1"], ["mlp.fc2"]],
]
LLAMA = [[ATTENTION, ["self_attn.o_proj"]], [[name] for name in MLP]]
EXPERTS = [
    [[*ATTENTION, "self_attn.o_proj"]],
    *([[f"mlp.experts.{expert}.{name[4:]}"] for name in MLP] for expert in range(3)),
]


@pytest.mark.parametrize(
    ("name", "text", "language", "runs", "options"),
    [
        (VISION, "llama", "per_token", TOWER, {}),
        (
            VISION,
            "llama",
            "per_token",
            TOWER,
            {"output": "block", "normalize": False, "percentiles": MIXED},
        ),
        (VISION, "llama", "per_token", TOWER, {"clip": "further"}),
        (DECODER, "llama", "per_channel_group", LLAMA, {"normalize": False}),
        (DECODER, "llama", "per_channel", LLAMA, {"clip_weights": False, "output": "block"}),
        (DECODER, "routed", "per_channel_group", EXPERTS, {"output": "block"}),
        (DECODER, "routed", "per_channel_group", EXPERTS, {"percentiles": MIXED}),
    ],
)
def test_the_search_is_brute_force(
    name: str, text: str, language: str, runs: list[Run], options: dict[str, Any]
) -> None:
    search = SearchOptions(**{"percentiles": GRID, **options})
    block = get_block(name, text, language)
    brute = Brute(block, search)
    expected = []
    for run in runs:
        if len(brute.samples[run[0][0]]):
            start = (search.percentiles[0],) * len(run)
            best = brute.jointly(run)
            settings = best, brute.layerwise(run), start
            expected.append((run, best, [brute.error(run, choice) for choice in settings]))
            brute.keep(run, best)
    found = search_block(block, runs, search)
    assert len(found) == len(expected)
    for result, (run, percentiles, errors) in zip(found, expected, strict=True):
        assert result.units == tuple(tuple(unit) for unit in run)
        assert result.percentiles == percentiles
        measured = [result.error, result.layerwise_error, result.start_error]
        assert measured == pytest.approx(errors, rel=1e-4)
        assert result.error <= min(result.layerwise_error, result.start_error)
    for linear, layer in brute.chosen.items():
        ours = block.module.get_submodule(linear)
        assert isinstance(ours, QuantLinear) and isinstance(layer, QuantLinear)
        assert torch.equal(ours.weight_codes(), layer.weight_codes())
        assert ours.layer_name == f"{name}.{linear}"
    assert len({p for _, best, _ in expected for p in best}) > 1  # the grid is a real choice


def test_joint_search_beats_layer_wise_search_on_the_output_of_the_block() -> None:
    """Measured on the blocks that both leave, exhaustively and by coordinate descent."""
    search = SearchOptions(percentiles=(1.0, 0.9))
    target = get_block(VISION).run()
    errors = {}
    for name, joint, exhaustive in (("layer", False, 64), ("all", True, 64), ("some", True, 1)):
        block = get_block(VISION)
        units = [[linear] for linear in block.linears]
        runs = [units] if joint else [[unit] for unit in units]
        found = search_block(block, runs, SearchOptions(search.percentiles, exhaustive=exhaustive))
        errors[name] = error_of(block.run(), target, normalize=True)
        assert found[-1].error == pytest.approx(errors[name], rel=1e-4)
        if joint:
            assert found[0].layerwise_error == pytest.approx(errors["layer"], rel=1e-4)
    assert errors["all"] <= errors["some"] <= errors["layer"]
    assert errors["all"] < 0.999 * errors["layer"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**30), st.data())
def test_minimize_finds_the_least_or_descends(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    table = np.random.default_rng(seed).integers(0, 9, sizes)
    start = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)

    def error(choice: Any, bound: float = inf) -> float:
        return value if (value := float(table[choice])) <= bound else inf

    best = minimize(error, sizes, start, exhaustive=table.size)
    assert best == tuple(np.unravel_index(table.argmin(), table.shape))  # the first of equal ones
    found = minimize(error, sizes, start, exhaustive=table.size - 1)
    assert error(found) <= error(start)
    for position, size in enumerate(sizes):
        neighbors = [(*found[:position], i, *found[position + 1 :]) for i in range(size)]
        assert error(found) == min(map(error, neighbors))


def test_candidates_are_counted_once_each() -> None:
    """Layer-wise 3 + 3 + 3, all 27 jointly; the last layer-wise ones are among those."""
    found = search_block(get_block(VISION), TOWER, SearchOptions(GRID))
    assert [result.candidates for result in found] == [3 + 3 + 27] * 2
    # On a narrower output the third has its own reference.
    found = search_block(get_block(VISION), TOWER, SearchOptions(GRID, output="block"))
    assert found[1].candidates == 3 + 3 + 3 + 27


@pytest.mark.parametrize("normalize", [False, True])
def test_the_error_is_per_token(normalize: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 5, 4), torch.randn(1, 3, 4)]
    exact[0][0, 0] *= 1000
    ours = [x + 0.1 * torch.randn_like(x) * x.norm(dim=-1, keepdim=True) for x in exact]
    error = output_error(ours, exact, normalize)
    assert error == pytest.approx(error_of(ours, exact, normalize), rel=1e-5)
    loud = output_error([ours[0][:1, :1]], [exact[0][:1, :1]], normalize) / 13
    assert (loud / error > 0.99) == (not normalize)  # one token of huge norm is everything, or not


@pytest.mark.parametrize("normalize", [False, True])
def test_a_hopeless_candidate_is_not_run_to_the_end(normalize: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 5, 4) for _ in range(3)]
    ours = [x + torch.randn_like(x) for x in exact]
    error = output_error(ours, exact, normalize)
    assert output_error(ours, exact, normalize, bound=error) == error  # as good as the best: counts
    asked = iter(ours)
    assert output_error(asked, exact, normalize, bound=error / 100) == inf
    assert len(list(asked)) == 2


def test_few_tokens_mean_few_batches() -> None:
    block = get_block(DECODER)
    runs = [[[linear]] for linear in block.linears]
    brute = Brute(block, SearchOptions((1.0,)))
    for linear in block.linears:
        brute.keep([[linear]], (1.0,))
    ours, exact = observe(block, brute.chosen, []), block.run()
    each = [error_of([a], [b], True) for a, b in zip(ours, exact, strict=True)]
    found = search_block(block, runs, SearchOptions((1.0,), tokens=1))
    assert found[-1].error == pytest.approx(each[0], rel=1e-4)
    assert each[0] != pytest.approx(each[1], rel=1e-3)


# --- experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["routed", "mixtral"])
def test_an_expert_is_searched_with_the_tokens_routed_to_it(text: str) -> None:
    model, batches = toy_llava(text, vision_layers=2), toy_batches(2)
    walk = Walk(model, batches, config())
    seen: dict[str, list[Tensor]] = {}
    name = "mlp.experts.1.gate_proj"
    hook = model.get_submodule(f"{DECODER}.{name}").register_forward_pre_hook(
        lambda module, args: seen.setdefault(name, []).append(args[0])
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    tokens = torch.cat(seen[name])
    everyone = sum(batch["input_ids"].numel() for batch in batches)
    assert 0 < len(tokens) < everyone
    block = next(block for block in walk.blocks() if block.name == DECODER)
    search_block(block, [[[linear] for linear in block.linears]], SearchOptions((0.9,)))
    layer = block.module.get_submodule(name)
    expected = activation_quantizer(tokens, config().language, percentile(0.9))
    assert isinstance(layer, QuantLinear)
    torch.testing.assert_close(layer.input_quantizer.scale, expected.scale)
    assert len(walk.uncalibrated) == (3 if text == "routed" else 0)


def test_an_expert_without_search_tokens_is_not_searched_and_named() -> None:
    """Experts that read tokens in some call, but in none of those that errors are measured on."""
    batches = [toy_batch(rows=1, words=1, image=False, seed=seed) for seed in range(8)]
    walk = Walk(toy_llava("mixtral", vision_layers=2), batches, config())
    block = next(block for block in walk.blocks() if block.name == DECODER)
    samples = block.linear_inputs()
    read: set[str] = set()
    experts = {name: block.module.get_submodule(name) for name in block.linears}
    hooks = [
        linear.register_forward_pre_hook(lambda module, args, name=name: read.add(name))
        for name, linear in experts.items()
    ]
    block.run(calls=block.inputs[:1])
    for hook in hooks:
        hook.remove()
    silent = [name for name in block.linears if len(samples[name]) and name not in read]
    assert silent
    options = SearchOptions((0.9, 1.0), output="block", tokens=1)
    found = search_block(block, [[[name]] for name in block.linears], options)
    assert all(result.error > 0 for result in found)
    missing = unsearched(block, found)
    assert missing == [block.layer_name(name) for name in block.linears if name not in read]
    for name in silent:
        layer = block.module.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        expected = activation_quantizer(samples[name], config().language, percentile(0.9))
        torch.testing.assert_close(layer.input_quantizer.scale, expected.scale)


def test_an_expert_without_tokens_falls_back_and_is_named() -> None:
    model = toy_llava("routed", vision_layers=2)
    walk = Walk(model, toy_batches(2), config())
    block = next(block for block in walk.blocks() if block.name == DECODER)
    weights = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
    found = search_block(block, EXPERTS, SearchOptions((0.9, 0.8)))
    assert [result.units[0][0] for result in found] == [run[0][0] for run in EXPERTS[:-1]]
    silent = [name for (name,) in EXPERTS[-1]]
    assert walk.uncalibrated == [f"{DECODER}.{name}" for name in silent]
    for name in silent:
        layer = block.module.get_submodule(name)
        assert isinstance(layer, QuantLinear) and isinstance(layer.input_quantizer, TokenQuantizer)
        spec = config().weight
        assert torch.equal(layer.weight, weight_quantizer(weights[name], spec)(weights[name]))


# --- what it leaves and what it refuses -----------------------------------------------------


def test_a_searched_block_can_stay_trainable() -> None:
    blocks = [get_block(VISION, language="per_channel") for _ in range(2)]
    for block, keep in zip(blocks, (False, True), strict=True):
        search_block(block, TOWER, SearchOptions(GRID), keep_float=keep)
    for name in blocks[0].linears:
        frozen, kept = (block.module.get_submodule(name) for block in blocks)
        assert isinstance(frozen, QuantLinear) and isinstance(kept, QuantLinear)
        assert frozen.float_weight is None and kept.float_weight is not None
        assert torch.equal(frozen.weight_codes(), kept.weight_codes())


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([TOWER[0]], "mlp.fc1 is missing or unknown"),
        ([*TOWER, [["mlp.fc3"]]], "mlp.fc3 is missing or unknown"),
        ([*TOWER, TOWER[1]], "some are named twice"),
        ([], "mlp.fc1 is missing or unknown"),
    ],
)
def test_runs_that_do_not_cover_are_refused(runs: list[Run], reason: str) -> None:
    block = get_block(VISION)
    with pytest.raises(UserError, match=rf"must cover every linear of {VISION} once: .*{reason}"):
        search_block(block, runs, SearchOptions(GRID))
    assert isinstance(block.module.get_submodule("mlp.fc1"), nn.Linear)


def test_a_block_without_a_finite_output_is_named_and_left_as_it_was() -> None:
    block = get_block(VISION)
    with torch.no_grad():
        block.linears["mlp.fc2"].bias[0] = float("inf")
    with pytest.raises(RunError, match=rf"{VISION}\.self_attn\.q_proj a finite output"):
        search_block(block, TOWER, SearchOptions(GRID))
    for name, linear in block.linears.items():
        assert block.module.get_submodule(name) is linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentiles": ()}, r"method\.percentiles=\(\) is not a list"),
        ({"percentiles": 0.99}, r"method\.percentiles=0\.99 is not a list"),
        ({"percentiles": "0.99"}, r"method\.percentiles=0\.99 is not a list"),
        ({"percentiles": None}, r"method\.percentiles=null is not a list"),
        ({"percentiles": [1.0, 0.5]}, r"method\.percentiles=\[1\.0, 0\.5\] is not .* above 0\.5"),
        ({"percentiles": [1.01]}, r"method\.percentiles=\[1\.01\] is not .* up to 1"),
        ({"percentiles": [float("nan")]}, r"method\.percentiles=\[nan\] is not a list of numbers"),
        ({"percentiles": ["high"]}, r"method\.percentiles=\['high'\] is not a list of numbers"),
        ({"percentiles": [True]}, r"method\.percentiles=\[True\] is not a list of numbers"),
        ({"normalize": "yes"}, r"method\.normalise=yes is not a switch"),
        ({"clip_weights": 1}, r"method\.clip_weights=1 is not a switch"),
        (
            {"output": "model"},
            r"method\.output=model is not a known value. Choose one of: layer, block",
        ),
        (
            {"clip": "off"},
            r"method\.clip=off is not a known value. Choose one of: percentile, further",
        ),
        ({"tokens": 0}, r"method\.search_tokens=0 is not a whole number of at least 1"),
        ({"tokens": 1.5}, r"method\.search_tokens=1\.5 is not a whole number of at least 1"),
        ({"exhaustive": 0}, r"method\.exhaustive=0 is not a whole number of at least 1"),
    ],
)
def test_an_impossible_search_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        SearchOptions(**options)


def test_an_expert_that_reads_nothing_in_the_calls_of_errors_is_not_searched() -> None:
    """Its error would be the same for every candidate, and the first would count as found."""
    model = toy_llava("routed")
    batches = [toy_batch(rows=1, words=5, seed=seed, image=False) for seed in range(6)]
    mixture = model.get_submodule(f"{DECODER}.mlp")
    tokens = []
    with hooked({mixture: lambda _, args: tokens.append(args[0].flatten(0, -2))}), torch.no_grad():
        for batch in batches:
            model(**batch)
        mixture.router.weight[2] = 50 * tokens[2][2] / tokens[2][2].norm()
    walk = Walk(model, batches, config())
    block = next(block for block in walk.blocks() if block.name == DECODER)
    experts = {name for name in block.linears if "experts" in name}
    samples = block.linear_inputs()
    assert len(samples["mlp.experts.2.down_proj"])
    options = SearchOptions(GRID, tokens=5)
    with Trial(block, samples, options) as trial:
        missed = experts - trial.reached()
    found = search_block(block, [[[name]] for name in block.linears], options)
    assert any(len(samples[name]) for name in missed)
    assert {block.layer_name(name) for name in missed} == set(unsearched(block, found))
