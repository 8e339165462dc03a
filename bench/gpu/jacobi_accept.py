"""What a step decides on the device: the rows it feeds and what of its predictions is kept, beside the plain version."""

from collections.abc import Callable, Iterator

import torch

from bench.gpu.case import Case, difference
from engine.kernels import Field, JacobiState, PackedRows, Phase, jacobi_accept, jacobi_pack
from engine.kernels.native import Impl

PLACES, DRAFT, KNEE, WORDS = 1025, 256, 200, 500


def cases(device: torch.device, *, tiny: bool) -> Iterator[Case]:
    """Answers whose guess is wrong at once, so that all of the draft is searched for where they go on."""
    for slots, rows in ((2, 16),) if tiny else ((8, 256), (1, 64), (64, 1024)):
        yield case(device, slots, rows)


def case(device: torch.device, slots: int, size: int) -> Case:
    state = started(device, slots)
    rows = PackedRows.allocate(size, slots, device)
    predictions = torch.randint(WORDS, (size,), device=device)
    eos = torch.full((1,), -1, dtype=torch.int32, device=device)
    scratch = JacobiState(*(getattr(state, name).clone() for name in JacobiState.__slots__))
    changed = ("fields", "rates", "text", "iterate")

    def variant(impl: Impl) -> Callable[[], object]:
        def call() -> object:
            for name in changed:  # which a step moves on
                getattr(scratch, name).copy_(getattr(state, name))
            jacobi_pack(scratch, rows, KNEE, impl=impl)
            jacobi_accept(scratch, predictions, rows.row_start, eos, impl=impl)
            return scratch.fields, scratch.text

        return call

    program = torch.compile(variant("torch"), dynamic=False)
    moved = sum(2 * getattr(state, name).nbytes for name in changed)
    moved += rows.token_ids.nbytes * 3 + 4 * slots * (DRAFT + size // slots)
    return Case(
        "jacobi_accept",
        f"{slots} sequences, {size} rows, drafts of {DRAFT}",
        {"ours": variant("triton"), "eager": variant("torch"), "torch.compile": program},
        moved,
        0,
        lambda out: difference(out, variant("torch")()),
        0.0,
    )


def started(device: torch.device, slots: int) -> JacobiState:
    """Every slot runs, 40 tokens in, with the rest of its draft as the guess."""
    state = JacobiState.allocate(slots, PLACES, -(-PLACES // 32), device)
    state.text[:, : DRAFT + 1].copy_(torch.randint(WORDS, (slots, DRAFT + 1), device=device))
    state.draft[:, :DRAFT].copy_(state.text[:, 1 : DRAFT + 1])
    state.rates.copy_(torch.tensor([0.5, 2.0, 0.9, 3.0], device=device).expand(slots, 4))
    values = {
        Field.PHASE: Phase.RUNNING, Field.KNOWN: 41, Field.VALID: 40, Field.GUESSED: DRAFT + 1, Field.LIMIT: PLACES,
        Field.CONVERGED: 1, Field.EXPECTED: 40, Field.DRAFT: DRAFT, Field.REALIGN: 1,
    }  # fmt: skip
    for field, value in values.items():
        state[field].fill_(int(value))
    return state
