"""What the GPU benchmark makes of whole steps and refinements, and which of them are wrong."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.baselines import greedy_generate
from bench.gpu import engine, refinements
from bench.gpu.host_gaps import FIRST, LAST, Work, idle_between_steps, step_seconds
from bench.gpu.models import multiplied_weights, pair
from bench.gpu.timing import Stopwatch
from engine.roofline import Roofline
from engine.step_runner import Counts
from tests.bench.gpu_cases import CPU, Clock, interpreted


def test_idle_time_lies_between_the_last_kernel_of_a_step_and_the_first_of_the_next() -> None:
    work = [
        Work(LAST, 0, 10), Work(FIRST, 14, 20), Work("gemm", 25, 50), Work(LAST, 50, 60),
        # a copy to the host, and one beside it on another stream
        Work("Memcpy DtoH", 63, 65), Work("Memset", 64, 70), Work(FIRST, 75, 76), Work(LAST, 90, 91),
    ]  # fmt: skip
    assert idle_between_steps(reversed(work)) == pytest.approx([4e-6, 8e-6])
    assert idle_between_steps(work[:1]) == []
    assert step_seconds(work) == pytest.approx([46e-6, 16e-6])


def test_what_was_compiled_is_timed_though_that_took_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(refinements, "time", clock)
    calls: list[str] = []

    def variant(name: str, first: float) -> Callable[[], list[list[int]]]:
        def call() -> list[list[int]]:
            clock.now += 1.0 if name in calls else first
            calls.append(name)
            return [[1, 2, 3]]

        return call

    variants = {"refine": variant("refine", 3.0), "generate": variant("generate", 60.0), "late": variant("late", 1.0)}
    *found, record = refinements.compared(variants, [[1, 2, 3]], 3, 50.0, CPU)
    assert calls == ["refine"] * 2 + ["generate"] * 2
    assert found[0]["seconds"].keys() >= {"refine"}  # known before the next is begun
    assert record["first_call_seconds"] == {"refine": 3.0, "generate": 60.0}
    assert record["seconds"] == {"refine": [1.0], "generate": [1.0]}
    assert record["times_faster_than_generate"] == {"refine": 1.0}


def test_what_takes_long_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(refinements, "time", clock)

    def lasting(seconds: float) -> list[list[int]]:
        clock.now += seconds
        return [[1, 2, 3]]

    def broken() -> object:
        raise RuntimeError("out of memory")

    variants: dict[str, Callable[[], Any]] = {"refine": partial(lasting, 1.0), "generate": partial(lasting, 9.0)}
    *_, record = refinements.compared(variants | {"peer": broken}, [[1, 2, 3]], 3, 50.0, CPU)
    assert record["seconds"] == {"refine": [1.0] * 3, "generate": [9.0]}
    assert record["times_faster_than_generate"] == {"refine": 9.0}
    assert "out of memory" in record["errors_of_peers"]["peer"]


def test_tokens_are_held_against_those_of_transformers() -> None:
    subject = pair("tiny", CPU, 1, 32)
    with subject.refiner:
        prompts = [[5, 6, 7], [8, 9]]
        right = greedy_generate(subject.theirs, prompts[:1], 6, 0) + greedy_generate(subject.theirs, prompts[1:], 6, 0)
        wrong = [right[0], [*right[1][:-1], (right[1][-1] + 1) % 300]]
        assert refinements.judged(subject, prompts, right, right) == {"regret": 0}
        assert "other tokens come out" in refinements.judged(subject, prompts, wrong, right)["error"]
        found = refinements.judged(subject, prompts, wrong, wrong)
        assert "below transformers' choice" in found["error"]
        subject.theirs.bfloat16()  # where near-ties may fall either way, but a random token is none
        assert "below transformers' choice" in refinements.judged(subject, prompts, wrong, right)["error"]
        assert "error" not in refinements.judged(subject, prompts, right, right)


def test_operations_without_a_kernel_and_failed_captures_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "forced_on_cpus", lambda: True)
    runner = SimpleNamespace(counts=Counts(captured=2, failed=0, replayed=5))
    subject: Any = SimpleNamespace(
        refiner=SimpleNamespace(_scheduler=SimpleNamespace(loop=SimpleNamespace(_runner=runner))),
        model=SimpleNamespace(device=torch.device("cuda")),
    )
    choices = {"rms_norm": {"triton": 3, "torch": 0}}
    found = engine.launched(subject, choices, refined=True)
    assert (found["operations"], found["graphs"]) == (choices, {"captured": 2, "failed": 0, "replayed": 5})
    assert "error" not in found
    choices["linear_argmax"] = {"triton": 3, "torch": 1}
    assert engine.launched(subject, choices, refined=True)["error"] == "without a Triton kernel: linear_argmax"
    runner.counts.failed = 1
    assert "could not be captured" in engine.launched(subject, {}, refined=True)["error"]
    del runner.counts
    assert "no step was replayed" in engine.launched(subject, {}, refined=True)["error"]
    assert "error" not in engine.launched(subject, {}, refined=False)
    subject.model.device = CPU
    assert "error" not in engine.launched(subject, {}, refined=True)


BROKEN_KERNEL = """
import sys
from bench.gpu import dry_run
dry_run.prepare()
from pathlib import Path
import torch
from bench.gpu import engine
from bench.gpu.run import ours_failed
from bench.gpu.timing import Stopwatch
from engine.kernels.gpu import rms_norm as module
from engine.roofline import Roofline
right = module.rms_norm
if sys.argv[1] == "wrong":
    module.rms_norm = lambda x, *rest: right(x, *rest) * torch.linspace(0.5, 1.5, x.shape[1])
for record in engine.of_model("tiny", Stopwatch(torch.device("cpu")), Roofline(1e9, 1e9), tiny=True, deadline=1e9):
    if "batch 1" in record:
        break
print(record["batch 1"], record["launched"])
sys.exit(ours_failed(record))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["right", "wrong"])
def test_the_engine_runs_on_its_kernels_without_a_gpu(kernel: str) -> None:
    """In Triton's interpreter; one that is wrong fails the benchmark."""
    done = interpreted(BROKEN_KERNEL, kernel)
    assert done.returncode == (kernel == "wrong"), done.stdout[-3000:] + done.stderr[-3000:]
    assert "'rms_norm': {'triton': " in done.stdout
    assert ("wrong: a token is" in done.stdout) == (kernel == "wrong")


def test_the_model_that_targets_are_set_for_gets_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: dict[str, float] = {}

    def of_model(name: str, *given: object, deadline: float, **options: object) -> Iterator[dict[str, Any]]:
        shares[name] = deadline
        yield {}

    monkeypatch.setattr(engine, "time", Clock())
    monkeypatch.setattr(engine, "of_model", of_model)
    list(engine.measure(Stopwatch(CPU), Roofline(1e9, 1e9), tiny=False, deadline=100.0))
    assert shares == dict(zip(engine.MODELS, (70.0, 50.0, 100.0), strict=True))  # each left all that it had


def test_an_embedding_counts_only_where_it_is_the_head() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    for tied in (False, True):
        config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
        assert multiplied_weights(LlamaForCausalLM(config)) == 4 * 8 * 8 + 3 * 8 * 12 + 50 * 8
