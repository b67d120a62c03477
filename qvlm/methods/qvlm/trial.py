"""A block of the walk whose linears can be switched between float and quantized candidates.

This is the workbench of the search: it makes the candidates, runs the block with any setting of
them and measures the error. What does not depend on a setting is not computed again: each linear
remembers the last output of each candidate in each call and returns it for an equal input. So of
three layers that are searched jointly, the first is computed 5 times, not 125.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.methods.objective import output_error
from qvlm.methods.qvlm.candidates import candidates
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.quantization import Block, QuantLinear
from qvlm.quantization.calls import Call
from qvlm.quantization.hooks import hooked

Setting = tuple[int | None, ...]
"""Index of the percentile of each unit of a segment; None leaves the unit in floating point."""

Observed = tuple[str, ...] | None
"""Names of the linears whose outputs count; None for the output of the block."""


class Trial:
    """A block whose linears can be switched between float and every candidate.

    While the context is open, each linear is replaced by a switch that remembers its outputs.

    Args:
        block: Block with its float linears.
        samples: What each linear read, [tokens, in].
        options: Options of the search.
    """

    def __init__(self, block: Block, samples: dict[str, Tensor], options: SearchOptions) -> None:
        self.block = block
        self.options = options
        self._samples = samples
        self._cursor = _Cursor()
        self._switches = {
            name: _Switch(block.linears[name], quantized, self._cursor)
            for name, quantized in candidates(block, samples, options).items()
        }
        self._calls, self._targets = _some_calls(block, options.tokens)
        self._references: dict[tuple[Setting, Observed], list[Tensor]] = {}

    def __enter__(self) -> "Trial":
        for name, switch in self._switches.items():
            self.block.module.set_submodule(name, switch)
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._switches:
            self.block.restore(name)

    def apply(self, units: Sequence[Sequence[str]], setting: Setting) -> None:
        """Switches the linears of each unit to the candidate of its index."""
        for unit, index in zip(units, setting, strict=True):
            for name in unit:
                self._switches[name].index = index

    def keep(self, units: Sequence[Sequence[str]], setting: Setting) -> None:
        """Switches the linears for good, and frees what other candidates remember."""
        self.apply(units, setting)
        self._references.clear()
        for name in (name for unit in units for name in unit):
            self._switches[name].forget_others()

    def observed(self, units: Sequence[Sequence[str]]) -> Observed:
        """The linears whose outputs are the output of a segment; None for the block's output."""
        if self.options.output == "layer":
            return None
        names = [name for unit in units for name in unit]
        last = self._samples[names[-1]]
        return tuple(name for name in names if torch.equal(self._samples[name], last))

    def reached(self) -> set[str]:
        """Names of the linears that read a token in the calls that errors are measured on.

        These calls are only some of the block's, so an expert may read a token in none of them.
        """
        found: set[str] = set()

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if args[0].numel():
                    found.add(name)

            return hook

        with hooked({switch: note(name) for name, switch in self._switches.items()}):
            for _ in self._run(None):
                pass
        return found

    def error(
        self,
        units: Sequence[Sequence[str]],
        setting: Setting,
        reference: Setting,
        observed: Observed,
        bound: float = inf,
    ) -> float:
        """Measures the output error of a setting.

        Args:
            units: Names of the linears of each unit.
            setting: Setting to be measured.
            reference: Setting whose output is the target, if linears are observed.
            observed: Linears whose outputs count.
            bound: Largest error of interest. The block is not run to the end for a larger one.

        Returns:
            The error, or infinity if it is above the bound or not finite.
        """
        if observed is None:
            targets = self._targets
        elif (reference, observed) in self._references:
            targets = self._references[reference, observed]
        else:
            self.apply(units, reference)
            targets = self._references[reference, observed] = list(self._run(observed))
        self.apply(units, setting)
        error = output_error(self._run(observed), targets, self.options.normalize, bound)
        return error if isfinite(error) else inf

    def chosen_layers(self, keep_float: bool) -> dict[str, QuantLinear]:
        """The quantized linears of the setting; of one that read no token the shared default."""
        layers = {}
        for name, switch in self._switches.items():
            chosen = switch.candidates[switch.index or 0]
            if keep_float:
                chosen = QuantLinear.from_linear(
                    self.block.linears[name],
                    chosen.weight_quantizer,
                    chosen.input_quantizer,
                    keep_float=True,
                )
            layers[name] = chosen
        return layers

    def _run(self, observed: Observed) -> Iterator[Tensor]:
        """Outputs of one call after the other: of the block, or of the observed linears."""
        for index, call in enumerate(self._calls):
            self._cursor.call = index
            if observed is None:
                yield from self.block.run(calls=[call])
                continue
            switches = {name: self._switches[name] for name in observed}
            with _watched(switches) as outputs, suppress(_Enough):
                self.block.run(calls=[call])
            yield from (outputs[name] for name in observed if name in outputs)


class _Cursor:
    """The call that is running."""

    call = 0


class _Switch(nn.Module):
    """A linear or one of its candidates; repeats its last output for an equal input.

    Attributes:
        index: Index of the candidate in use; None for the float linear.
    """

    def __init__(self, linear: nn.Linear, candidates: list[QuantLinear], cursor: _Cursor) -> None:
        super().__init__()
        self.linear = linear
        self.candidates = candidates
        self.index: int | None = None
        self._cursor = cursor
        self._memory: dict[tuple[int | None, int], tuple[Tensor, Tensor, tuple[int, int]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        key = self.index, self._cursor.call
        if key in self._memory:
            read, output, versions = self._memory[key]
            # A tensor's version counts in-place writes; after one, the memory is void.
            if (read._version, output._version) == versions and torch.equal(read, x):
                return output
        layer = self.linear if self.index is None else self.candidates[self.index]
        output = layer(x)
        self._memory[key] = x, output, (x._version, output._version)
        return output

    def forget_others(self) -> None:
        """Frees what is remembered of other candidates."""
        self._memory = {key: kept for key, kept in self._memory.items() if key[0] == self.index}


def _some_calls(block: Block, tokens: int) -> tuple[list[Call], list[Tensor]]:
    """Calls with about `tokens` tokens, spread over all of them, and their float outputs."""
    outputs = block.float_outputs()
    # Multiples of the golden ratio, modulo one, are evenly spread for any number of them.
    order = sorted(range(len(outputs)), key=lambda index: index * 0.6180339887498949 % 1)
    picked: list[int] = []
    for index in order:
        if sum(outputs[i].shape[:-1].numel() for i in picked) < tokens:
            picked.append(index)
    picked.sort()
    return [block.inputs[i] for i in picked], [outputs[i] for i in picked]


class _Enough(Exception):
    """Stops a forward pass once every watched module has run."""


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of modules, and stops the pass when all of them are collected."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output
            if len(outputs) == len(modules):
                raise _Enough

        return hook

    with hooked(after={module: keep(name) for name, module in modules.items()}):
        yield outputs
