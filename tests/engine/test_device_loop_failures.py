"""Steps of the device loop that fail: whoever was inside begins anew with the host, and gets the answer it gets anyway."""

import sys
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import EngineDead, EngineError, OutOfMemory
from engine.batch import StepBatch
from engine.device_loop import DeviceLoop
from engine.kv_cache import KVCache
from engine.scheduler import Scheduler
from engine.step_runner import StepKind
from tests.engine.test_device_loop import KNEE, OPTIONS, TOKENS, VOCABULARY, Ledger, make, outcome, run, start

PROMPTS = [[5, 6, 4 + i] * 4 for i in range(6)]


class Fragile(Ledger):
    """A Ledger whose passes fail when asked to, and destroy the K/V they were about to write."""

    def __init__(self, when: Callable[[StepBatch], bool], error: Exception) -> None:
        super().__init__()
        self.when, self.error = when, error
        self.failures = 0

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        if self.when(batch):
            self.failures += 1
            cache.k[0].view(-1)[batch.slots[: int(batch.row_start[-1])]] = -1
            raise self.error
        return super().forward(batch, cache)


def in_loop(batch: StepBatch) -> bool:
    return batch.logit_rows is None


def at(launches: Collection[int]) -> Callable[[StepBatch], bool]:
    """These passes of the loop, counted from 0."""
    counter = iter(range(10_000))
    return lambda batch: in_loop(batch) and next(counter) in launches


def alone(prompt: list[int], draft: list[int], **options: Any) -> tuple[object, ...]:
    sequence = start(prompt, draft, **options)
    if not sequence.finish_reason:
        run(make(False), [sequence])
    return outcome(sequence)


class OutOfResources(Exception):
    """One of Triton's errors, which are no RuntimeError."""


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(TritonError=OutOfResources))


def not_sticky(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    error.error_code = code
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError("injected"), torch.AcceleratorError("out of memory"), not_sticky(900), not_sticky(908),
        OutOfResources("out of resource: shared memory"),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("launch", [0, 1, 4])
def test_a_step_that_fails_costs_nobody_the_answer(launch: int, error: Exception) -> None:
    """Those inside end with the host, as if they had never been elsewhere; those that come later are in the loop."""
    model = Fragile(at({launch}), error)
    scheduler = make(True, model, pages=4)  # room for two at a time
    options = {"max_new_tokens": 40, "window": 3, "concurrency": 4}
    references = [start(prompt, [], **options) for prompt in PROMPTS]
    for reference in references:
        run(make(False), [reference])
    sequences = [start(prompt, [], **options) for prompt in PROMPTS]
    run(scheduler, sequences)
    assert model.failures == 1
    assert [outcome(s) for s in sequences] == [outcome(r) for r in references]
    assert [(s.steps, s.forward_tokens) for s in sequences] == [(r.steps, r.forward_tokens) for r in references]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(TOKENS.filter(bool), TOKENS, OPTIONS, st.booleans()), min_size=1, max_size=5),
    st.sets(st.integers(0, 20), min_size=1, max_size=4),
    st.sampled_from([(512, 4), (20, 3)]),
)
def test_failures_change_no_answer(
    cases: list[tuple[list[int], list[int], dict[str, Any], bool]], launches: set[int], limits: tuple[int, int]
) -> None:
    sequences = [start(p, d, **o) for p, d, o, _ in cases]
    for sequence, (_, _, _, observed) in zip(sequences, cases, strict=True):
        sequence.observed = observed
    run(make(True, Fragile(at(launches), RuntimeError("injected")), 6, *limits), sequences)
    assert [outcome(s) for s in sequences] == [alone(p, d, **o) for p, d, o, _ in cases]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(MemoryError(), OutOfMemory), (RuntimeError("injected"), EngineError), (OutOfResources(), EngineError)],
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_request_that_makes_every_step_fail_fails_alone(
    place: int, error: Exception, kind: type[EngineError]
) -> None:
    poison = 17  # the last token of a prompt, which is fed with the first guesses
    model = Fragile(lambda batch: bool(((batch.token_ids == poison) & (batch.positions == 4)).any()), error)
    prompts = [[5, 6, 4, 4, 4 + i] for i in range(6)]
    options = {"max_new_tokens": 12}
    right = [alone(prompt, [], **options) for prompt in prompts]
    prompts[place][-1] = poison
    sequences = [start(prompt, [], **options) for prompt in prompts]
    run(make(True, model, max_batch_size=6), sequences)
    assert [type(s.error) for s in sequences] == [kind if i == place else type(None) for i in range(6)]
    assert [outcome(s) for i, s in enumerate(sequences) if i != place] == right[:place] + right[place + 1 :]


def test_a_loop_that_never_works_costs_nobody_the_answer() -> None:
    class Broken:
        def __init__(self, step: Callable[[StepKind], None]) -> None: ...

        def launch(self, kind: StepKind) -> None:
            raise RuntimeError("no such kernel")

        def close(self) -> None: ...

    model = Ledger()
    cache = model.new_cache(8)
    scheduler = Scheduler(model, cache, 64, 3, DeviceLoop(model, cache, VOCABULARY, KNEE, 64, 3, Broken))
    sequences = [start(prompt, [], max_new_tokens=20) for prompt in PROMPTS]
    run(scheduler, sequences)
    assert [outcome(s) for s in sequences] == [alone(prompt, [], max_new_tokens=20) for prompt in PROMPTS]


def test_one_that_is_cancelled_after_a_failure_is_forgotten() -> None:
    model = Fragile(at({3}), MemoryError())
    scheduler = make(True, model, pages=4)
    kept, dropped = (start([5, 6, 7] * 4, [], max_new_tokens=40, window=1) for _ in range(2))
    scheduler.add(kept)
    scheduler.add(dropped)
    while not model.failures:
        scheduler.step()
    scheduler.cancel(dropped)
    scheduler.check_integrity()
    assert scheduler.cache.pool.free_count == 2
    run(scheduler, [])
    assert outcome(kept) == alone([5, 6, 7] * 4, [], max_new_tokens=40)


@pytest.mark.parametrize("code", [None, 700, 899, 909])
def test_a_device_that_is_lost_is_the_end_and_no_request_is_blamed(code: int | None) -> None:
    error = torch.AcceleratorError("an illegal memory access")
    if code is not None:
        error.error_code = code
    scheduler = make(True, Fragile(at({3}), error))
    sequences = [start(prompt, [], max_new_tokens=40) for prompt in PROMPTS]
    with pytest.raises(EngineDead, match="illegal memory access"):
        run(scheduler, sequences)
    assert all(sequence.error is None for sequence in sequences)
    scheduler.check_integrity()
