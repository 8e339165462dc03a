"""Loading of the C++ CPU kernels (csrc/) and the choice between them and the PyTorch reference."""

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "cpp", "triton"]

logger = logging.getLogger("engine.kernels")


@dataclass(frozen=True, slots=True)
class Native:
    """The loaded extension and the table of functions for one instruction set."""

    module: ModuleType
    table: int
    name: str
    process: int

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether products with bfloat16 weights round the other operand to bfloat16; sums are float32 everywhere."""
        return self.name == "avx512_bf16"

    @property
    def outruns_blas(self) -> bool:
        """Whether float32 products are faster by these kernels than by MKL, which keeps AVX-512 to Intel's processors."""
        return self.name.startswith("avx512") and torch.backends.mkl.is_available() and not self.module.made_by_intel()

    @property
    def threads(self) -> int:
        """Threads to use: torch's setting; 1 in a forked child, where OpenMP's pool of threads no longer exists."""
        return torch.get_num_threads() if os.getpid() == self.process else 1


@functools.cache
def native() -> Native | None:
    """The C++ kernels for this processor, or None (said once in the log) where they were not built.

    ``DIFFPO_CPU_KERNELS`` forces one of ``avx512_bf16``, ``avx512``, ``avx2``, ``portable`` or ``torch`` (none of them).
    """
    wanted = os.environ.get("DIFFPO_CPU_KERNELS") or None
    if wanted == "torch":
        return None
    try:
        module = importlib.import_module("engine.kernels._cpu")
    except ImportError as error:
        logger.warning("C++ CPU kernels not available (%s): using the slower PyTorch implementations", error)
        return None
    table, name = module.kernels(wanted)
    return Native(module, table, name, os.getpid())


def native_name() -> str:
    """CPU kernels in use: ``avx512_bf16``, ``avx512``, ``avx2``, ``portable``, or ``torch`` without the extension."""
    library = native()
    return library.name if library else "torch"


def choose(impl: Impl, supported: bool, requirement: str) -> Native | None:
    """The library to call, or None for the reference; ``supported`` says whether the inputs fit the C++ kernel."""
    if impl == "torch" or (impl == "auto" and not supported):
        return None
    library = native()
    if impl == "cpp" and (library is None or not supported):
        reason = f"it needs {requirement}" if library else "the C++ extension is not built"
        raise ValueError(f'impl="cpp" cannot run here: {reason}; use impl="auto" or impl="torch"')
    if impl not in ("auto", "cpp"):
        raise ValueError(f'impl must be "auto", "torch", "cpp" or "triton", got {impl!r}')
    return library


def is_native_layout(*tensors: Tensor | None) -> bool:
    """Whether every given tensor is a contiguous float32 CPU tensor, what the C++ kernels read, and needs no gradient."""
    grad = torch.is_grad_enabled()
    return all(
        t is None or (t.dtype is torch.float32 and t.is_contiguous() and t.is_cpu and not (grad and t.requires_grad))
        for t in tensors
    )


def new_output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised CPU memory for a kernel to fill, whatever the process's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def is_native_index(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether every tensor is a contiguous CPU tensor of ``dtype``, as the C++ kernels read indices and positions."""
    return all(t.dtype is dtype and t.is_contiguous() and t.is_cpu for t in tensors)


def address(tensor: Tensor | None) -> int:
    """Data pointer for the extension; 0 stands for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()
