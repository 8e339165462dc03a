"""What a program of paged attention does: finds its rows, takes in tiles of keys, online softmax in float32."""

import triton
import triton.language as tl

from engine.kernels.gpu.logits_tile import part_of


@triton.jit
def sequence_of(tile: tl.tensor, row_start: tl.tensor, sequences: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """The sequence that a tile of ROWS rows belongs to; ``sequences`` where it is one too many.

    The tiles of sequence s begin at row_start[s] // ROWS + s: enough for its rows wherever they start, and how many there
    are in all follows from shapes. Every sequence whose last tile lies before this one counts.
    """
    found = 0
    for start in range(0, sequences, 128):
        s = start + tl.arange(0, 128)
        stop = tl.load(row_start + s + 1, mask=s < sequences, other=0)
        found += tl.sum(((s < sequences) & (stop // ROWS + s < tile)).to(tl.int32), 0)
    return found


@triton.jit
def tanh(x: tl.tensor, PRECISE: tl.constexpr) -> tl.tensor:
    """To 1e-7 absolute, which is all that scores of half precision can use; where PRECISE, relative to the result too."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - e) / (1.0 + e)
    if PRECISE:
        y = x * x
        near = tl.abs(x) * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
        size = tl.where(y < 0.0625, near, size)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def no_sums(LINES: tl.constexpr, COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sums over no keys, as ``attended`` takes and returns them."""
    nothing = tl.zeros((LINES,), tl.float32)
    return tl.zeros((LINES, COLUMNS), tl.float32), nothing, nothing + float("-inf")


@triton.jit
def products(q: tl.tensor, k: tl.tensor, PRECISE: tl.constexpr) -> tl.tensor:
    """q [lines, columns] times k [keys, columns] transposed.

    Without tensor cores, where PRECISE, a thread loads all columns of its line and key before it multiplies: more than 64
    would not fit its registers, so they are taken 32 at a time.
    """
    COLUMNS: tl.constexpr = q.shape[1]
    if PRECISE and COLUMNS > 64:
        PARTS: tl.constexpr = COLUMNS // 32
        score = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
        for part in tl.static_range(PARTS):
            score = tl.dot(part_of(q, part, PARTS), part_of(k, part, PARTS).trans(), score, input_precision="ieee")
    else:
        score = tl.dot(q, k.trans(), input_precision="ieee")
    return score


@triton.jit
def attended(
    acc: tl.tensor, l: tl.tensor, m: tl.tensor, first: tl.tensor, last: tl.tensor, q: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, pages: tl.tensor, position: tl.tensor, end: tl.tensor, stride: tl.tensor, window: tl.tensor,
    score_scale: tl.tensor, exponent_scale: tl.tensor, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, SOUND: tl.constexpr, WIDEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes the keys of tiles first .. last, KEYS each, into acc [lines, columns], l and m [lines].

    m is the largest score so far; scores times ``exponent_scale`` are exponents of 2. A line at position p sees keys in
    (p - window, p]; those from ``end`` on are not even loaded. SOUND: values that are not finite do not reach lines they
    are hidden from, as 0 * NaN would, and lines that see them become NaN.
    """
    COLUMNS: tl.constexpr = acc.shape[1]
    DTYPE: tl.constexpr = v_cache.dtype.element_ty
    PRECISE: tl.constexpr = v_cache.dtype.element_ty == tl.float32
    STAGES: tl.constexpr = 1 if SOUND else None
    column = tl.arange(0, COLUMNS)[None, :]
    offset = tl.arange(0, KEYS)
    # the page numbers of a tile arrive while the tile before it is worked on: loaded where they are used, they would
    # leave a single tile in flight
    key = first * KEYS + offset
    page = tl.load(pages + key // PAGE, mask=key < end, other=0)
    for tile in tl.range(first, last, num_stages=STAGES):
        key = tile * KEYS + offset
        at = (page.to(tl.int64) * PAGE + key % PAGE)[:, None] * stride + column
        page = tl.load(pages + (key + KEYS) // PAGE, mask=key + KEYS < end, other=0)
        there = (key < end)[:, None] & (column < HEAD_DIM)
        k = tl.load(k_cache + at, mask=there, other=0.0)
        v = tl.load(v_cache + at, mask=there, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        score = products(q, k, PRECISE)
        if HAS_CAP:
            score = tanh(score * score_scale, PRECISE)
        seen = key[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen &= key[None, :] > position[:, None] - window
        score = tl.where(seen, score, float("-inf"))
        top = tl.maximum(m, tl.max(score, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        if PRECISE:
            p = tl.exp2((score - base[:, None]) * exponent_scale)
        else:
            p = tl.exp2(tl.fma(score, exponent_scale, -(base * exponent_scale)[:, None]))
        shrink = tl.exp2((m - base) * exponent_scale)
        l = l * shrink + tl.sum(p, 1)
        m = top
        if SOUND:
            broken = v.to(tl.float32) * 0.0 != 0.0
            v = tl.where(broken, 0.0, v)
            unsound = seen & (tl.max(broken.to(tl.int32), 1) > 0)[None, :]
            l += tl.where(tl.max(unsound.to(tl.int32), 1) > 0, float("nan"), 0.0)
        p = p.to(DTYPE)
        if WIDEN:
            p, v = p.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
    return acc, l, m
