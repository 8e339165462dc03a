"""Which operations launched their Triton kernel, and which ran as PyTorch's operations instead."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

Choices = dict[str, dict[str, int]]
"""By operation: calls with "triton" and with "torch"; one per capture where they are replayed from a graph."""


@contextmanager
def counted() -> Iterator[Choices]:
    """Counts the calls within, of all operations that have been imported."""
    found: Choices = {}
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            where, _, operation = name.rpartition(".")
            choose = getattr(module, "choose_triton", None) if where == "engine.kernels" else None
            if choose and operation != "triton_choice":
                stack.enter_context(mock.patch.object(module, "choose_triton", counting(choose, found, operation)))
        yield found


def counting(choose: Callable[..., bool], found: Choices, operation: str) -> Callable[..., bool]:
    def run(*arguments: Any, **options: Any) -> bool:
        chosen = choose(*arguments, **options)
        calls = found.setdefault(operation, {"triton": 0, "torch": 0})
        calls["triton" if chosen else "torch"] += 1
        return chosen

    return run
