"""Every Triton kernel compiled ahead of time, as its launcher would launch it, for chips that need not be here.

Registers, spills and shared memory are printed (pytest -s) and bounded.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import Problem
from engine.kernels.consistency_loss.triton_rows import Chunk

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from engine.kernels.consistency_loss import triton_dense, triton_math, triton_recompute  # noqa: E402

pytestmark = pytest.mark.slow

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MODULES = (triton_dense, triton_math, triton_recompute)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    found: list[Launch] = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(d: int, v: int, rows: int, softcap: float | None, dtype: torch.dtype, extras: bool) -> Problem:
    index = meta(rows, dtype=torch.int64)
    return Problem(
        meta(rows, d, dtype=dtype), meta(rows, d, dtype=dtype), meta(v, d, dtype=dtype),
        meta(v, dtype=dtype) if extras else None, index, index, meta(rows), meta(rows), softcap, 2.0 if extras else 1.0,
        0.0, "dense",
    )  # fmt: skip


def record(p: Problem, stats: bool) -> None:
    """Every launch of both plans, of one chunk and one block of columns."""
    index = meta(p.labels.numel() // 8, dtype=torch.int64)
    part = Chunk(index[:0], index[:0], index, index, index, index, index)
    z = triton_dense._buffer(p, part.rows, torch.float32)
    g = triton_dense._buffer(p, part.rows, p.weight.dtype)
    sums = triton_dense.row_sums(p, z, part.labels(p), stats)
    triton_dense._differences(p, part, z, sums, part.scale(p), g, True)
    hidden = part.hidden(p)
    sums = triton_recompute.row_sums(p, hidden, part.labels(p), stats)
    width = min(p.weight.shape[0], triton_recompute.block_width(p, part))
    log_p = meta(part.heads, width)
    block = slice(0, width)
    triton_recompute._differences(p, part, hidden, part.labels(p), sums, part.scale(p), g[:, :width], log_p, block)


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


def usage(ptx: str, capability: int, at: Path) -> tuple[int, int]:
    """Registers per thread, and bytes of them that are spilled."""
    at.write_text(ptx)
    target = re.findall(r"\.target (\w+)", ptx)[0]
    command = [get_ptxas(capability).path, "-v", f"-arch={target}", at, "-o", at.with_suffix(".cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = re.findall(r"Used (\d+) registers", report)
    return int(registers[0]), sum(map(int, spilled))


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("d", "v", "softcap", "dtype", "extras"),
    [
        (3584, 256000, 30.0, torch.bfloat16, False),
        (4096, 128256, None, torch.bfloat16, False),
        (4096, 128256, 30.0, torch.bfloat16, True),
        (123, 50257, None, torch.float32, False),
    ],
)
def test_no_spills(
    d: int, v: int, softcap: float | None, dtype: torch.dtype, extras: bool, capability: int,
    launches: list[Launch], tmp_path: Path,
) -> None:  # fmt: skip
    """``extras``: bias, temperature and statistics."""
    record(problem(d, v, 8192, softcap, dtype, extras), extras)
    assert {launch.kernel.__name__ for launch in launches} == {
        "sums_kernel", "differences_kernel", "combine_kernel", "project_sums_kernel", "project_differences_kernel",
    }  # fmt: skip
    for launch in launches:
        assert isinstance(launch.kernel, JITFunction), "TRITON_INTERPRET was set when Triton was imported"
        compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
        registers, spilled = usage(compiled.asm["ptx"], capability, tmp_path / "kernel.ptx")
        shared = compiled.metadata.shared
        name = launch.kernel.__name__
        print(f"sm_{capability} {name} D={d} V={v}: {registers} registers, {spilled} spilled, {shared} shared")
        # Triton 3.6 puts two registers of one kernel on the stack of sm_100
        assert spilled <= (8 if triton.__version__ < "3.9" and capability == 100 else 0), name
        assert shared <= SHARED_LIMIT[capability], name
        assert registers * 32 * launch.options.get("num_warps", 4) <= 65536, name
        if "project" not in name:
            assert registers <= 128, name  # two programs of four warps at least on every quarter of a multiprocessor
        elif dtype is not torch.float32:
            unit = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
            assert unit in compiled.asm["ptx"], name


def test_grids_fit(launches: list[Launch]) -> None:
    """At most 2^31 - 1 programs in the first dimension and 65535 in the others, whatever the shape."""
    for d, v, rows in ((64, 1 << 23, 8192), (4096, 256000, 1 << 20)):
        record(problem(d, v, rows, None, torch.bfloat16, False), True)
    for launch in launches:
        first, *others = launch.grid
        assert 0 < first < 1 << 31
        assert all(size <= 65535 for size in others)
