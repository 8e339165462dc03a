"""train_step behind what people put around a model: checkpointing, peft, autocast, distributed wrappers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from engine import TrajectoryCollator, train_step
from engine.training import TrainBatch
from tests.engine.checkpoints import PAD
from tests.engine.training.references import (
    Results,
    assert_close,
    chosen_by,
    double,
    gradients,
    plain_loss,
    step,
    trajectories,
)

peft = pytest.importorskip("peft")
Family = Callable[..., PreTrainedModel]


def batch_of(seed: int = 1, **options: Any) -> TrainBatch:
    return TrajectoryCollator(PAD, drafts=2, max_tokens=200, **options)(trajectories(seed))


def loss_of(model: nn.Module, batch: TrainBatch, **options: Any) -> Tensor:
    return train_step(model, batch, loss_impl="torch", **options).loss


def lora(model: PreTrainedModel, **options: Any) -> Any:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    return wrapped.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # 5.17 has no other name
@pytest.mark.parametrize("name", ["llama", "qwen2-some-windows", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool, family: Family) -> None:
    model, batch = family(name).train(), batch_of()
    expected = loss_of(model, batch)
    grads = gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    layer = model.get_decoder().layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(model, batch)
    loss.backward()
    assert len(calls) == 2  # computed again in the backward
    assert torch.equal(loss, expected)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-5, atol=1e-5 * float(grads[key].norm()))


def test_lora_trains_its_parameters_alone(family: Family) -> None:
    base = family("llama")
    model = lora(base, target_modules=["q_proj", "v_proj", "down_proj"])
    head = base.get_output_embeddings().weight
    given = trajectories(2)
    collator = TrajectoryCollator(PAD, drafts=2)
    out = train_step(model, collator(given), loss_impl="torch")
    assert not head.requires_grad
    out.loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 3 * 3
    merged = model.merge_and_unload()
    exact = plain_loss(double(merged.requires_grad_(True)), chosen_by(collator, given))
    torch.testing.assert_close(out.loss.detach().double(), exact.loss, rtol=1e-5, atol=0)


def test_no_gradient_of_a_frozen_head_is_computed(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of the head nobody asked for would cost a third of the loss and its memory."""
    from engine.kernels.consistency_loss import dispatch

    needs: list[Any] = []
    solve = dispatch.reference.loss_and_gradients
    monkeypatch.setattr(dispatch.reference, "loss_and_gradients", lambda p, n: (needs.append(n), solve(p, n))[1])
    loss_of(lora(family("llama"), target_modules=["q_proj"]), batch_of())
    loss_of(family("llama"), batch_of())
    assert [(n.weight, n.target, n.draft) for n in needs] == [(False, True, True), (True, True, True)]


def test_lora_gradients_equal_those_of_separate_forwards(family: Family) -> None:
    model = lora(family("qwen3"), target_modules=["o_proj", "up_proj", "lm_head"])
    given = trajectories(3)
    collator = TrajectoryCollator(PAD, drafts=3, max_tokens=300)
    actual, chosen = step(model, collator, given), chosen_by(collator, given)
    assert any("lm_head" in name for name in actual.gradients)
    assert_close(actual, plain_loss(double(model), chosen), plain_loss(model, chosen))


def test_a_head_trained_in_full_beside_lora(family: Family) -> None:
    model = lora(family("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    given = trajectories(4)
    collator = TrajectoryCollator(PAD, drafts=2)
    actual, chosen = step(model, collator, given), chosen_by(collator, given)
    assert_close(actual, plain_loss(double(model), chosen), plain_loss(model, chosen))


def test_micro_batches_add_up(family: Family) -> None:
    model = family("gemma2")
    given = trajectories(5, count=4)
    collator = TrajectoryCollator(PAD, drafts=2, max_tokens=200)
    chosen = chosen_by(collator, given)
    parts = [collator(given[:1]), collator(given[1:])]
    counts = {
        "ar_denominator": sum(part["label_count"] for part in parts),
        "consistency_denominator": sum(int(part["pair_count"]) for part in parts),
    }
    outs = [train_step(model, part, loss_impl="torch", **counts) for part in parts]
    grads = [gradients(model, out.loss) for out in outs]
    total = Results(
        sum(out.loss.detach() for out in outs), sum(out.ar for out in outs), sum(out.consistency for out in outs),
        {name: grads[0][name] + grads[1][name] for name in grads[0]}, int(counts["ar_denominator"]),
        int(counts["consistency_denominator"]),
    )  # fmt: skip
    assert_close(total, plain_loss(double(model), chosen), plain_loss(model, chosen))


def test_the_model_is_left_as_it_was(family: Family) -> None:
    model, batch = family("llama"), batch_of()
    before = set(model.__dict__)
    first = loss_of(model, batch)
    assert set(model.__dict__) == before
    model.forward = lambda *a, **k: 1 / 0  # type: ignore[method-assign]  # as accelerate replaces it
    mine = model.forward
    assert torch.equal(loss_of(model, batch), first)
    assert model.forward is mine
    with pytest.raises(ValueError, match="impl must be one of"):
        train_step(model, batch, loss_impl="none")  # type: ignore[arg-type]
    assert model.forward is mine


def test_autocast(family: Family) -> None:
    model, batch = family("llama"), batch_of()
    exact = loss_of(model, batch, omega=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch, omega=1.0)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def test_a_compiled_decoder(family: Family) -> None:
    model, batch = family("gemma2"), batch_of()
    expected = loss_of(model, batch)
    grads = gradients(model, expected)
    model.get_decoder().compile(backend="eager", fullgraph=True)
    loss = loss_of(model, batch)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradient, grads[key]) for key, gradient in gradients(model, loss).items())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(family: Family) -> None:
    model, batch = family("llama"), batch_of()
    expected = loss_of(model, batch)
    grads = gradients(model, expected)
    wrapped = nn.parallel.DistributedDataParallel(model)
    reduced: list[int] = []
    wrapped.register_comm_hook(None, lambda _, bucket: _reduced(reduced, bucket))
    loss_of(wrapped, batch).backward()
    assert reduced  # the wrapper's own forward has prepared the reduction
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[key])


def _reduced(seen: list[int], bucket: Any) -> torch.futures.Future[Tensor]:
    seen.append(1)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fully_sharded(name: str, family: Family) -> None:
    model, batch = family(name), batch_of()
    expected = loss_of(model, batch)
    grads = gradients(model, expected)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.full_tensor(), grads[key])  # type: ignore[attr-defined]
