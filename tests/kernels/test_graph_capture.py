"""What a CUDA graph records may depend on shapes alone.

Tensors on the meta device have nothing else: whoever asks one for a value, or for a shape that depends on values, fails.
"""

import pytest
import torch
from torch import Tensor

from engine.kernels import LinearWeight, embedding, linear, linear_argmax


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_and_embedding_ask_for_no_values(dtype: torch.dtype) -> None:
    """The launchers of Triton kernels are recorded on such tensors too, by the ahead-of-time compilation."""
    weight = LinearWeight.from_dense(meta(300, 64, dtype=dtype))
    assert not weight.packed
    x, ids = meta(7, 64, dtype=dtype), meta(7, dtype=torch.int64)
    assert linear(x, weight, meta(300, dtype=dtype)).shape == (7, 300)
    assert embedding(ids, weight, 2.0).shape == (7, 64)
    assert embedding(ids, weight, 2.0).dtype is dtype
    index, value = linear_argmax(x, weight, softcap=5.0, row_count=meta(1, dtype=torch.int32))
    assert (index.shape, value.shape) == ((7,), (7,))
    with pytest.raises(RuntimeError):
        ids.max().item()
