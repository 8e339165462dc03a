"""Wrong inputs of the consistency loss: what the error says."""

from typing import Any

import pytest
import torch

from engine.kernels import consistency_loss
from tests.kernels.consistency_cases import random_case

CASE = random_case(4, 1, 8, 20, ignored=0, unpaired=0)


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "target_hidden": CASE.target, "draft_hidden": CASE.draft, "lm_head_weight": CASE.weight, "labels": CASE.labels,
        "pair_index": CASE.pairs, **changes,
    }  # fmt: skip
    consistency_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"target_hidden": torch.zeros(2, 2, 8)},
            ValueError,
            r"target_hidden must have 2 dimensions.*got shape \(2, 2, 8\)",
        ),
        ({"draft_hidden": torch.zeros(4, 9)}, ValueError, "draft_hidden has 9 columns, lm_head_weight .* has 8"),
        ({"lm_head_weight": torch.zeros(0, 8)}, ValueError, "empty vocabulary"),
        (
            {"target_hidden": torch.zeros(4, 8, dtype=torch.int32)},
            TypeError,
            "target_hidden must be float32.*got torch.int32",
        ),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be torch.int64 or torch.int32, got torch.float32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \[4\].*got \(5,\)"),
        (
            {"labels": torch.tensor([0, 1, 20, 0])},
            IndexError,
            r"labels must be in 0 .. 19 or ignore_index \(-100\), got 20 in row 2",
        ),
        ({"labels": torch.tensor([0, -1, 2, 0])}, IndexError, "got -1 in row 1"),
        (
            {"pair_index": torch.tensor([0, 1, 2, 4])},
            IndexError,
            r"pair_index must be in 0 .. 3 or -1 \(no partner\), got 4",
        ),
        ({"pair_index": torch.tensor([0, -2, 2, 0])}, IndexError, "got -2 in row 1"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \[20\]"),
        ({"label_weights": torch.ones(3)}, ValueError, r"label_weights must have shape \[4\]"),
        ({"pair_weights": torch.ones(4, requires_grad=True)}, ValueError, r"pass pair_weights.detach\(\)"),
        ({"omega": torch.ones(2)}, ValueError, "omega must be a number or a tensor of one element"),
        ({"omega": torch.tensor(1.0, requires_grad=True)}, ValueError, r"pass omega.detach\(\)"),
        ({"ar_denominator": 0}, ValueError, "ar_denominator must be positive, got 0"),
        ({"consistency_denominator": -1.0}, ValueError, "consistency_denominator must be positive"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, or None"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        (
            {"kl_normalization": "batch"},
            ValueError,
            "kl_normalization must be one of 'token', 'vocabulary', got 'batch'",
        ),
        ({"plan": "fast"}, ValueError, "plan must be one of"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"filter_eps": -1.0}, ValueError, "filter_eps must be 0 or larger and less than 1"),
        ({"filter_eps": 1e-5}, ValueError, 'filter_eps=1e-05 needs plan="sparse"'),
        ({"impl": "cpp", "plan": "recompute"}, ValueError, 'impl="cpp" cannot run here'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_inputs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_implementations_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r'impl="triton" cannot run here: it needs tensors on a GPU, got cpu; use impl="auto"'
    ):
        call(impl="triton")
    wide = {name: getattr(CASE, of).double() for name, of in (("target_hidden", "target"), ("draft_hidden", "draft"))}
    with pytest.raises(ValueError, match='impl="cpp" cannot run here'):
        call(impl="cpp", lm_head_weight=CASE.weight.double(), **wide)


def test_a_sharded_head_is_refused() -> None:
    class Sharded(torch.Tensor):
        placements = ("Shard(0)",)

        def full_tensor(self) -> torch.Tensor:
            return torch.Tensor(self)

    with pytest.raises(TypeError, match=r"lm_head_weight is a DTensor.*pass lm_head_weight.full_tensor\(\)"):
        call(lm_head_weight=CASE.weight.as_subclass(Sharded))
