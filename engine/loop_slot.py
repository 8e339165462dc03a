"""What goes into a slot of the device loop, and what comes back from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import staged
from engine.jacobi import JacobiSequence
from engine.kernels import Field, JacobiState, Phase
from engine.kernels.jacobi_state import LONGEST_TEXT, MOST_GUESSES
from engine.request import FinishReason

_REASONS: dict[int, FinishReason] = {Phase.EOS: "eos", Phase.LENGTH: "length", Phase.STEPS: "steps"}


class Reading:
    """A tensor's values on their way to the host, as they are when the work launched so far is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._values = tensor.clone()
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._values.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        """Whether ``wait`` would not have to."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def reserved_rows(sequence: JacobiSequence) -> int:
    """Rows that a sequence gets in every step: one, or all it can want where a step may not depend on the others."""
    options = sequence.options
    if options.steps is not None:
        # a block that was given up is fed again, with the next one behind it
        return min(2 * options.block_size, options.max_new_tokens)
    if options.concurrency is None:
        return 1
    return min(MOST_GUESSES + 1 if options.window == "auto" else options.window, options.max_new_tokens)


def fill(state: JacobiState, slot: int, sequence: JacobiSequence, pad: int) -> None:
    """Writes a sequence that has not been moved yet into a slot, behind what was launched before and without waiting."""
    text, options, policy = [sequence.prompt[-1], *sequence.final, *sequence.guess], sequence.options, sequence.policy
    # behind the answer's last place nothing is read
    answer = torch.full((2, options.max_new_tokens + 1), pad, dtype=torch.int32, device="cpu")
    answer[0, : len(text)] = _host(text, torch.int32)
    answer[1, : len(text) - 1] = answer[0, 1 : len(text)]
    places, pages = answer.shape[1], len(sequence.pages)
    rates = (policy.first.value, policy.first.weight, policy.run.value, policy.run.weight)
    for to, values in (
        (state.text[slot, :places], answer[0]),
        (state.draft[slot, :places], answer[1]),
        (state.block_table[slot, :pages], _host(sequence.pages, torch.int32)),
        (state.rates[slot], _host(rates, torch.float32)),
        (state.temperature[slot], _host(options.temperature, torch.float32)),
        (state.seeds[slot], _host(sequence.seed, torch.int64)),
        (state.fields[slot], _host(_fields(sequence, len(text)), torch.int32)),
    ):
        to.copy_(staged(values, to.device), non_blocking=True)


def _host(values: float | Sequence[float], dtype: torch.dtype) -> Tensor:
    """On the CPU, whatever the process has made the default."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _fields(sequence: JacobiSequence, places: int) -> list[int]:
    options = sequence.options
    fields = {
        Field.PHASE: Phase.RUNNING,
        Field.KNOWN: len(sequence.final) + 1,
        Field.VALID: len(sequence.final),
        Field.GUESSED: places,
        Field.ROWS: sequence.forward_tokens,
        Field.CONVERGED: 1,
        Field.BLOCK_END: sequence.block_end + 1,
        Field.EXPECTED: len(sequence.final),
        Field.BASE: len(sequence.prompt) - 1,
        Field.LIMIT: options.max_new_tokens + 1,
        Field.WINDOW: 0 if options.window == "auto" else min(options.window, LONGEST_TEXT),
        Field.CONCURRENCY: min(options.concurrency or 0, LONGEST_TEXT),
        Field.STEP_LIMIT: min(options.steps or 0, LONGEST_TEXT),
        Field.BLOCK_SIZE: min(options.block_size, LONGEST_TEXT),
        Field.DRAFT: places - 1,
        Field.REALIGN: options.realign and options.steps is None,
    }
    return [int(fields.get(field, 0)) for field in Field]


def read_text(state: JacobiState, slot: int, sequence: JacobiSequence) -> Reading:
    """The text of a sequence in its slot."""
    return Reading(state.text[slot, : sequence.options.max_new_tokens + 1])


def show(sequence: JacobiSequence, fields: list[int], text: Reading | None) -> None:
    """Tells a sequence that goes on how far its slot has come; with ``text`` also what that held."""
    sequence.steps, sequence.forward_tokens = fields[Field.STEPS], fields[Field.ROWS]
    if text is not None:
        tokens: list[int] = text.wait().tolist()
        known = fields[Field.KNOWN]
        sequence.show(tokens[1:known], tokens[known : fields[Field.GUESSED]])


def conclude(sequence: JacobiSequence, fields: list[int], text: Reading) -> None:
    """Gives a sequence that ended its result."""
    final: list[int] = text.wait()[1 : fields[Field.KNOWN]].tolist()
    sequence.show(final, [])
    sequence.steps, sequence.forward_tokens = fields[Field.STEPS], fields[Field.ROWS]
    sequence.converged = bool(fields[Field.CONVERGED])
    if fields[Field.PHASE] == Phase.NAN:
        sequence.fail_at_nan()
    else:
        sequence.finish_reason = _REASONS[fields[Field.PHASE]]
