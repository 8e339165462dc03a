"""The bookkeeping of one Jacobi step: rows planned, predictions accepted, the draft searched for where it goes on."""

import torch

from bench.suite.case import Case, Operation, Shape
from engine import RefineOptions
from engine.jacobi import JacobiSequence, Vocabulary
from engine.kernels import JacobiState, PackedRows, jacobi_accept, jacobi_pack
from engine.kv_cache import pages_for
from engine.loop_slot import fill

WORDS, KNEE, PROMPT = 500, 11, [1, 2, 3]
VOCABULARY = Vocabulary(WORDS, frozenset(), 0)


def of_accept(shape: Shape, dtype: torch.dtype) -> Case:
    """Sequences, rows of each, tokens of each draft. The first guess is wrong, so that all of the draft is searched."""
    slots, rows, length = shape
    options = RefineOptions(max_new_tokens=2 * length, window=rows)
    drafts = torch.randint(1, WORDS, (slots, length)).tolist()
    predicted = [[draft[7], *draft[8 : 7 + rows]] for draft in drafts]
    pages = pages_for(len(PROMPT) + 2 * length)
    flat, eos = torch.tensor(predicted).flatten(), torch.tensor([-1], dtype=torch.int32)

    def sequences() -> list[JacobiSequence]:
        made = [JacobiSequence(PROMPT, draft, options, VOCABULARY, KNEE, 0) for draft in drafts]
        for sequence in made:
            prefix = sequence.plan_prefill(len(PROMPT))
            assert prefix is not None
            sequence.advance(prefix, [])
        return made

    def host(fresh: list[JacobiSequence]) -> list[list[int]]:
        for sequence, tokens in zip(fresh, predicted, strict=True):
            sequence.advance(sequence.plan(rows, slots), tokens)
        return [sequence.final + sequence.guess for sequence in fresh]

    def filled() -> tuple[JacobiState, PackedRows]:
        state = JacobiState.allocate(slots, 2 * length + 1, pages, torch.device("cpu"))
        for slot, sequence in enumerate(sequences()):
            fill(state, slot, sequence, VOCABULARY.pad)
        return state, PackedRows.allocate(slots * rows, slots, torch.device("cpu"))

    def device(fresh: tuple[JacobiState, PackedRows]) -> list[list[int]]:
        state, packed = fresh
        jacobi_pack(state, packed, KNEE, impl="torch")
        jacobi_accept(state, flat, packed.row_start, eos, impl="torch")
        return [text[1 : 1 + length].tolist() for text in state.text]

    def first(found: list[list[int]]) -> list[list[int]]:
        return [text[:length] for text in found]

    calls = {"engine": lambda fresh: first(host(fresh)), "tensors": device}
    return Case(calls, fresh={"engine": sequences, "tensors": filled})


OPERATIONS = {
    "jacobi_accept": Operation(
        of_accept, ("engine", "tensors"),
        {"tiny": ((2, 4, 16),), "quick": ((1, 32, 256), (8, 32, 256)), "full": ((64, 16, 256),)},
    ),
}  # fmt: skip
"""``engine``: lists on the host, as refinement on a CPU does it; ``tensors``: the plain PyTorch version of the GPU's."""
