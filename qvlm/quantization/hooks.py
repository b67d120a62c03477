"""Forward hooks that are removed again, whatever happens while they are in place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Hooks = Mapping[nn.Module, Callable[..., Any]]
"""By module, a hook with the arguments that PyTorch gives to hooks of its kind."""


@contextmanager
def hooked(
    before: Hooks | None = None, after: Hooks | None = None, *, with_kwargs: bool = False
) -> Iterator[None]:
    """Registers forward hooks for as long as the context is open.

    Args:
        before: Hooks that run before a module's forward: `hook(module, args)`. A result other than
            None replaces the arguments.
        after: Hooks that run after it: `hook(module, args, output)`. A result other than None
            replaces the output.
        with_kwargs: Whether hooks also receive the keyword arguments, as a dictionary behind
            `args`.
    """
    with ExitStack() as stack:
        for module, hook in (before or {}).items():
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        for module, hook in (after or {}).items():
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield
