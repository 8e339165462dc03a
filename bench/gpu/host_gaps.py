"""How long the device has nothing to do between two steps of a refinement, because the host is late."""

import statistics
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from engine import device_loop

FIRST, LAST = "plan_kernel", "accept_kernel"
"""The kernels that a step begins and ends with: those of jacobi_pack and jacobi_accept."""


class Work(NamedTuple):
    """Something the device did, from ``start`` to ``end`` in microseconds."""

    name: str
    start: float
    end: float


def host_gaps(refine: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds between consecutive steps of ``refine()`` in which the device idled, by the profiler's record of it.

    What the profiler costs the host makes them longer, never shorter. On a CPU, where the host does the work itself, it
    is the time outside of PyTorch's operations.
    """
    for _ in range(3):  # kernels are compiled, graphs captured, graphs replayed
        refine()
    work = recorded(refine, device)
    gaps = idle_between_steps(work)
    if not gaps:
        raise RuntimeError("the profiler saw no two steps: is the refinement moved by the device loop?")
    return {
        "steps": len(gaps) + 1, "median_seconds": statistics.median(gaps), "most_seconds": max(gaps),
        "median_step_seconds": statistics.median(step_seconds(work)),
    }  # fmt: skip


def recorded(refine: Callable[[], object], device: torch.device) -> list[Work]:
    """Kernels and copies on a GPU; on a CPU operations, with the steps' first and last named like the kernels."""
    on_gpu = device.type == "cuda"
    with ExitStack() as stack:
        if not on_gpu:
            stack.enter_context(mock.patch.object(device_loop, "jacobi_pack", named(FIRST, device_loop.jacobi_pack)))
            stack.enter_context(mock.patch.object(device_loop, "jacobi_accept", named(LAST, device_loop.jacobi_accept)))
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        profiler = stack.enter_context(profile(activities=[activity]))
        refine()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind and event.cpu_parent is None]
    return [Work(event.name, event.time_range.start, event.time_range.end) for event in events]


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return run


def step_seconds(work: Iterable[Work]) -> list[float]:
    """From each step's first kernel to its last one's end; in the loop, where a step is launched for all of its slots."""
    found: list[float] = []
    start: float | None = None
    for one in sorted(work, key=lambda one: one.start):
        if one.name == FIRST:
            start = one.start
        elif one.name == LAST and start is not None:
            found.append((one.end - start) / 1e6)
    return found


def idle_between_steps(work: Iterable[Work]) -> list[float]:
    """Seconds from each step's last kernel to the next one's first, less what was done meanwhile, such as copies."""
    gaps: list[float] = []
    busy_until: float | None = None  # since the last step ended
    idle = 0.0
    for one in sorted(work, key=lambda one: one.start):
        if busy_until is not None:
            idle += max(0.0, one.start - busy_until)
            busy_until = max(busy_until, one.end)
        if one.name == FIRST and busy_until is not None:
            gaps.append(idle / 1e6)
            busy_until = None
        elif one.name == LAST:
            busy_until, idle = one.end, 0.0
    return gaps
