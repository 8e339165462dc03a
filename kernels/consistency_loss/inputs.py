"""Checks of what the caller of the consistency loss gave, and its translation into a Problem."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.consistency_loss.problem import Problem

IMPLEMENTATIONS = ("auto", "torch", "cpp", "triton")
PLANS = ("auto", "dense", "recompute", "sparse")
NORMALIZATIONS = ("token", "vocabulary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(target: Tensor, draft: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor) -> None:
    """Shapes, dtypes and devices of the required tensors."""
    named = {"target_hidden": target, "draft_hidden": draft, "lm_head_weight": weight}
    for name, tensor in {**named, "labels": labels, "pair_index": pairs}.items():
        refuse_distributed(name, tensor)
    for name, tensor in named.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions [rows, hidden size], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.shape[1] != weight.shape[1]:
            raise ValueError(f"{name} has {tensor.shape[1]} columns, lm_head_weight [V, D] has {weight.shape[1]}")
    if weight.shape[0] == 0:
        raise ValueError("lm_head_weight must have at least one row, got an empty vocabulary")
    _check_rows("labels", labels, target, "target_hidden", torch.int64, torch.int32)
    _check_rows("pair_index", pairs, draft, "draft_hidden", torch.int64, torch.int32)
    for name, tensor in {**named, "labels": labels, "pair_index": pairs}.items():
        if tensor.device != target.device:
            raise ValueError(f"{name} is on {tensor.device}, target_hidden on {target.device}; move it there")


def check_optional_tensors(
    target: Tensor, draft: Tensor, weight: Tensor, bias: Tensor | None, label_weights: Tensor | None,
    pair_weights: Tensor | None,
) -> None:  # fmt: skip
    """Shapes of the optional tensors; weights of rows are constants of the loss."""
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name, tensor, like, like_name in (
        ("bias", bias, weight, "lm_head_weight"),
        ("label_weights", label_weights, target, "target_hidden"),
        ("pair_weights", pair_weights, draft, "draft_hidden"),
    ):
        if tensor is None:
            continue
        refuse_distributed(name, tensor)
        _check_rows(name, tensor, like, like_name, *floats)
        if tensor.device != target.device:
            raise ValueError(f"{name} is on {tensor.device}, target_hidden on {target.device}; move it there")
        if name != "bias":
            _refuse_gradient(name, tensor)


def check_options(
    softcap: float | None, temperature: float, kl_normalization: str, plan: str, filter_eps: float, impl: str
) -> None:
    """Values of the options that are not tensors."""
    for name, value, allowed in (
        ("impl", impl, IMPLEMENTATIONS),
        ("plan", plan, PLANS),
        ("kl_normalization", kl_normalization, NORMALIZATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps must be 0 or larger and less than 1, got {filter_eps}")
    if filter_eps > 0 and plan != "sparse":
        raise ValueError(f'filter_eps={filter_eps} needs plan="sparse", got plan={plan!r}; the other plans are exact')


def scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a tensor of no dimensions on the device of ``like``, without waiting for the device."""
    if not isinstance(value, Tensor):
        # Not torch.tensor: its copy to a GPU waits.
        return torch.full((), value, dtype=torch.float64, device=like.device)
    refuse_distributed(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    _refuse_gradient(name, value)
    return value.detach().reshape(()).to(like.device, non_blocking=True)


def denominator(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """As ``scalar``; None stands for the number of rows that have the term."""
    if value is None:
        return None
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return scalar(name, value, like)


def refuse_distributed(name: str, tensor: Tensor) -> None:
    """A sharded tensor's local part is not the whole matrix."""
    if not (hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")):
        return
    whole = f"{name}.full_tensor()"
    if tensor.requires_grad:
        # full_tensor() alone takes every process's gradient for that of all: each would keep a part of its own
        partial = ", ".join(["Partial()"] * len(tensor.placements))
        whole = f"{name}.full_tensor(grad_placements=[{partial}]), whose gradient is the sum over the processes"
    raise TypeError(
        f"{name} is a DTensor, the loss needs a plain tensor: under FSDP2 call it inside the module that owns the "
        f"weight, where it is gathered, or pass {whole}"
    )


def _check_rows(name: str, tensor: Tensor, like: Tensor, like_name: str, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must have shape [{like.shape[0]}], one per row of {like_name}, got {tuple(tensor.shape)}"
        )


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the loss does not compute; pass {name}.detach()")


@dataclass(frozen=True, slots=True)
class Terms:
    """A problem and what turns its outcome into the two terms: ar = sum(ce_scale * CE), and likewise for the other."""

    problem: Problem
    pair_scale: Tensor
    """kl_scale without omega."""


def build_terms(
    target: Tensor, draft: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, pairs: Tensor, omega: Tensor,
    label_weights: Tensor | None, pair_weights: Tensor | None, ar_denominator: Tensor | None,
    consistency_denominator: Tensor | None, ignore_index: int, softcap: float | None, temperature: float,
    per_vocabulary: bool, plan: str, filter_eps: float,
) -> Terms:  # fmt: skip
    """Masks, weights and denominators as one scale per row."""
    vocabulary = weight.shape[0]
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    labelled, paired = labels != ignore_index, pairs >= 0
    _check_range("labels", labels, labelled, vocabulary, f"or ignore_index ({ignore_index})")
    _check_range("pair_index", pairs, pairs != -1, target.shape[0], "or -1 (no partner)")
    ce_scale = _scale(labelled, label_weights, ar_denominator, wide)
    pair_scale = _scale(paired, pair_weights, consistency_denominator, wide)
    if per_vocabulary:
        pair_scale = pair_scale / vocabulary
    problem = Problem(
        target_hidden=target.contiguous(), draft_hidden=draft.contiguous(), weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(), labels=labels.long().where(labelled, 0),
        pair_index=pairs.long().contiguous(), ce_scale=ce_scale, kl_scale=pair_scale * omega.to(wide),
        softcap=softcap, temperature=temperature, filter_eps=filter_eps, plan=plan,
    )  # fmt: skip
    return Terms(problem, pair_scale)


def _scale(present: Tensor, weights: Tensor | None, count: Tensor | None, wide: torch.dtype) -> Tensor:
    factor = present.to(wide) if weights is None else weights.to(wide).where(present, 0)
    return factor / (present.sum().clamp_min(1) if count is None else count).to(wide)


def _check_range(name: str, index: Tensor, used: Tensor, limit: int, otherwise: str) -> None:
    bad = used & ((index < 0) | (index >= limit))
    expected = f"{name} must be in 0 .. {limit - 1} {otherwise}"
    if not index.is_cpu:
        # Asking for the answer would wait for the GPU; a wrong index stops it instead.
        torch._assert_async(~bad.any(), expected)
    elif bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"{expected}, got {int(index[row])} in row {row}")
