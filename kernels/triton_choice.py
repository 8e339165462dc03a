"""Whether an operation runs its Triton kernel."""

import functools
import importlib
import logging
import os

import torch
from torch import Tensor

from engine.kernels.native import Impl

logger = logging.getLogger("engine.kernels")


def reason_against_triton(tensor: Tensor) -> str | None:
    """Why kernels cannot run on this tensor; on CPU tensors they do under Triton's interpreter (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if not tensor.is_cuda and not (tensor.is_cpu and interpreted):
        return f"it needs tensors on a GPU, got {tensor.device}"
    if tensor.is_cuda and (unfit := _unfit(tensor.device)):
        return unfit
    if tensor.dtype is torch.float64:
        return "it needs float32, bfloat16 or float16 tensors, got float64"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return None


@functools.cache
def _unfit(device: torch.device) -> str | None:
    """Why no kernel can run on this device; said once in the log, as what runs instead is several times slower."""
    reason = _wrong_chip(device) or _cannot_launch()
    if reason:
        logger.warning("Triton kernels do not run on %s (%s): using PyTorch's operations instead", device, reason)
    return reason


def _cannot_launch() -> str | None:
    """Triton builds what it launches with from C at the first use: without a compiler it imports, and then fails."""
    try:
        importlib.import_module("triton.runtime.driver").driver.active.get_current_device()
    except Exception as error:
        return f"Triton cannot be used here: {type(error).__name__}: {error}"
    return None


def _wrong_chip(device: torch.device) -> str | None:
    """Why kernels whose tiles were chosen for other chips' registers and shared memory cannot run on this one."""
    if torch.version.hip:
        return (
            "its tiles are sized for NVIDIA's chips, several of them above the 64 KiB of shared memory that AMD's have"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"it needs compute capability 8.0 or higher, got {major}.{minor}" if major < 8 else None


def choose_triton(impl: Impl, tensor: Tensor, supported: bool, requirement: str) -> bool:
    """Whether to launch the Triton kernel: where it is asked for, and by default on a GPU.

    ``supported`` says whether the inputs fit the kernel, ``requirement`` what they must be; on a GPU it is said in the log,
    once for each requirement, that they do not.
    """
    if impl != "triton" and not (impl == "auto" and (tensor.is_cuda or (tensor.is_cpu and forced_on_cpus()))):
        return False
    reason = reason_against_triton(tensor)
    if reason is None and not supported:
        reason = f"it needs {requirement}"
        if impl == "auto":
            _say_unsupported(requirement)
    if reason and impl == "triton":
        raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto" or impl="torch"')
    return reason is None


@functools.cache
def forced_on_cpus() -> bool:
    """Whether CPU tensors are treated like a GPU's: with ``DIFFPO_KERNELS=triton`` the engine runs on its Triton kernels in
    Triton's interpreter, for tests."""
    return os.environ.get("DIFFPO_KERNELS") == "triton"


@functools.cache
def _say_unsupported(requirement: str) -> None:
    logger.warning("a Triton kernel is not launched, PyTorch's operations run instead: it needs %s", requirement)


def is_triton_layout(*tensors: Tensor | None) -> bool:
    """Whether all that are given are contiguous, on one device, and need no gradient."""
    given = [t for t in tensors if t is not None]
    grad = torch.is_grad_enabled()
    return all(t.is_contiguous() and t.device == given[0].device and not (grad and t.requires_grad) for t in given)
