"""The consistency loss with a head that is sharded over two processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from engine.kernels import consistency_loss
from tests.kernels.consistency_cases import Case, error, plain, random_case, rounding
from tests.ranks import on_ranks

WORLD = 2
CASE = random_case(24, 2, 20, 131, omega=5.0, seed=2)  # 131 rows of the head: shards of 66 and 65
COUNTS = {
    "ar_denominator": float((CASE.labels != -100).sum()),
    "consistency_denominator": float((CASE.pairs >= 0).sum()),
}


class TiedLoss(nn.Module):
    """A model in the small: an embedding, one layer, and the loss inside the module that owns the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.head = nn.Parameter(CASE.weight.clone())
        self.embedding = None if tied else nn.Parameter(CASE.weight.flip(0).clone())
        self.layer = nn.Parameter(torch.eye(20) * 1.5)

    def forward(self, part: Case, ids: Tensor, draft_ids: Tensor, denominators: dict[str, float]) -> Tensor:
        table = self.head if self.embedding is None else self.embedding
        target, draft = (table[i] @ self.layer + h for i, h in ((ids, part.target), (draft_ids, part.draft)))
        return consistency_loss(
            target, draft, self.head, part.labels, part.pairs, omega=5.0, impl="cpp", **denominators
        ).loss


def micro_batches(count: int) -> list[tuple[Case, Tensor, Tensor]]:
    """The case in ``count`` pieces of consecutive target rows, each with token ids for its rows."""
    size = len(CASE.target) // count
    parts = []
    for start in range(0, len(CASE.target), size):
        rows = (CASE.pairs >= start) & (CASE.pairs < start + size)
        part = Case(
            CASE.target[start : start + size], CASE.draft[rows], CASE.weight, CASE.labels[start : start + size],
            CASE.pairs[rows] - start, None, {},
        )  # fmt: skip
        ids = (torch.arange(start, start + size) * 7) % 131
        parts.append((part, ids, ids[part.pairs] + 1))
    return parts


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return found


def whole_batch(tied: bool) -> dict[str, Tensor]:
    """Gradients of all rows at once in one process, by autograd in float64."""
    module = TiedLoss(tied).double()
    table = module.head if module.embedding is None else module.embedding
    parts = micro_batches(1)[0]
    part, ids, draft_ids = parts[0].cast(torch.float64), parts[1], parts[2]
    target, draft = (table[i] @ module.layer + h for i, h in ((ids, part.target), (draft_ids, part.draft)))
    leaves = [t.detach().requires_grad_() for t in (target, draft)]
    case = Case(*leaves, module.head.detach(), part.labels, part.pairs, None, {"omega": 5.0})
    exact = plain(case)
    torch.autograd.backward([target, draft], exact.grads[:2])
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    grads["head"] = exact.grads[2] + grads["head"] if tied else exact.grads[2]
    return grads


def sharded() -> dict[str, Any]:
    """On every rank: gradients of fully_shard'ed modules, each rank with its own micro-batches."""
    mesh = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {}
    for tied in (False, True):
        for pieces in (1, 2):
            module = TiedLoss(tied)
            fully_shard(module, mesh=mesh)
            mine = micro_batches(WORLD * pieces)[dist.get_rank() * pieces :][:pieces]
            denominators = {name: count / WORLD for name, count in COUNTS.items()}  # gradients are averaged
            for part in mine:
                module(*part, denominators).backward()
            results[f"tied={tied}, {pieces} each"] = gradients(module)
    return results


def both() -> dict[str, Any]:
    return {"sharded": sharded(), "given directly": given_directly()}


def given_directly() -> dict[str, Any]:
    """On every rank: what a DTensor meets, and the gradient behind the way out that the message names."""
    mesh = init_device_mesh("cpu", (WORLD,))
    messages: dict[str, str] = {}
    tensors = {
        "target_hidden": CASE.target, "draft_hidden": CASE.draft, "lm_head_weight": CASE.weight, "labels": CASE.labels,
        "pair_index": CASE.pairs, "bias": torch.zeros(131), "label_weights": torch.ones(24),
        "pair_weights": torch.ones(48), "omega": torch.tensor(5.0), "ar_denominator": torch.tensor(7.0),
    }  # fmt: skip
    for name, tensor in tensors.items():
        placement = Shard(0) if tensor.dim() else Replicate()
        distributed = {**tensors, name: distribute_tensor(tensor, mesh, [placement])}
        distributed[name].requires_grad_(name == "lm_head_weight")
        with pytest.raises(TypeError) as caught:
            consistency_loss(**distributed)  # type: ignore[arg-type]
        messages[name] = str(caught.value)
    part = micro_batches(WORLD)[dist.get_rank()][0]
    head = distribute_tensor(CASE.weight, mesh, [Shard(0)]).requires_grad_()
    full = head.full_tensor(grad_placements=[Partial()])
    consistency_loss(part.target, part.draft, full, part.labels, part.pairs, omega=5.0, **COUNTS).loss.backward()
    assert head.grad is not None
    return {"messages": messages, "gradient": head.grad.full_tensor()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(f"{__name__}:both", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_head_inside_its_module(tied: bool, pieces: int, ranks: list[dict[str, Any]]) -> None:
    """Gathered there: the gradients of both ranks' micro-batches are those of the batch in one process."""
    exact = whole_batch(tied)
    for of_rank in ranks:
        actual = of_rank["sharded"][f"tied={tied}, {pieces} each"]
        assert actual.keys() == exact.keys()
        for name, e in exact.items():
            assert error(actual[name], e) <= 2e-6 * float(e.norm()) + rounding(e, torch.float32), name


def test_a_sharded_tensor_given_directly(ranks: list[dict[str, Any]]) -> None:
    exact = plain(CASE).grads[2]
    for of_rank in ranks:
        found = of_rank["given directly"]
        assert error(found["gradient"], exact) <= 2e-6 * float(exact.norm()) + rounding(exact, torch.float32)
        for name, message in found["messages"].items():
            assert message.startswith(f"{name} is a DTensor, the loss needs a plain tensor"), message
        assert "pass lm_head_weight.full_tensor(grad_placements=[Partial()])" in found["messages"]["lm_head_weight"]
