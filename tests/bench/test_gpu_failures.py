"""What of ours is wrong fails the GPU benchmark; what breaks the GPU's use does not end it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from bench import bench_consistency_loss_gpu
from bench.consistency_loss_gpu_variants import eager
from bench.gpu import kernels
from bench.gpu.case import Case
from bench.gpu.restart import DeviceLost
from bench.gpu.run import ours_failed
from bench.gpu.timing import Stopwatch
from engine.roofline import Roofline
from tests.bench.gpu_cases import CPU, case_of, interpreted


def test_behind_a_fault_of_the_gpu_another_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that were measured are left alone, the one that broke it included."""
    x, measured = torch.arange(6.0), []

    def fault() -> object:
        monkeypatch.setattr(kernels, "lost", lambda device: True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def cases(name: str, ours: Callable[[], object], device: torch.device, *, tiny: bool) -> Iterator[Case]:
        for shape in ("first", "second"):
            measured.append((name, shape))
            yield case_of({"ours": ours, "eager": lambda: 2 * x}, 2 * x, shape)

    monkeypatch.setattr(kernels, "OPERATIONS", ("good", "faulty", "later"))
    for name, ours in (("good", lambda: 2 * x), ("faulty", fault), ("later", lambda: 2 * x)):
        monkeypatch.setitem(sys.modules, f"bench.gpu.{name}", SimpleNamespace(cases=partial(cases, name, ours)))
    options: dict[str, Any] = {"tiny": True, "deadline": time.monotonic() + 60}
    results: list[dict[str, Any]] = []
    with pytest.raises(DeviceLost):
        results.extend(kernels.measure(Stopwatch(CPU), Roofline(1e9, 1e9), **options))
    found = results[-1]
    assert [record["shape"] for record in found["faulty"]] == ["first"]
    assert "eager" not in found["faulty"][0]["variants"]  # would fail for no fault of its own
    monkeypatch.setattr(kernels, "lost", lambda device: False)
    *_, found = kernels.measure(Stopwatch(CPU), Roofline(1e9, 1e9), before=found, **options)
    assert measured == [
        ("good", "first"),
        ("good", "second"),
        ("faulty", "first"),
        ("later", "first"),
        ("later", "second"),
    ]
    assert ours_failed(found)
    assert not ours_failed({name: found[name] for name in ("good", "later")})


FAULT = """
import sys
from bench.gpu import kernels, rms_norm
from bench.gpu.run import main
def fault(device, *, tiny):
    kernels.lost = lambda device: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
rms_norm.cases = fault
sys.argv = ["run", "--stages", "kernels", "--dry-run", "--seconds", "200"]
main()
"""


FAULT_IN_LOSS = """
import sys
from bench import bench_consistency_loss_gpu as bench
def fault():
    bench.lost = lambda device: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
bench.BUILDERS["triton recompute"] = fault
sys.argv = ["loss", "--dry-run", "--seconds", "200"]
bench.main()
"""


@pytest.mark.slow
def test_the_benchmark_goes_on_in_another_process_behind_a_fault(tmp_path: Path) -> None:
    """Which has neither the fault nor what made it, so that all that is left can be measured."""
    done = interpreted(FAULT, OUT=str(tmp_path), TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "kernels_gpu_dry_run.json").read_text())["kernels"]
    assert tuple(found) == kernels.OPERATIONS
    assert "illegal memory access" in found["rms_norm"][0]["error"]
    others = [record["variants"]["ours"] for name, records in found.items() if name != "rms_norm" for record in records]
    assert all("median_seconds" in ours and "error" not in ours for ours in others)


@pytest.mark.slow
def test_so_does_that_of_the_loss(tmp_path: Path) -> None:
    done = interpreted(FAULT_IN_LOSS, OUT=str(tmp_path), TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "consistency_loss_gpu_dry_run.json").read_text())["tiny"]
    assert "illegal memory access" in found["variants"]["triton recompute"]["error"]
    for name in ("triton dense", "triton sparse", "eager"):
        assert found["variants"][name]["median_seconds"] > 0
        assert found["gradient_errors"]["distance 0.3"][name].keys() == {"target", "draft", "weight"}


def test_what_is_wrong_with_the_loss_is_an_error() -> None:
    x = bench_consistency_loss_gpu.make(8, 300, 32, 30.0, "cpu")

    def off(factor: float) -> Callable[[], Callable[[Any], None]]:
        def run(x: Any) -> None:
            eager(x)
            x.draft.grad *= factor

        return lambda: run

    wide = bench_consistency_loss_gpu.Inputs(
        *(leaf.detach().float().requires_grad_() for leaf in x.leaves()), x.labels, x.pairs, x.softcap
    )
    names = bench_consistency_loss_gpu.OURS
    builders = dict(zip(names, (off(1.0), off(1.01), off(1.01)), strict=True)) | {"eager": off(2.0)}
    found: dict[str, Any] = {}
    with mock.patch.object(bench_consistency_loss_gpu, "BUILDERS", builders):
        bench_consistency_loss_gpu.gradient_errors(wide, found, time.monotonic() + 60, lambda: None)
    results = {"machine": {}, "omega": 1e3, "tiny": {"variants": {}, "gradient_errors": {"near": found}}}
    [error] = bench_consistency_loss_gpu.errors_of_ours(results)
    # the sparse plan may be off by as much, and eager by more
    assert error.startswith(
        "tiny, gradients, near, triton recompute: wrong: the gradient of draft is off by 0.01, 0.002"
    )
    results["tiny"]["variants"] = {
        "triton dense": {"error": "RuntimeError: no"},
        "liger": {"error": "ModuleNotFoundError"},
    }
    results["tiny"]["density"] = {"error": "RuntimeError: neither"}
    assert len(bench_consistency_loss_gpu.errors_of_ours(results)) == 3
