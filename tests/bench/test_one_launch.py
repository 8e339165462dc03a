"""Many steps of the device loop in one launch: what a GPU would be told, carried out by a stand-in for its driver."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.gpu.one_launch import BEGIN, REPEAT, SOURCE, Recorder, Repeated, RepeatingGraph, Step, Uncaptured
from engine.kernels import Field, JacobiState, Phase
from engine.scheduler import Scheduler
from engine.step_runner import GraphRunner
from tests.engine.test_device_loop import OPTIONS, TOKENS, make, run, start
from tests.engine.test_device_loop_graphs import assert_as_on_the_host

AS_CPP = "".join(
    f"#define {word}\n" for word in ("__device__", "__global__", "__device_builtin__", "__cudart_builtin__")
)
CONDITION = """
unsigned int condition;
void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int value) { condition = value; }
"""


class Driver:
    """CUDA's driver as far as graphs go: nodes run in order, kernels are SOURCE compiled for the CPU."""

    CUDA_VERSION = 13000
    CUgraph = staticmethod(lambda raw: raw)
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")

    def __init__(self, folder: Path) -> None:
        (folder / "kernels.cpp").write_text(AS_CPP + SOURCE + CONDITION)
        subprocess.run(["g++", "-shared", "-fPIC", "-o", "kernels.so", "kernels.cpp"], cwd=folder, check=True)
        self._library = ctypes.CDLL(str(folder / "kernels.so"))
        self._condition = ctypes.c_uint.in_dll(self._library, "condition")
        self.functions = {name: getattr(self._library, name.decode()) for name in (BEGIN, REPEAT)}
        self.destroyed: list[str] = []

    def CUgraphNodeParams(self) -> SimpleNamespace:
        return SimpleNamespace(conditional=SimpleNamespace())

    def cuGraphCreate(self, flags: int) -> tuple[int, Any]:
        return 0, []

    def cuCtxGetCurrent(self) -> tuple[int, str]:
        return 0, "context"

    def cuGraphConditionalHandleCreate(self, graph: Any, context: str, value: int, flags: int) -> tuple[int, int]:
        return 0, 7

    def cuGraphAddKernelNode(self, graph: Any, behind: Any, count: int, node: Any) -> tuple[int, Any]:
        values, types = node.kernelParams
        assert values[0] == 7
        assert (
            (node.gridDimX, node.gridDimY, node.gridDimZ)
            == (node.blockDimX, node.blockDimY, node.blockDimZ)
            == (1, 1, 1)
        )
        return self._add(
            graph, behind, count, lambda: node.func(*(kind(v) for v, kind in zip(values, types, strict=True)))
        )

    def cuGraphAddChildGraphNode(self, graph: Any, behind: Any, count: int, child: Any) -> tuple[int, Any]:
        return self._add(graph, behind, count, child)

    def cuGraphAddNode(self, graph: Any, behind: Any, kinds: Any, count: int, node: Any) -> tuple[int, Any]:
        loop, body = node.conditional, []
        assert (node.type, loop.type, loop.handle, loop.ctx, loop.size) == ("conditional", "while", 7, "context", 1)
        loop.phGraph_out = [body]

        def repeat() -> None:
            while self._condition.value:
                self.cuGraphLaunch(body, 0)

        return self._add(graph, behind, count, repeat)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return 0, tuple(graph)

    def cuGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        for node in graph:
            node()
        return (0,)

    def cuGraphExecDestroy(self, executable: Any) -> tuple[int]:
        self.destroyed.append("executable")
        return (0,)

    def cuGraphDestroy(self, graph: Any) -> tuple[int]:
        self.destroyed.append("graph")
        return (0,)

    def _add(self, graph: Any, behind: Any, count: int, work: Callable[[], object]) -> tuple[int, Any]:
        assert list(behind) == graph[-1:]  # what is there runs before
        assert count == len(behind)
        graph.append(work)
        return 0, work


class Child(Step):
    """A captured step as the driver stand-in takes it."""

    def raw_cuda_graph(self) -> Callable[[], None]:
        return self.replay


class Children(Uncaptured):
    def capture(self, step: Callable[[], None]) -> Child:
        return Child(step)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    return Driver(tmp_path_factory.mktemp("driver"))


def repeating(driver: Driver, phases: Tensor, **most: int) -> Callable[[Any], RepeatingGraph]:
    return partial(RepeatingGraph, phases=phases, functions=driver.functions, driver=driver, **most)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_launch_ends_with_a_sequence_or_with_its_steps(driver: Driver, on_device: bool) -> None:
    fields = torch.zeros(5, len(Field), dtype=torch.int32)
    phases = fields[:, Field.PHASE]
    left = torch.zeros(5, dtype=torch.int32)
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        left.sub_(1)
        phases[(phases == Phase.RUNNING) & (left <= 0)] = Phase.LENGTH

    make_graph = repeating(driver, phases, most=6) if on_device else partial(Repeated, phases=phases, most=6)
    graph = make_graph(Child(step))
    taken = []
    graph.replay()  # nothing runs yet
    assert not steps
    for slot, length in {0: 3, 2: 12, 4: 3}.items():
        phases[slot], left[slot] = Phase.RUNNING, length
    while (phases == Phase.RUNNING).any():
        steps.clear()
        graph.replay()
        taken.append(len(steps))
    assert taken == [3, 6, 3]  # two end at once; as many as it may; the last one ends
    graph.reset()
    if on_device:
        assert driver.destroyed[-2:] == ["executable", "graph"]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(TOKENS.filter(bool), TOKENS, OPTIONS, st.booleans()), min_size=1, max_size=6),
    st.sampled_from([(512, 4), (20, 3)]),
)
@pytest.mark.parametrize("on_device", [False, True])
def test_answers_are_those_of_the_host(
    driver: Driver,
    on_device: bool,
    cases: list[tuple[list[int], list[int], dict[str, Any], bool]],
    limits: tuple[int, int],
) -> None:
    assert_as_on_the_host(in_few_launches(driver if on_device else None, *limits)[0], cases)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_sequence_alone_takes_one_launch(driver: Driver, on_device: bool) -> None:
    scheduler, recorder = in_few_launches(driver if on_device else None, 512, 4)
    first, second = (start([5, 10], [], max_new_tokens=30, window=3) for _ in range(2))
    run(scheduler, [first])
    before = recorder.launches
    run(scheduler, [second])
    assert second.steps > 5
    assert recorder.launches - before == 2  # one more before the host has read that it ended, which does nothing
    scheduler.close()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs CUDA's compiler")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile(tmp_path: Path, chip: str) -> None:
    (tmp_path / "kernels.cu").write_text(SOURCE)
    subprocess.run(["nvcc", "-cubin", "-arch", chip, "-o", "kernels.cubin", "kernels.cu"], cwd=tmp_path, check=True)
    code = (tmp_path / "kernels.cubin").read_bytes()
    assert BEGIN in code
    assert REPEAT in code


def in_few_launches(driver: Driver | None, max_batch_tokens: int, max_batch_size: int) -> tuple[Scheduler, Recorder]:
    scheduler = make(True, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size)
    loop = scheduler.loop
    assert loop is not None
    recorder = of(driver, loop.state)
    loop._runner = GraphRunner(loop._step, recorder)
    return scheduler, recorder


def of(driver: Driver | None, state: JacobiState) -> Recorder:
    return Recorder(Children(), repeating(driver, state[Field.PHASE])) if driver else Recorder.of(state)
