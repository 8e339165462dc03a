"""What the GPU benchmark makes of its measurements, and that all of it runs."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu import engine, kernels, paged_attention, targets, timing
from bench.gpu.case import Case
from bench.gpu.host_gaps import FIRST, LAST, Work, idle_between_steps, step_seconds
from bench.gpu.models import multiplied_weights
from bench.gpu.paged_attention import WORK
from bench.gpu.run import ours_failed
from bench.gpu.timing import Stopwatch
from engine.roofline import Roofline
from tests.kernels.flash_stand_in import varlen

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    ceilings = Roofline(bytes_per_second=100.0, flops_per_second=1000.0)
    assert ceilings.floor(50, 100) == 0.5
    assert ceilings.floor(5, 900) == 0.9


def test_a_case_records_every_variant_and_what_fails() -> None:
    x = torch.arange(6.0)

    def broken() -> object:
        raise RuntimeError("no such shape")

    case = Case(
        "doubling", "6", {"eager": lambda: x + x, "ours": lambda: 2 * x, "off": lambda: 2.2 * x, "peer": broken}, 48, 6
    )
    record = kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=2)
    variants = record["variants"]
    assert variants["eager"]["difference_from_ours"] == 0
    assert variants["off"]["difference_from_ours"] == pytest.approx(0.1, rel=1e-3)
    assert "no such shape" in variants["peer"]["error"]
    assert len(variants["ours"]["seconds"]) == 2
    assert variants["ours"]["share_of_floor"] == pytest.approx(
        record["floor_seconds"] / variants["ours"]["median_seconds"]
    )
    assert not ours_failed([record])
    case.variants["ours"] = broken
    assert ours_failed([kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=1)])


def test_what_counts_as_a_failure() -> None:
    assert ours_failed({"linear_argmax": [{"error": "ValueError: wrong"}]})
    assert not ours_failed({"linear_argmax": [{"shape": "1", "error": "left out: no time"}]})
    assert not ours_failed({"gemma": {"step": {"rows": 1}}})


def test_integers_differ_by_their_share() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert kernels.difference((a, a.float()), (a.clone(), a.float())) == 0
    assert kernels.difference(a, torch.tensor([1, 2, 3, 5])) == 0.25
    assert kernels.difference(None, None) is None


def test_every_shape_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch compiles one function for a few shapes and then runs it as it is, which would pass for compiled."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(len(inputs))
        return graph.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
        for n in range(2, 14):
            program = torch.compile(double, dynamic=False, backend=backend)
            x = torch.ones(n, device=device)
            yield Case("doubling", str(n), {"ours": partial(double, x), "compiled": partial(program, x)}, n, n)

    monkeypatch.setattr(kernels, "OPERATIONS", ("doubling",))
    monkeypatch.setitem(sys.modules, "bench.gpu.doubling", SimpleNamespace(cases=cases))
    *_, found = kernels.measure(Stopwatch(CPU), Roofline(1e9, 1e9), tiny=True, deadline=time.monotonic() + 60)
    assert len(found["doubling"]) == len(compiled) == 12


class Clock:
    """Stands in for the module ``time``; moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


def test_an_operation_without_time_leaves_it_to_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(kernels, "time", clock)
    monkeypatch.setattr(timing, "time", clock)

    def tenth_of_a_second() -> None:
        clock.now += 0.1

    def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
        for name in ("slow", "later", "last"):  # called at least four times each: more than a third of the time
            yield Case("waiting", name, {"ours": tenth_of_a_second}, 1, 1)

    def broken(device: torch.device, *, tiny: bool) -> Iterator[Case]:
        raise RuntimeError("no such module")

    monkeypatch.setattr(kernels, "OPERATIONS", ("waiting", "broken", "waiting_too"))
    for name, made in (("waiting", cases), ("broken", broken), ("waiting_too", cases)):
        monkeypatch.setitem(sys.modules, f"bench.gpu.{name}", SimpleNamespace(cases=made))
    *_, found = kernels.measure(Stopwatch(CPU), Roofline(1e9, 1e9), tiny=True, deadline=0.9)
    assert [record["shape"] for record in found["waiting"]] == ["slow", "later"]
    assert "no time" in found["waiting"][1]["error"]
    assert "no such module" in found["broken"][0]["error"]
    assert "error" not in found["waiting_too"][0]


def test_flash_attention_finds_the_same_keys_in_its_runs_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library, at more pages than a run and fewer than two."""
    work = paged_attention.Work("tiny", 4, 2, 16, 5.0, 24, 2, 3, 300)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(sys.modules["engine.kernels.paged_attention"], "reason_against_flash", lambda q: None)
    expected = paged_attention.case(work, CPU).variants["ours"]()
    torch.manual_seed(0)  # as ``case`` does
    inputs = paged_attention.inputs(work, CPU, torch.float32)
    torch.testing.assert_close(paged_attention.flash_attention_2(work, *inputs)(), expected)


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
    monkeypatch.setattr(engine, "time", clock)
    calls: list[str] = []

    def variant(name: str, first: float) -> Callable[[], list[list[int]]]:
        def call() -> list[list[int]]:
            clock.now += 1.0 if name in calls else first
            calls.append(name)
            return [[1, 2, 3]]

        return call

    variants = {"refine": variant("refine", 3.0), "generate": variant("generate", 60.0), "late": variant("late", 1.0)}
    record = engine.compared(variants, [[1, 2, 3]], rounds=3, deadline=50.0)
    assert calls == ["refine", "generate"] * 2
    assert record["first_call_seconds"] == {"refine": 3.0, "generate": 60.0}
    assert record["seconds"] == {"refine": [1.0], "generate": [1.0]}
    assert record["times_faster_than_generate"] == {"refine": 1.0}


def test_the_model_that_targets_are_set_for_gets_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: dict[str, float] = {}

    def of_model(name: str, *given: object, tiny: bool, deadline: float) -> Iterator[dict[str, Any]]:
        shares[name] = deadline
        yield {}

    monkeypatch.setattr(engine, "time", Clock())
    monkeypatch.setattr(engine, "of_model", of_model)
    list(engine.measure(Stopwatch(CPU), Roofline(1e9, 1e9), tiny=False, deadline=100.0))
    assert shares == dict(zip(engine.MODELS, (60.0, 50.0, 100.0), strict=True))  # each left all that it had


def test_an_embedding_counts_only_where_it_is_the_head() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    for tied in (False, True):
        config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
        assert multiplied_weights(LlamaForCausalLM(config)) == 4 * 8 * 8 + 3 * 8 * 12 + 50 * 8


def test_targets_are_shown_with_what_was_found() -> None:
    assert {line.found for line in (*targets.kernel_lines({}), *targets.engine_lines({}))} == {"not measured"}
    operation, shape, _ = targets.KERNELS[0]
    timed = {"ours": {"median_seconds": 2e-6, "share_of_floor": 0.85}, "eager": {"median_seconds": 7e-6}}
    records = [{"operation": operation, "shape": shape, "variants": timed | {"peer": {"error": "absent"}}}]
    first, *others = targets.kernel_lines({operation: records})
    assert first.found == "2.0 µs, 85%; eager takes 3.50 times as long"
    assert {line.found for line in others} == {"not measured"}
    records[0]["variants"] = {"ours": {"error": "wrong"}}
    assert targets.kernel_lines({operation: records})[0].found == "failed: wrong"
    measured = {
        "step": {"rows": 256, "seconds": {"launched": 8e-3, "graph": 7e-3}, "over_floor": 1.2},
        "host_gaps": {"steps": 9, "median_seconds": 5e-6},
        "batch 1": {"times_faster_than_generate": {"refine, right draft": 41.23}},
        "one_launch": {"no draft": {"ratio": 0.9871, "steps": 40}},
    }
    found = [line.found for line in targets.engine_lines({"gemma-2-9b": measured})]
    assert found == ["7.00 ms, 1.20 times", "5.0 µs (median of 8)", "41.2 times", "0.987 of the time, 40 steps"]


@pytest.mark.parametrize(("operation", "shape"), [(name, shape) for name, shape, _ in targets.KERNELS])
def test_targets_are_set_for_shapes_that_are_measured(operation: str, shape: str) -> None:
    if operation == "paged_attention":
        assert shape in [work.name for work in WORK]
        return
    module = importlib.import_module(f"bench.gpu.{operation.replace('linear_sample', 'linear_argmax')}")
    small = dict.fromkeys(getattr(module, "SHAPES", {}), (16, 32, None)) if operation.startswith("linear") else None
    with mock.patch.object(module, "SHAPES", small) if small else nullcontext():
        assert any(case.shape == shape for case in module.cases(CPU, tiny=False) if case.operation == operation)


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every stage, with a test of each file and without compiling what ours is compared with."""
    variables = {"OUT": str(tmp_path), "PYTHON": sys.executable, "JOBS": "0", "FEW": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= variables | {"OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "kernels_gpu_dry_run.json").read_text())["kernels"]
    timed = {case["operation"] for records in found.values() for case in records if case["variants"]["ours"]["seconds"]}
    assert timed == {operation for operation, _, _ in targets.KERNELS}
    record = json.loads((tmp_path / "engine_gpu_dry_run.json").read_text())["engine"]["tiny"]
    assert record["step"]["seconds"]["launched"] > 0
    assert record["host_gaps"]["steps"] > 4
    whole = record["one_launch"]["no draft"]
    assert (whole["tokens_equal"], whole["launches"] < whole["steps"] / 2) == (1, True)
    for batch in ("batch 1", "batch 2"):
        assert record[batch]["right_draft_kept"] == 1
        assert record[batch]["tokens_equal_to_generate"] == 1
    assert "public script's loop, random draft" in record["batch 1"]["seconds"]
    assert (
        "triton dense" in json.loads((tmp_path / "consistency_loss_gpu_dry_run.json").read_text())["tiny"]["variants"]
    )


def test_unknown_stages_are_refused() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), "--stages", "tests,speed"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "unknown stage speed\n")
