"""Projection to the vocabulary with the argmax or a sample, against products that leave logits in memory.

python -m bench.gpu.linear_argmax    times candidates for the table of tiles on this machine's GPU
"""

import functools
from collections.abc import Callable, Iterator
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.case import Case
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
    yield Case("linear_argmax", shape, variants(ours, greedy, x, w, softcap), moved, flops)
    ours = functools.partial(
        linear_sample, x, weight, temperature=temperature, seeds=seeds, positions=positions, softcap=softcap,
        impl="triton",
    )  # fmt: skip
    noise = torch.cat([gumbel_noise(seeds[i : i + 1], positions[i : i + 1], v).float() for i in range(rows)])
    yield Case("linear_sample", shape, variants(ours, drawn, x, w, softcap, noise), moved, flops)


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
    return softcap * torch.tanh(z / softcap) if softcap else z


def greedy(x: Tensor, w: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    value, index = capped_logits(x, w, softcap).max(-1)
    return index, value


def drawn(x: Tensor, w: Tensor, softcap: float | None, noise: Tensor) -> tuple[Tensor, None]:
    """With noise that has been made before: the work of making it is ours alone."""
    return (capped_logits(x, w, softcap) + TEMPERATURE * noise).argmax(-1), None


def main() -> None:
    """Prints the time of every candidate tile, for somebody to write the best into the table."""
    import triton

    from engine.kernels.gpu import linear_argmax as gpu
    from engine.kernels.gpu.logits_tile import Tiles

    d, v, softcap = SHAPES["gemma-2-9b"]
    weight = LinearWeight(torch.randn(v, d, dtype=torch.bfloat16, device="cuda"), v, d, packed=False)
    for rows in ROWS:
        x = torch.randn(rows, d, dtype=torch.bfloat16, device="cuda")
        width = min(128, max(16, triton.next_power_of_2(rows)))
        for columns, depth, warps, stages in product((64, 128, 256), (64, 128), (4, 8), (3, 4, 5)):
            first = width < 128
            t = Tiles(width, columns, depth, warps, stages, first, 1 if first else 8)
            with mock.patch.object(gpu, "tiles", lambda *_, t=t: t):
                try:
                    seconds = triton.testing.do_bench(lambda x=x: linear_argmax(x, weight, softcap=softcap)) / 1e3
                except triton.runtime.errors.OutOfResources:
                    continue
            print(f"{rows:5} rows {seconds * 1e6:9.1f} us {v * d * 2 / seconds / 1e9:7.0f} GB/s "
                  f"{2 * rows * v * d / seconds / 1e12:6.0f} TFLOP/s  {t}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
