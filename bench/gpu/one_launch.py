"""A trial, not part of the engine: the steps of a refinement as one launch, a CUDA graph that repeats a step by itself.

The device loop launches step after step and reads their results one step late. A graph whose WHILE node has the step for its
body (CUDA C++ Programming Guide, "Conditional Graph Nodes"; CUDA 12.4 and later) saves the host's launches and the pause
between two graphs. Until it ends, no sequence comes in, nobody sees an iterate and the room for rows stays as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_int, c_uint64, c_void_p
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from engine import RefineOptions, Result, step_runner
from engine.kernels import Field, JacobiState, Phase
from engine.refiner import Refiner
from engine.step_runner import Graph, GraphRunner

MOST_STEPS = 512
"""Of one launch."""
BEGIN, REPEAT = b"begin_steps", b"repeat_step"
SOURCE = f"""
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int);

static __device__ int running(const int *phases, int stride, int slots) {{
    int count = 0;
    for (int slot = 0; slot < slots; ++slot) count += phases[(long long)slot * stride] == {int(Phase.RUNNING)};
    return count;
}}

// book: sequences that run when the launch begins, and steps that are left to it
extern "C" __global__ void {BEGIN.decode()}(
    cudaGraphConditionalHandle handle, const int *phases, int stride, int slots, int *book, int most) {{
    book[0] = running(phases, stride, slots);
    book[1] = most;
    cudaGraphSetConditional(handle, book[0] > 0);
}}

extern "C" __global__ void {REPEAT.decode()}(
    cudaGraphConditionalHandle handle, const int *phases, int stride, int slots, int *book, int) {{
    cudaGraphSetConditional(handle, --book[1] > 0 && running(phases, stride, slots) == book[0]);
}}
"""
"""One thread each, the same arguments: at most a few hundred slots, of which a page's worth of bytes is read."""


class Captured(Graph, Protocol):
    """torch.cuda.CUDAGraph, made with ``keep_graph``."""

    def raw_cuda_graph(self) -> int: ...


class OneLaunch:
    """A refiner's requests moved with few launches: each ends with the first of the sequences, or after MOST_STEPS.

    Its refiner may be used as before in between. On a device that is not a GPU the host repeats the steps.
    """

    def __init__(self, refiner: Refiner) -> None:
        scheduler = refiner._scheduler
        if scheduler is None or scheduler.loop is None:
            raise RuntimeError("this refiner's requests are moved by the host: is DIFFPO_LOOP host?")
        self._refiner, self._loop = refiner, scheduler.loop
        self._recorder = Recorder.of(self._loop.state)
        self._runner = GraphRunner(self._loop._step, self._recorder)

    @property
    def launches(self) -> int:
        """Of graphs, so far."""
        return self._recorder.launches

    def refine(self, requests: Any, options: RefineOptions) -> list[Result]:
        before, self._loop._runner = self._loop._runner, self._runner
        try:
            return self._refiner.refine(requests, options)
        finally:
            self._loop._runner = before

    def close(self) -> None:
        self._runner.close()


class Recorder:
    """Makes what ``inner`` captures the body of a loop."""

    def __init__(self, inner: step_runner.Recorder, repeated: Callable[[Any], Graph]) -> None:
        self._inner, self._repeated = inner, repeated
        self.launches = 0

    @classmethod
    def of(cls, state: JacobiState) -> "Recorder":
        """For the device that a loop's state is on."""
        phases, device = state[Field.PHASE], state.fields.device
        if device.type != "cuda":
            return cls(Uncaptured(), partial(Repeated, phases=phases))
        driver, functions = loaded(device)
        repeated = partial(RepeatingGraph, phases=phases, functions=functions, driver=driver)
        return cls(step_runner.CudaRecorder(device, keep_graph=True), repeated)

    def side_stream(self) -> AbstractContextManager[None]:
        return self._inner.side_stream()

    def capture(self, step: Callable[[], None]) -> Graph:
        return Counted(self._repeated(self._inner.capture(step)), self)


class Counted:
    """A graph whose launches its recorder counts."""

    def __init__(self, graph: Graph, recorder: Recorder) -> None:
        self._graph, self._recorder = graph, recorder

    def replay(self) -> None:
        self._recorder.launches += 1
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()


class Uncaptured:
    """A recorder without a GPU."""

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> "Step":
        return Step(step)


class Step:
    """A step that stands for its graph."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step

    def reset(self) -> None:
        pass


class Repeated:
    """What RepeatingGraph does, done by the host."""

    def __init__(self, step: Graph, phases: Tensor, most: int = MOST_STEPS) -> None:
        self._step, self._phases, self._most = step, phases, most

    def replay(self) -> None:
        begun = self._running()
        for _ in range(self._most):
            if not begun or self._running() != begun:
                return
            self._step.replay()

    def reset(self) -> None:
        self._step.reset()

    def _running(self) -> int:
        return int((self._phases == Phase.RUNNING).sum())


class RepeatingGraph:
    """begin -> while (condition) {step -> repeat}.

    ``phases``: [slots] int32, a column of the loop's state. ``functions``: the kernels of SOURCE, as ``loaded`` has them.
    """

    def __init__(
        self, step: Captured, phases: Tensor, functions: dict[bytes, Any], driver: ModuleType, most: int = MOST_STEPS
    ) -> None:
        self._driver, self._step, self._device = driver, step, phases.device
        self._book = torch.zeros(2, dtype=torch.int32, device=phases.device)
        graph = checked(driver.cuGraphCreate(0))
        context = checked(driver.cuCtxGetCurrent())
        handle = checked(driver.cuGraphConditionalHandleCreate(graph, context, 0, 0))
        arguments = (
            (int(handle), phases.data_ptr(), phases.stride(0), len(phases), self._book.data_ptr(), most),
            (c_uint64, c_void_p, c_int, c_int, c_void_p, c_int),
        )
        begin = self._kernel(graph, [], functions[BEGIN], arguments)
        body = self._while(graph, begin, handle, context)
        repeated = checked(driver.cuGraphAddChildGraphNode(body, [], 0, driver.CUgraph(step.raw_cuda_graph())))
        self._kernel(body, [repeated], functions[REPEAT], arguments)
        self._graph, self._executable = graph, checked(driver.cuGraphInstantiate(graph, 0))

    def replay(self) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        checked(self._driver.cuGraphLaunch(self._executable, stream))

    def reset(self) -> None:
        checked(self._driver.cuGraphExecDestroy(self._executable))
        checked(self._driver.cuGraphDestroy(self._graph))
        self._step.reset()

    def _kernel(self, graph: Any, behind: Sequence[Any], function: Any, arguments: tuple[Any, Any]) -> Any:
        node = self._driver.CUDA_KERNEL_NODE_PARAMS()
        node.func, node.kernelParams, node.sharedMemBytes = function, arguments, 0
        node.gridDimX = node.gridDimY = node.gridDimZ = node.blockDimX = node.blockDimY = node.blockDimZ = 1
        return checked(self._driver.cuGraphAddKernelNode(graph, list(behind), len(behind), node))

    def _while(self, graph: Any, behind: Any, handle: Any, context: Any) -> Any:
        """Adds the loop and returns its body, which is empty."""
        driver = self._driver
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle, node.conditional.ctx, node.conditional.size = handle, context, 1
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        # CUDA 13 asks for the kinds of dependencies too; None: what is behind waits for the whole node
        kinds = [] if driver.CUDA_VERSION < 13000 else [None]
        checked(driver.cuGraphAddNode(graph, [behind], *kinds, 1, node))
        return node.conditional.phGraph_out[0]


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA's bindings returns behind its error."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"building a graph that repeats a step: {error}")
    return values[0] if len(values) == 1 else values


def compiled(driver: ModuleType, nvrtc: ModuleType, capability: tuple[int, int]) -> bytes:
    """SOURCE as machine code for a chip, which needs no GPU."""
    program = checked(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"one_launch.cu", 0, [], []))
    option = f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()
    (error,) = nvrtc.nvrtcCompileProgram(program, 1, [option])
    if int(error) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{error}: {log.decode().strip()}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code


def loaded(device: torch.device) -> tuple[ModuleType, dict[bytes, Any]]:
    """The driver's bindings, which torch brings along, and the kernels of SOURCE on this device."""
    from cuda.bindings import driver, nvrtc

    torch.cuda.current_stream(device)  # makes PyTorch's context, in which the module is loaded
    module = checked(driver.cuModuleLoadData(compiled(driver, nvrtc, torch.cuda.get_device_capability(device))))
    return driver, {name: checked(driver.cuModuleGetFunction(module, name)) for name in (BEGIN, REPEAT)}
