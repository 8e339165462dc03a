"""One test per operation, shape, dtype and implementation; see bench.suite."""

from typing import Any

from bench.suite.conftest import Prepared

ROUNDS_WITH_INPUT = 30
"""Where every call needs an input of its own; slower operations get fewer by the clock."""


def test_operation(
    benchmark: Any, prepared: Prepared, operation: str, shape: str, dtype: str, implementation: str
) -> None:
    case = prepared.get(operation, shape, dtype)
    benchmark.group = f"{operation} {shape} {dtype}"
    benchmark.extra_info.update(operation=operation, shape=shape, dtype=dtype, implementation=implementation)
    call = case.calls[implementation]
    if case.fresh is None:
        benchmark(call)
        return
    make = case.fresh[implementation]
    benchmark.pedantic(call, setup=lambda: ((make(),), {}), rounds=ROUNDS_WITH_INPUT, warmup_rounds=1)
