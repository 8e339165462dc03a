"""train_step on models that are sharded over, or copied to, two processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from engine import TrajectoryCollator, train_step
from engine.errors import UnsupportedModel
from engine.training import Trajectory
from tests.engine.checkpoints import PAD, family_model
from tests.engine.training.references import Results, assert_close, chosen_by, double, plain_loss, trajectories
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow
WORLD = 2
FAMILIES = ["llama", "llama-tied", "gemma2"]  # gemma2: tied, with a soft-cap
COLLATOR = TrajectoryCollator(PAD, drafts=2, max_tokens=200)
Wrapper = Callable[[PreTrainedModel], nn.Module]


def given() -> list[Trajectory]:
    return trajectories(8, count=4)


def sharded(model: PreTrainedModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def trained(family: str, wrap: Wrapper, pieces: int) -> dict[str, Any]:
    """Gradients and terms of this rank's half of the trajectories, in ``pieces`` micro-batches."""
    model = family_model(family).train()
    model.set_attn_implementation("eager")
    wrapped = wrap(model)
    everything = COLLATOR(given())
    size = len(given()) // WORLD // pieces
    first = dist.get_rank() * size * pieces
    terms = torch.zeros(3)
    for start in range(first, first + size * pieces, size):
        out = train_step(
            wrapped, COLLATOR(given()[start : start + size]), loss_impl="cpp",
            ar_denominator=everything["label_count"] / WORLD, consistency_denominator=everything["pair_count"] / WORLD,
        )  # fmt: skip
        out.loss.backward()
        terms += torch.stack((out.loss.detach(), out.ar, out.consistency)) / WORLD
    dist.all_reduce(terms)
    named = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"terms": terms, "gradients": named}


def all_wrapped() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for family in FAMILIES:
        for pieces in (1, 2):
            results[f"fully_shard {family} {pieces}"] = trained(family, sharded, pieces)
        results[f"ddp {family} 1"] = trained(family, nn.parallel.DistributedDataParallel, 1)
    results["refusal"] = refusal_of_a_head_sharded_by_itself()
    return results


def refusal_of_a_head_sharded_by_itself() -> str:
    """A head with a fully_shard of its own is gathered by its own forward only, which does not run."""
    model = family_model("llama")
    fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(UnsupportedModel) as caught:
        train_step(sharded(model), COLLATOR(given()))
    return str(caught.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(f"{__name__}:all_wrapped", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["fully_shard {} 1", "fully_shard {} 2", "ddp {} 1"])
def test_gradients_equal_one_process(how: str, family: str, results: list[dict[str, Any]]) -> None:
    """Of a shared weight too, whose gradient is the sum of both uses: the reference is autograd in float64."""
    model = family_model(family)
    model.set_attn_implementation("eager")
    chosen = chosen_by(COLLATOR, given())
    exact, plain = plain_loss(double(model), chosen), plain_loss(model, chosen)
    for of_rank in results:
        found = of_rank[how.format(family)]
        loss, ar, consistency = found["terms"]
        actual = Results(loss, ar, consistency, found["gradients"], exact.label_count, exact.pair_count)
        assert_close(actual, exact, plain)


def test_a_head_sharded_by_itself_is_refused(results: list[dict[str, Any]]) -> None:
    for of_rank in results:
        assert "the head is sharded by itself" in of_rank["refusal"]
        assert "leave it to the fully_shard of the whole model" in of_rank["refusal"]
