"""The engine in a process that has set torch's default device or dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import RefineOptions, Refiner, sampling
from engine.kernels import Rate
from engine.loop_slot import fill
from engine.model import Decoder
from engine.refiner import Backend
from tests.engine.checkpoints import Oracle, prompts
from tests.engine.test_device_loop import make, start

REQUESTS = [{"prompt_ids": prompt, "draft_ids": prompt[::-1]} for prompt in prompts(1)[:3]]
OPTIONS = [
    RefineOptions(max_new_tokens=16),
    RefineOptions(max_new_tokens=16, temperature=0.7, seed=2**63 - 1),
    RefineOptions(max_new_tokens=16, temperature=0.7, seed=2**63 - 1, top_p=0.8),
]


@contextmanager
def default(name: str) -> Iterator[None]:
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def answers(oracle: Oracle, backend: Backend) -> list[list[int]]:
    with Refiner.from_pretrained(oracle.folder, kv_cache_tokens=2048, backend=backend) as refiner:
        return [result.token_ids for options in OPTIONS for result in refiner.refine(REQUESTS, options)]


@pytest.mark.parametrize("changed", ["meta", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("name", "backend", "loop"),
    [("llama-llama3-rope", "lean", "device"), ("gemma2", "lean", "device"), ("gemma2", "lean", "host"),
     ("qwen3", "hf", "host")],
)  # fmt: skip
def test_answers_do_not_depend_on_the_defaults(
    changed: str,
    name: str,
    backend: Backend,
    loop: str,
    oracle: Callable[[str], Oracle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIFFPO_LOOP", loop)
    model = oracle(name)
    expected = answers(model, backend)
    assert all(expected)
    with default(changed):
        assert answers(model, backend) == expected


@pytest.mark.parametrize("changed", ["float32", "bfloat16", "float64", "meta"])
def test_what_a_slot_is_filled_with(changed: str) -> None:
    loop = make(True).loop
    assert loop is not None
    sequence = start([5, 6, 7], [8, 9], max_new_tokens=12, temperature=0.7, seed=2**63 - 1)
    sequence.policy.first.value = 0.3
    sequence.pages = [3, 1]
    with default(changed):
        fill(loop.state, 2, sequence, 0)
    state = loop.state
    assert state.temperature[2] == torch.tensor(0.7, dtype=torch.float32)
    assert state.rates[2, Rate.FIRST] == torch.tensor(0.3, dtype=torch.float32)
    assert state.seeds[2] == 2**63 - 1
    assert state.block_table[2, :2].tolist() == [3, 1]
    assert state.text[2, :3].tolist() == [7, 8, 9]


@pytest.mark.parametrize("changed", ["bfloat16", "float64", "meta"])
def test_constants_of_a_model(changed: str, oracle: Callable[[str], Oracle]) -> None:
    """Gemma's embeddings are scaled by a root that bfloat16 does not hold; frequencies span orders of magnitude."""
    model = oracle("gemma2").model
    tensors = model.state_dict()
    cpu = torch.device("cpu")

    def load() -> Decoder:
        return Decoder.from_tensors(model.config, tensors, torch.float32, cpu)

    expected = load()
    with default(changed):
        found = load()
    assert found.embedding_scale == expected.embedding_scale
    assert torch.equal(found.spec.inv_freq, expected.spec.inv_freq)
    assert (found.rotation.dtype, found.rotation.device) == (torch.float32, cpu)


def test_temperature_of_rows_without_a_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def linear_sample(*given: Any, temperature: Tensor, **others: Any) -> tuple[Tensor]:
        seen.append(temperature)
        return (temperature,)

    monkeypatch.setattr(sampling, "linear_sample", linear_sample)
    loop = make(True).loop
    assert loop is not None
    with default("bfloat16"):
        rows = torch.zeros(2, dtype=torch.int64)
        sampling.sample(torch.zeros(2, 19), loop._model.head, rows, rows, 0.7, 1.0)
    assert torch.equal(seen[0], torch.full((2,), 0.7, dtype=torch.float32))
