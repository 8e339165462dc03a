"""The Triton plans of the consistency loss in CUDA graphs; run as consistency_loss_triton_cases.py is."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.kernels.consistency_loss import triton, triton_dense, triton_products, triton_rows
from engine.kernels.consistency_loss.problem import Needs
from tests.kernels.consistency_loss_triton_cases import INTERPRETED, check, make
from tests.kernels.references import randn

GPU, HALF = torch.device("cuda", 0), torch.bfloat16
NEEDS = Needs(True, True, True, False, False)


class Capture:
    """Stands in for CUDA's, and for the trial that must not run during one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.trials = False, 0
        monkeypatch.setattr(triton_products, "_ADDS", {})
        monkeypatch.setattr(triton_products, "_tried", self.tried)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.on)

    def tried(self, device: torch.device, dtype: torch.dtype) -> bool:
        assert not self.on, "a trial during a capture"
        self.trials += 1
        return True


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    return Capture(monkeypatch)


def test_nothing_is_tried_during_a_capture(capture: Capture) -> None:
    """What is not known counts as no, and is found out later; what is known stays so."""
    like = SimpleNamespace(is_cuda=True, device=GPU, dtype=HALF)
    capture.on = True
    triton_products.ask_once(like)
    assert not triton_products._adds_in_place(GPU, HALF)
    capture.on = False
    triton_products.ask_once(like)
    assert capture.trials == 1
    capture.on = True
    assert triton_products._adds_in_place(GPU, HALF)
    assert not triton_products._adds_in_place(GPU, torch.float16)


@pytest.mark.parametrize(("is_cuda", "dtype"), [(False, HALF), (True, torch.float32)])
def test_what_needs_no_trial_has_none(capture: Capture, is_cuda: bool, dtype: torch.dtype) -> None:
    triton_products.ask_once(SimpleNamespace(is_cuda=is_cuda, device=GPU, dtype=dtype))
    assert capture.trials == 0


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("plan", ["dense", "recompute"])
def test_the_loss_asks_before_it_works(plan: str, weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager pass may need one chunk where a captured one needs several, which add: asking when that happens is too late."""
    asked = []
    monkeypatch.setattr(triton, "ask_once", lambda like: asked.append(like.dtype))
    triton.loss_and_gradients(make(3, [0, 1], 8, 20, plan=plan, dtype=HALF), replace(NEEDS, weight=weight))
    assert asked == [HALF] * weight


def test_a_graph_gets_dense_whatever_is_free(capture: Capture) -> None:
    p = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    capture.on = True
    assert triton._fits(p, 1 << 60)


@pytest.mark.parametrize("rows", [1, 5, 11, 20])
def test_products_are_added_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the place of adding in place, on a CPU and during a capture."""
    monkeypatch.setattr(triton_products, "BLOCK", 5)
    a, b, to = randn(0, rows, 7, dtype=HALF), randn(1, 7, 9, dtype=HALF), randn(2, rows, 9)
    exact = to.double() + a.double() @ b.double()
    triton_products.accumulate(to, a, b, False)
    torch.testing.assert_close(to.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_capture_with_more_chunks_than_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a term are left out of an eager pass, which then has one chunk; the graph has three."""
    p = make(9, [0, 2], 16, 50, dtype=HALF)
    monkeypatch.setattr(triton_dense, "capacity", lambda p, needs: 8)
    with monkeypatch.context() as patch:  # compiles what the graph will launch
        patch.setattr(triton_dense, "chunks", lambda p, needs, rows: list(triton_rows.static_chunks(p, rows)))
        triton.loss_and_gradients(p, NEEDS)
    monkeypatch.setattr(triton_products, "_ADDS", {})
    triton.loss_and_gradients(p, NEEDS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.loss_and_gradients(p, NEEDS)
    graph.replay()
    check(p, NEEDS, out)
