"""Repairs of Triton's interpreter that the tests need; import it where TRITON_INTERPRET=1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, _get_np_dtype

_cast = InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor
_patched: set[str] = set()


def _round_to_nearest(builder: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
    """To bfloat16, as hardware rounds; the interpreter cuts bits off, which doubles the error."""
    if str(to.scalar) != "bf16" or str(source.dtype.scalar) != "fp32":
        return _cast(builder, source, to)
    bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy()
    return TensorHandle(bits.view(_get_np_dtype(to)), to.scalar)


def _call(function: InterpretedFunction, *given: Any, **named: Any) -> Any:
    """A kernel's helper. The interpreter patches the language before each of these calls too, half of all its time.

    Once is enough: the kernel's start has patched ``tl``, and what it leaves for the standard library stays.
    """
    module = function.fn.__globals__
    if module["__name__"] not in _patched and not any(value is tl for value in module.values()):
        interpreter._patch_lang(function.fn)
        _patched.add(module["__name__"])
    return function.rewrite()(*given, **named)


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 converts arrays of one element to int, which NumPy 2.4 refuses unless they have no dimensions."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.squeeze()))


def repair() -> None:
    InterpreterBuilder.cast_impl = _round_to_nearest
    InterpretedFunction.__call__ = _call
    interpreter._patch_lang_tensor = _patch_tensor_and_index


class Reads:
    """Addresses of the elements that kernels have loaded, each as often as it was."""

    def __init__(self) -> None:
        self.addresses: list[np.ndarray] = []

    def of(self, tensor: torch.Tensor) -> list[int]:
        """Elements of a contiguous tensor, by their index."""
        at = np.concatenate([np.empty(0, np.int64), *self.addresses]).astype(np.int64) - tensor.data_ptr()
        size = tensor.element_size()
        return (at[(at >= 0) & (at < tensor.numel() * size)] // size).tolist()

    def count(self) -> int:
        return sum(part.size for part in self.addresses)


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """What interpreted kernels load while this is entered; lanes that a mask switches off load nothing."""
    reads, load = Reads(), InterpreterBuilder.create_masked_load

    def recording(builder: InterpreterBuilder, at: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any) -> Any:
        there = np.broadcast_to(mask.data, at.data.shape).astype(bool)
        reads.addresses.append(np.atleast_1d(at.data)[np.atleast_1d(there)])
        return load(builder, at, mask, *rest, **named)

    InterpreterBuilder.create_masked_load = recording
    try:
        yield reads
    finally:
        InterpreterBuilder.create_masked_load = load
