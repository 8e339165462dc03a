"""How the Triton plans of the consistency loss divide their rows; test_triton_interpreter.py runs the kernels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.consistency_loss import triton_rows


@given(
    pairs=st.lists(st.integers(-1, 6), max_size=40),
    labelled=st.lists(st.booleans(), min_size=7, max_size=7),
    stats=st.booleans(),
    capacity=st.integers(2, 50),
)
def test_every_row_is_planned_once(pairs: list[int], labelled: list[bool], stats: bool, capacity: int) -> None:
    plan = triton_rows._planned(torch.tensor(pairs, dtype=torch.int64), torch.tensor(labelled), stats, capacity)
    chunks = [triton_rows.Chunk(*parts) for parts in plan]
    rows = {
        "voiced": [row for row, has in enumerate(labelled) if has],
        "drafts": [row for row, pair in enumerate(pairs) if pair >= 0],
        "alone": [row for row, pair in enumerate(pairs) if pair < 0 and stats],
    }
    for name, expected in rows.items():
        assert sorted(row for chunk in chunks for row in getattr(chunk, name).tolist()) == expected, name
    if stats:
        seen = {row for chunk in chunks for row in [*chunk.silent.tolist(), *chunk.voiced.tolist()]}
        assert seen == set(range(7))
    for chunk in chunks:
        assert 0 < chunk.rows <= capacity
        heads = [None] * chunk.alone.numel() + [*chunk.silent.tolist(), *chunk.voiced.tolist()]
        taught = {}
        for head, (first, last) in enumerate(zip(chunk.first.tolist(), chunk.last.tolist(), strict=True)):
            taught |= dict.fromkeys(range(first, last), head)
        assert [taught[row] for row in range(chunk.heads, chunk.rows)] == chunk.teacher.tolist()
        assert [heads[head] for head in chunk.teacher.tolist()] == [pairs[row] for row in chunk.drafts.tolist()]
