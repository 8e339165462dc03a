"""What a CUDA graph of a step holds: kernels alone, and nothing that asks the device for a value.

On the meta device tensors have shapes and no values, so whatever would wait for the device fails here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from engine.device_loop import DeviceLoop
from engine.jacobi import Vocabulary
from engine.kernels.gpu import (
    gated_activation,
    jacobi_accept,
    jacobi_pack,
    linear_argmax,
    linear_sample,
    paged_attention,
    rms_norm,
    rope_kv_write,
)
from engine.model import Decoder
from engine.step_runner import StepKind
from tests.engine.checkpoints import Oracle
from tests.kernels.ahead_of_time.compiling import recording

LAUNCHERS = (
    gated_activation, jacobi_accept, jacobi_pack, linear_argmax, linear_sample, paged_attention, rms_norm, rope_kv_write,
)  # fmt: skip
META = torch.device("meta")


class _OnDevice(TorchDispatchMode):
    """Refuses operations on tensors of the host: a copy to the device from memory that is not pinned waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs, result))
        if any(t.device != META for t in given if isinstance(t, torch.Tensor)):
            raise RuntimeError(f"{func} takes values of the host")
        return result


@contextmanager
def captured() -> Iterator[None]:
    """What a CUDA graph's capture would refuse is an error inside."""

    def wait(*given: object, **options: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch, _OnDevice():
        for holder in (torch.cuda, torch.cuda.Stream, torch.cuda.Event, torch.accelerator):
            patch.setattr(holder, "synchronize", wait)
        for name in ("cuda", "pin_memory", "new_tensor"):
            patch.setattr(torch.Tensor, name, wait)
        for name in ("tensor", "as_tensor", "asarray"):  # these copy below the reach of the mode
            patch.setattr(torch, name, wait)
        yield


@pytest.fixture
def loop(
    oracle: Callable[[str], Oracle], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> DeviceLoop:
    """Of a model of that family in bfloat16, whose operations launch Triton kernels as on a GPU; refusing one is an error."""

    def launch(impl: str, tensor: torch.Tensor, supported: bool, requirement: str) -> bool:
        assert supported, requirement
        return True

    for module in LAUNCHERS:
        operation = sys.modules[module.__name__.replace(".gpu.", ".")]
        monkeypatch.setattr(operation, "choose_triton", launch)
    model = oracle(request.param).model
    decoder = Decoder.from_tensors(model.config, model.state_dict(), torch.bfloat16, META)
    vocabulary = Vocabulary(decoder.spec.vocab_size, frozenset({1}), 0)
    return DeviceLoop(decoder, decoder.new_cache(8), vocabulary, 16, 64, 4)


def warm_up(loop: DeviceLoop) -> None:
    """Makes what is made once, such as the table of rotations."""
    with recording(*LAUNCHERS):
        loop._step(StepKind(16))


@pytest.mark.parametrize("loop", ["llama", "qwen2-some-windows", "qwen3", "gemma2"], indirect=True)
@pytest.mark.parametrize("kind", [StepKind(16, False, 1), StepKind(64, True, 4)], ids=str)
def test_a_step_is_kernels_on_shapes(loop: DeviceLoop, kind: StepKind) -> None:
    warm_up(loop)
    with recording(*LAUNCHERS) as launches, captured():
        loop._step(kind)
    model = loop._model
    assert isinstance(model, Decoder)
    norms = 2 if model.spec.is_gemma else 1  # of a block: before it, and Gemma's behind it
    block = ["rope_kv_write_kernel", "attention_kernel"]
    layer = ["rms_norm_kernel", *block, *["rms_norm_kernel"] * norms, "gated_activation_kernel"]
    layer += ["rms_norm_kernel"] * (norms - 1)
    drawn = "sample" if kind.sampled else "argmax"
    head = [f"project_{drawn}_kernel", f"reduce_{drawn}_kernel", "accept_kernel"]
    names = [launch.kernel.__name__ for launch in launches]
    # with the keys divided, as those of layers without a window are here, a second kernel puts the parts together
    assert [name for name in names if name != "combine_kernel"] == [
        *["plan_kernel", "rows_kernel"], *layer * model.spec.layers, "rms_norm_kernel", *head
    ]  # fmt: skip
    assert all(names[i - 1] == "attention_kernel" for i, name in enumerate(names) if name == "combine_kernel")
    (accept,) = (launch for launch in launches if launch.kernel.__name__ == "accept_kernel")
    assert accept.grid == (kind.slots,)


@pytest.mark.parametrize("loop", ["qwen3-tied"], indirect=True)
def test_flash_attention_in_a_step(loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is told of the sequences is made once, from shapes, for all layers."""
    model, cache = loop._model, loop._cache
    assert isinstance(model, Decoder)
    cache.flash_rows = 0
    told: list[tuple[object, ...]] = []

    def flash_attention(q: torch.Tensor, k: object, v: object, row_start: object, *others: object) -> torch.Tensor:
        told.append(others[:1])
        return q.new_empty(q.shape[0], model.spec.heads * model.spec.head_dim)

    module = sys.modules["engine.kernels.paged_attention"]
    monkeypatch.setattr(module, "reason_against_flash", lambda q: None)
    monkeypatch.setattr(module, "flash_attention", flash_attention)
    warm_up(loop)
    told.clear()
    with recording(*LAUNCHERS) as launches, captured():
        loop._step(StepKind(16, False, 1))
    assert "attention_kernel" not in [launch.kernel.__name__ for launch in launches]
    assert len(told) == model.spec.layers
    assert len({id(indices) for (indices,) in told}) == 1


@pytest.mark.parametrize("loop", ["llama"], indirect=True)
def test_waiting_for_the_device_would_be_noticed(loop: DeviceLoop) -> None:
    with pytest.raises(RuntimeError, match="meta"):
        loop.state.fields.max().item()


HOST = torch.ones(3)
FAULTS: dict[str, Callable[[], object]] = {
    "tensor": lambda: torch.tensor([1, 2], device=META),
    "scalar": lambda: torch.tensor(0.5, device=META),
    "to": lambda: HOST.to(META),
    "copy": lambda: torch.empty(3, device=META).copy_(HOST),
    "mixed": lambda: torch.empty(3, device=META) * HOST[0],
    "cuda": lambda: HOST.cuda(),
    "pinned": lambda: HOST.pin_memory(),
    "wait": lambda: torch.cuda.synchronize(),
    "accelerator": lambda: torch.accelerator.synchronize(),
    "stream": lambda: torch.cuda.Stream.synchronize(None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("loop", ["llama"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_values_of_the_host_would_be_noticed(loop: DeviceLoop, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loop._model.forward
    warm_up(loop)
    monkeypatch.setattr(loop._model, "forward", lambda *given: [FAULTS[fault](), forward(*given)][1])
    with recording(*LAUNCHERS), captured(), pytest.raises(RuntimeError, match=r"of the host|not permitted"):
        loop._step(StepKind(16))
