"""Triton kernels compiled as their launchers would launch them, for chips that need not be here.

Every operation has a module here with ``MODULES`` (where its kernels are), ``SHAPES`` (names), ``launches(shape)`` and
``multiplies(kernel, shape)``: whether tensor cores must be in use, or by which instruction if not by the chip's best.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
         torch.int8: "i8"}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CHIPS = tuple(TENSOR_CORES)


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    chips: tuple[int, ...] = CHIPS
    """On which it is launched so."""

    def only_for(self, chip: int) -> "Launch":
        return replace(self, chips=(chip,))

    @property
    def name(self) -> str:
        """The kernel, and which of its switches are on."""
        on = [p.name for p in self.kernel.params if p.is_constexpr and self.arguments[p.name] is True]
        return " ".join([self.kernel.__name__, *on])

    @property
    def warps(self) -> int:
        return self.options.get("num_warps", 4)


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel."""

    registers: int
    """Per thread."""
    spilled: int
    """Bytes of them, stored and loaded."""
    shared: int
    """Bytes of shared memory per program."""
    tensor_cores: str | None
    """The instruction that multiplies, if there is one."""
    load_bytes: int
    """Of global memory, most that one instruction of one thread reads: 16 (32 on chips that can) where loads vectorise."""


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            arguments = dict(zip(self.kernel.arg_names, given, strict=False)) | named
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return launch


@contextmanager
def recording(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Launches of kernels of these modules (whatever ends in ``_kernel``) are kept instead of made."""
    found: list[Launch] = []
    with ExitStack() as stack:
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), found)))
        yield found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def distinct(launches: list[Launch]) -> list[Launch]:
    """One of each name."""
    return list({launch.name: launch for launch in launches}.values())


def source(launch: Launch) -> ASTSource:
    """The specialisation that Triton's own launcher would choose."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and free):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, chip: int) -> CompiledKernel:
    """For compute capability ``chip`` / 10."""
    assert isinstance(launch.kernel, JITFunction), "TRITON_INTERPRET was set when Triton was imported"
    return triton.compile(source(launch), target=GPUTarget("cuda", chip, 32), options=launch.options)


def figures(launch: Launch, chip: int) -> Figures:
    """Of the compiled kernel."""
    kernel = compiled(launch, chip)
    ptx = kernel.asm["ptx"]
    registers, spilled = usage(ptx, chip)
    instruction = next((name for name in (TENSOR_CORES.get(chip), "mma.sync") if name and name in ptx), None)
    return Figures(registers, spilled, kernel.metadata.shared, instruction, widest_load(ptx))


def widest_load(ptx: str) -> int:
    """Bytes; loads into registers and asynchronous copies to shared memory, not those of the tensor memory accelerator."""
    loads = re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[bfsu](\d+)\s", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 0) for size in copies]
    return max(widths, default=0)


def usage(ptx: str, chip: int) -> tuple[int, int]:
    """Registers per thread, and bytes of them that are spilled."""
    target = re.findall(r"\.target (\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder, "kernel.ptx")
        at.write_text(ptx)
        command = [get_ptxas(chip).path, "-v", f"-arch={target}", at, "-o", at.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = re.findall(r"Used (\d+) registers", report)
    return int(registers[0]), sum(map(int, spilled))
