"""The plan "dense": six units of matrix product, the logits of a chunk of rows at a time, nothing computed twice.

Of each chunk: float32 logits of both streams by one product, the row sums (one pass over the logits), losses and
differences of probabilities (a second pass, written in the products' dtype), then the products with W and the hidden rows.
The loss is DiffPO's (arXiv 2503.04240); only the final difference of two probabilities is ever rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.consistency_loss.problem import Needs, Outcome, Problem
from engine.kernels.consistency_loss.triton_math import FIELDS, capped, combined, finite, merged, moved, store_sums
from engine.kernels.consistency_loss.triton_products import accumulate, product
from engine.kernels.consistency_loss.triton_rows import Chunk, Results, chunks

BLOCK = 1024
WARPS = 4
PROGRAMS = 4096  # enough to fill any GPU several times over; the same everywhere, so that results are
MAX_SPLITS = 64

ROWS_WITH_WEIGHT = 2048
"""Each chunk reads and writes the whole float32 dW: 6% of the products' time on an H200 at 2048 rows (estimate)."""
ROWS_WITHOUT = 512
CHUNK_BYTES = 1 << 30
"""More rows than the above where the vocabulary is so small that they fit here."""


def loss_and_gradients(p: Problem, needs: Needs) -> Outcome:
    """The loss's rows and the wanted gradients; see Problem and Outcome."""
    results = Results(p, needs)
    weight_sum = torch.empty(p.weight.shape, dtype=torch.float32, device=p.weight.device) if needs.weight else None
    bias_sum = torch.zeros(p.weight.shape[0], dtype=torch.float32, device=p.weight.device) if needs.bias else None
    scale = gradient_scale(p)
    parts = chunks(p, needs, capacity(p, needs))
    dtype = p.weight.dtype
    logits, differences = buffers(p, needs, max((part.rows for part in parts), default=0))
    for i, part in enumerate(parts):
        _chunk(p, needs, part, results, logits, differences, weight_sum, bias_sum, scale, i == 0)
    if weight_sum is not None and not parts:
        weight_sum.zero_()
    del logits, differences  # before the peak that the result's own copy of dW would make
    return results.outcome(unscaled(weight_sum, scale, dtype), unscaled(bias_sum, scale, dtype))


def capacity(p: Problem, needs: Needs) -> int:
    """Rows per chunk."""
    row = p.weight.shape[0] * (4 + (p.weight.element_size() if p.weight.element_size() < 4 else 0))
    return max(ROWS_WITH_WEIGHT if needs.weight else ROWS_WITHOUT, CHUNK_BYTES // max(1, row))


def peak_bytes(p: Problem, needs: Needs) -> int:
    """About what this plan allocates: both buffers of a chunk, float32 dW, and all gradients."""
    (v, d), size = p.weight.shape, p.weight.element_size()
    rows = p.labels.numel() + p.pair_index.numel()
    chunk = min(rows, capacity(p, needs)) * (v * (4 + (size if size < 4 else 0)) + d * (size + 4))
    # the float32 dW is there all the time; the chunk's buffers are gone when its copy in W's dtype is made
    weight = v * d * 4 if needs.weight else 0
    return weight + max(chunk, v * d * size if needs.weight and size < 4 else 0) + rows * d * size


def gradient_scale(p: Problem) -> Tensor | None:
    """A power of two that brings the differences to float16's range, where gradients like 1e-9 are zero otherwise."""
    if p.weight.dtype != torch.float16:
        return None
    largest = torch.cat([p.ce_scale.abs(), p.kl_scale.abs() * p.temperature, p.ce_scale.new_full((1,), 1e-30)]).amax()
    return torch.exp2(torch.floor(14 - torch.log2(largest)))


def unscaled(total: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if total is None:
        return None
    return (total if scale is None else total.div_(scale)).to(dtype)


def buffers(p: Problem, needs: Needs, rows: int, multiple: int = 8) -> tuple[Tensor, Tensor]:
    """[rows, v] for logits and for differences, float32 ones in the same memory; row lengths a multiple of ``multiple``.

    Products are slower on rows that do not start at multiples of 16 bytes.
    """
    v, dtype = p.weight.shape[0], p.weight.dtype
    shape = rows, -(-v // multiple) * multiple
    logits = torch.empty(shape, dtype=torch.float32, device=p.weight.device)[:, :v]
    if dtype == torch.float32 or not needs.gradients:
        return logits, logits
    return logits, torch.empty(shape, dtype=dtype, device=p.weight.device)[:, :v]


def _chunk(
    p: Problem, needs: Needs, part: Chunk, results: Results, logits: Tensor, differences: Tensor,
    weight_sum: Tensor | None, bias_sum: Tensor | None, scale: Tensor | None, first: bool,
) -> None:  # fmt: skip
    hidden = part.hidden(p)
    g = losses_and_differences(p, needs, part, hidden, results, logits, differences, scale)
    if not needs.gradients:
        return
    wanted = part.rows_wanted(needs)
    if wanted.stop > wanted.start:
        results.write_hidden(part, wanted, product(g[wanted], p.weight), scale)
    if weight_sum is not None:
        accumulate(weight_sum, g.T, hidden[part.without_gradient :], first)
    if bias_sum is not None:
        bias_sum += g.sum(0, dtype=torch.float32)


def losses_and_differences(
    p: Problem, needs: Needs, part: Chunk, hidden: Tensor, results: Results, logits: Tensor, differences: Tensor,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Writes a chunk's losses; returns dLoss/dlogits [rows with a gradient, v] times ``scale``, in ``buffers``."""
    quiet, store = part.without_gradient, needs.gradients
    z = logits[: part.rows]
    product(hidden, p.weight.T, out=z)
    sums = row_sums(p, z, part.labels(p), needs.stats)
    g = differences[quiet : part.rows] if differences is logits else differences[: part.rows - quiet]
    row_scale = part.scale(p) if scale is None else part.scale(p) * scale
    results.write_losses(part, sums, store_differences(p, part, z, sums, row_scale, g, store))
    return g


def row_sums(p: Problem, z: Tensor, labels: Tensor, stats: bool) -> Tensor:
    """Logits z [rows, v] before bias and soft-cap, labels of the first rows -> sums as ``combined`` returns them."""
    rows, v = z.shape
    splits = max(1, min(MAX_SPLITS, -(-PROGRAMS // max(1, rows)), triton.cdiv(v, BLOCK)))
    width = triton.cdiv(triton.cdiv(v, splits), BLOCK) * BLOCK
    splits = triton.cdiv(v, width)
    partial = torch.empty(FIELDS, rows, splits, dtype=torch.float32, device=z.device)
    if rows:
        sums_kernel[(rows, splits)](
            z, z.stride(0), p.bias, labels, labels.numel(), partial, rows, v, width, p.softcap or 1.0,
            1.0 / p.temperature, HAS_BIAS=p.bias is not None, HAS_CAP=bool(p.softcap),
            HAS_TAU=p.temperature != 1.0, STATS=stats, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return combined(partial, p.temperature, stats)


def store_differences(
    p: Problem, part: Chunk, z: Tensor, sums: Tensor, scale: Tensor, g: Tensor, store: bool
) -> Tensor:
    """Fills g [rows with a gradient, v]; returns the divergence of the drafts."""
    v, drafts = z.shape[1], part.drafts.numel()
    blocks = triton.cdiv(v, BLOCK)
    divergence = torch.empty(drafts, blocks, dtype=torch.float32, device=z.device)
    if part.rows and (store or drafts):
        differences_kernel[(part.heads, blocks)](
            z, z.stride(0), p.bias, sums, part.labels(p), part.first, part.last, scale, g, g.stride(0), divergence,
            part.rows, part.heads, part.without_gradient, v, blocks, p.softcap or 1.0, 1.0 / p.temperature,
            HAS_BIAS=p.bias is not None, HAS_CAP=bool(p.softcap), HAS_TAU=p.temperature != 1.0, STORE=store,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return divergence.sum(1)


@triton.jit
def load_logits(
    z: tl.tensor, bias: tl.tensor, columns: tl.tensor, inside: tl.tensor, cap: tl.tensor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Of one row from its address: soft-capped logits, -inf outside, and the soft-cap's derivative."""
    x = tl.load(z + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    s, slope = capped(x, cap, HAS_CAP)
    return tl.where(inside, s, float("-inf")), slope


@triton.jit(do_not_specialize=["labelled", "rows", "width"])
def sums_kernel(
    z: tl.tensor, z_stride: tl.tensor, bias: tl.tensor, labels: tl.tensor, labelled: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, v: tl.tensor, width: tl.tensor, cap: tl.tensor, inv_tau: tl.tensor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row's sums over ``width`` columns, online in every lane: no lane waits for another before the end."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z += row * z_stride
    start = split * width
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    lt, a, best = l, l, tl.zeros((BLOCK,), tl.float32)
    for offset in range(start, tl.minimum(start + width, v), BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        s, _ = load_logits(z, bias, columns, columns < v, cap, HAS_BIAS, HAS_CAP)
        top = tl.maximum(m, s)
        base = finite(top)
        l, lt, a = moved(m, l, lt, a, base, inv_tau, HAS_TAU, STATS)
        e = tl.exp(s - base)
        l += e
        if HAS_TAU:
            lt += tl.exp((s - base) * inv_tau)
        if STATS:
            a += tl.where(e == 0.0, 0.0, e * (s - base))
            best = tl.where(s > m, columns.to(tl.float32), best)
        m = top
    label_logit = 0.0
    if row < labelled:
        label = tl.load(labels + row)
        if (label >= start) & (label < start + width):
            single = label + tl.arange(0, 1)
            s, _ = load_logits(z, bias, single, single < v, cap, HAS_BIAS, HAS_CAP)
            label_logit = tl.sum(s, 0)
    m, l, lt, a, best = merged(m, l, lt, a, best, inv_tau, HAS_TAU, STATS)
    splits = tl.num_programs(1)
    to, everywhere = partial + row * splits + split, row < rows
    store_sums(to, rows.to(tl.int64) * splits, everywhere, m, l, lt, a, label_logit, best, HAS_TAU, STATS)


@triton.jit(do_not_specialize=["rows", "heads", "quiet", "blocks"])
def differences_kernel(
    z: tl.tensor, z_stride: tl.tensor, bias: tl.tensor, sums: tl.tensor, labels: tl.tensor, first: tl.tensor,
    last: tl.tensor, scale: tl.tensor, g: tl.tensor, g_stride: tl.tensor, divergence: tl.tensor, rows: tl.tensor,
    heads: tl.tensor, quiet: tl.tensor, v: tl.tensor, blocks: tl.tensor, cap: tl.tensor, inv_tau: tl.tensor,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TAU: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A block of columns of one target and of all drafts it teaches; g may be z's own memory from row ``quiet`` on."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < v
    stride = rows.to(tl.int64)
    s, slope = load_logits(z + head * z_stride, bias, columns, inside, cap, HAS_BIAS, HAS_CAP)
    log_p = s - tl.load(sums + head) - tl.load(sums + stride + head)
    p = tl.exp(log_p)
    if STORE:
        own = tl.load(scale + head)
        if head >= quiet:
            d = p - tl.where(columns == tl.load(labels + head), 1.0, 0.0)
            to = g + (head - quiet) * g_stride + columns
            tl.store(to, tl.where(own == 0.0, 0.0, own * slope * d).to(g.dtype.element_ty), mask=inside)
    if HAS_TAU:
        log_p = (s - tl.load(sums + head)) * inv_tau - tl.load(sums + 2 * stride + head)
        p = tl.exp(log_p)
    for row in range(tl.load(first + head), tl.load(last + head)):
        st, slope_t = load_logits(z + row * z_stride, bias, columns, inside, cap, HAS_BIAS, HAS_CAP)
        log_q = st - tl.load(sums + row)
        if HAS_TAU:
            log_q = log_q * inv_tau - tl.load(sums + 2 * stride + row)
        else:
            log_q -= tl.load(sums + stride + row)
        q = tl.exp(log_q)
        # p (log p - log q) + q - p has no negative terms: near convergence nothing cancels but in the logarithms
        terms = tl.where(p > 0.0, p * (log_p - log_q), 0.0) + (q - p)
        tl.store(divergence + (row - heads) * blocks + block, tl.sum(tl.where(inside, terms, 0.0), 0))
        if STORE:
            own = tl.load(scale + row)
            to = g + (row - quiet) * g_stride + columns
            tl.store(to, tl.where(own == 0.0, 0.0, own * slope_t * (q - p)).to(g.dtype.element_ty), mask=inside)
