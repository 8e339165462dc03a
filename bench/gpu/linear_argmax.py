"""Projection to the vocabulary with the argmax or a sample, against products that leave logits in memory."""

import functools
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from bench.gpu.case import Case, difference, tensors
from engine.kernels import LinearWeight, linear_argmax, linear_sample
from engine.kernels.gumbel_noise import gumbel_noise

SHAPES = {  # d, vocabulary, soft-cap
    "gemma-2-9b": (3584, 256000, 30.0),
    "gemma-2-2b": (2304, 256000, 30.0),
    "llama-3-8b": (4096, 128256, None),
    "qwen2.5-0.5b": (896, 151936, None),
}
ROWS = (256, 1, 16, 64, 128, 1024)
TEMPERATURE = 0.7
BOUND = 1e-4
"""Of ``regret``: what float32 sums in another order, and the noise's logarithms, may change."""


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """``tiny``: shapes for Triton's interpreter on a CPU, float32."""
    if tiny:
        for rows in (1, 17):
            yield from pair("tiny", rows, 32, 200, 5.0, torch.float32, device)
        return
    for rows, (name, (d, v, softcap)) in product(ROWS, SHAPES.items()):
        yield from pair(name, rows, d, v, softcap, torch.bfloat16, device)


def pair(
    name: str, rows: int, d: int, v: int, softcap: float | None, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The greedy and the sampled projection of one shape."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, d, dtype=dtype, device=device, generator=generator)
    w = torch.randn(v, d, dtype=dtype, device=device, generator=generator) * (3 / d**0.5)
    weight, shape = LinearWeight(w, v, d, packed=False), f"{name}, {rows} rows"
    temperature = torch.full((rows,), TEMPERATURE, device=device)
    seeds = positions = torch.arange(rows, device=device)
    moved, flops = (v * d + rows * d) * x.element_size(), 2 * rows * v * d
    ours = functools.partial(linear_argmax, x, weight, softcap=softcap, impl="triton")
    error = functools.partial(regret, x, w, softcap, 0.0)
    yield Case("linear_argmax", shape, variants(ours, greedy, x, w, softcap), moved, flops, error, BOUND)
    ours = functools.partial(
        linear_sample, x, weight, temperature=temperature, seeds=seeds, positions=positions, softcap=softcap,
        impl="triton",
    )  # fmt: skip
    noise = torch.cat([gumbel_noise(seeds[i : i + 1], positions[i : i + 1], v).float() for i in range(rows)])
    error = functools.partial(regret, x, w, softcap, TEMPERATURE * noise)
    yield Case("linear_sample", shape, variants(ours, drawn, x, w, softcap, noise), moved, flops, error, BOUND)


def variants(
    ours: Callable[[], object], function: Callable[..., object], x: Tensor, *others: object
) -> dict[str, Callable[[], object]]:
    found = {"ours": ours, "eager": functools.partial(function, x, *others)}
    if x.is_cuda:
        found["torch.compile"] = functools.partial(torch.compile(function, dynamic=False), x, *others)
    return found


def capped_logits(x: Tensor, w: Tensor, softcap: float | None) -> Tensor:
    """In float32, as ours are: rounded to bfloat16, many would be equal."""
    z = torch.mm(x, w.T, out_dtype=torch.float32) if x.is_cuda else x @ w.T
    return capped(z, softcap)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(z / softcap) if softcap else z


def regret(x: Tensor, w: Tensor, softcap: float | None, noise: Tensor | float, output: object) -> float:
    """How much lower than the highest the chosen logits (with noise) are, and how far off the values given for them; relative
    to the highest. Not whether the index is the same: of two that are nearly equal either may come out."""
    z = torch.cat([capped(x.float() @ part.float().T, softcap) for part in w.split(1 << 15)], -1) + noise
    best = z.amax(-1)
    index, *values = tensors(output)
    if not ((index >= 0) & (index < len(w))).all():
        raise ValueError("an index lies outside of the vocabulary")
    chosen = z.gather(-1, index[:, None])[:, 0]
    return max(((best - chosen) / best.abs()).max().item(), *(difference(value, best) for value in values), 0.0)


def greedy(x: Tensor, w: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    value, index = capped_logits(x, w, softcap).max(-1)
    return index, value


def drawn(x: Tensor, w: Tensor, softcap: float | None, noise: Tensor) -> tuple[Tensor, None]:
    """With noise that has been made before: the work of making it is ours alone."""
    return (capped_logits(x, w, softcap) + TEMPERATURE * noise).argmax(-1), None
