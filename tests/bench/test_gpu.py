"""What the GPU benchmark makes of its measurements of kernels."""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench.gpu import engine, kernels, paged_attention, targets, timing
from bench.gpu.case import Case, difference
from bench.gpu.paged_attention import WORK
from bench.gpu.run import ours_failed
from bench.gpu.timing import Stopwatch
from engine.roofline import Roofline
from tests.bench.gpu_cases import CPU, Clock, case_of
from tests.kernels.flash_stand_in import varlen


def test_the_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    ceilings = Roofline(bytes_per_second=100.0, flops_per_second=1000.0)
    assert ceilings.floor(50, 100) == 0.5
    assert ceilings.floor(5, 900) == 0.9


def test_a_case_records_every_variant_and_what_fails() -> None:
    x = torch.arange(6.0)

    def broken() -> object:
        raise RuntimeError("no such shape")

    variants = {"eager": lambda: x + x, "ours": lambda: 2 * x, "off": lambda: 2.2 * x, "peer": broken}
    case = case_of(variants, 2 * x)
    record = kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=2)
    variants = record["variants"]
    assert variants["eager"]["difference_from_ours"] == 0
    assert variants["off"]["difference_from_ours"] == pytest.approx(0.1, rel=1e-3)
    assert "no such shape" in variants["peer"]["error"]
    assert len(variants["ours"]["seconds"]) == 2
    assert variants["ours"]["share_of_floor"] == pytest.approx(
        record["floor_seconds"] / variants["ours"]["median_seconds"]
    )
    assert (variants["ours"]["off_by"], variants["ours"]["may_be_off_by"]) == (0, 1e-3)
    assert not ours_failed([record])
    case.variants["ours"] = broken
    assert ours_failed([kernels.one(case, Stopwatch(CPU), Roofline(1e9, 1e9), rounds=1)])


@pytest.mark.parametrize("factor", [2.01, float("nan")])
def test_a_wrong_result_is_a_failure_though_it_is_timed(factor: float) -> None:
    x = torch.arange(6.0)
    record = kernels.one(case_of({"ours": lambda: factor * x}, 2 * x), Stopwatch(CPU), Roofline(1e9, 1e9), rounds=1)
    ours = record["variants"]["ours"]
    assert "wrong: off by" in ours["error"]
    assert ours["median_seconds"] > 0
    assert ours_failed([record])
    assert targets.of_kernel(record["variants"]).startswith("failed: wrong")


@pytest.mark.parametrize("operation", [name for name in kernels.OPERATIONS if name != "paged_attention"])
def test_outputs_of_every_operation_are_held_against_a_reference(operation: str) -> None:
    """On a CPU in place of Triton's: what is right passes, what is a little wrong does not."""
    for case in importlib.import_module(f"bench.gpu.{operation}").cases(CPU, tiny=True):
        right = case.variants["eager"]()
        right = tuple(part.clone() for part in (right if isinstance(right, tuple) else (right,)) if part is not None)
        assert case.error(right) <= case.bound
        wrong = tuple(part + 1 if not part.is_floating_point() else 1.02 * part for part in right)
        assert not case.error(wrong) <= case.bound


def test_ceilings_measured_later_rate_what_was_measured_before() -> None:
    x = torch.arange(6.0)
    record = kernels.one(case_of({"ours": lambda: 2 * x}, 2 * x), Stopwatch(CPU), Roofline(1e9, 1e9), rounds=1)
    share = record["variants"]["ours"]["share_of_floor"]
    kernels.rated({"doubling": [record, {"error": "left out: no time"}]}, Roofline(2e9, 2e9))
    assert record["variants"]["ours"]["share_of_floor"] == pytest.approx(share / 2)
    step = {"bytes": 100, "flops": 0, "seconds": {"launched": 5.0, "graph": 2.0}}
    engine.rated({"gemma": {"step": step}, "other": {"error": "broken"}}, Roofline(100.0, 1.0))
    assert (step["floor_seconds"], step["over_floor"]) == (1.0, 2.0)


def test_what_counts_as_a_failure() -> None:
    assert ours_failed({"linear_argmax": [{"error": "ValueError: wrong"}]})
    assert not ours_failed({"linear_argmax": [{"shape": "1", "error": "left out: no time"}]})
    assert not ours_failed({"gemma": {"step": {"rows": 1}, "batch 1": {"errors_of_peers": {"generate": "broken"}}}})
    assert ours_failed({"gemma": {"launched": {"error": "without a Triton kernel: rms_norm"}}})


def test_integers_differ_by_their_share() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert difference((a, a.float()), (a.clone(), a.float())) == 0
    assert difference(a, torch.tensor([1, 2, 3, 5])) == 0.25
    with pytest.raises(ValueError, match="nothing to compare"):
        difference(None, None)
    with pytest.raises(ValueError, match=r"got \(4,\), expected \(2,\)"):
        difference(a, a[:2])


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
            yield case_of({"ours": partial(double, x), "compiled": partial(program, x)}, 2 * x, str(n))

    monkeypatch.setattr(kernels, "OPERATIONS", ("doubling",))
    monkeypatch.setitem(sys.modules, "bench.gpu.doubling", SimpleNamespace(cases=cases))
    *_, found = kernels.measure(Stopwatch(CPU), Roofline(1e9, 1e9), tiny=True, deadline=time.monotonic() + 60)
    assert len(found["doubling"]) == len(compiled) == 12


def test_an_operation_without_time_leaves_it_to_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(kernels, "time", clock)
    monkeypatch.setattr(timing, "time", clock)

    def tenth_of_a_second() -> torch.Tensor:
        clock.now += 0.1
        return torch.ones(1)

    def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
        for name in ("slow", "later", "last"):  # called at least four times each: more than a third of the time
            yield case_of({"ours": tenth_of_a_second}, torch.ones(1), name)

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


def test_peers_of_attention_see_the_same_keys() -> None:
    """Single rows, no prefix and one behind a prefix; with a cap and a window."""
    shapes = [(1, 40, None, 0), (5, 0, None, 0), (5, 40, None, 0), (5, 40, 5.0, 0), (1, 40, 5.0, 24), (5, 40, 5.0, 24)]
    for rows, prefix, softcap, window in shapes:
        case = paged_attention.case(paged_attention.Work("tiny", 4, 2, 16, softcap, window, 2, rows, prefix), CPU)
        assert set(case.variants) == {"ours", "eager", "flex attention" if softcap else "sdpa"}
        for call in case.variants.values():
            assert case.error(call()) <= case.bound


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
