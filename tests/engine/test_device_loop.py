"""Jacobi iteration on the device against the host's: one sequence on a predictor of a few lines, then whole models."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import NonFiniteLogits, RefineOptions, Refiner, device_loop
from engine.batch import StepBatch
from engine.device_loop import LONGEST_ANSWER, DeviceLoop, choose_loop, row_counts, slot_counts
from engine.jacobi import JacobiSequence, Vocabulary
from engine.kernels import PAGE_SIZE, LinearWeight
from engine.kv_cache import KVCache
from engine.model import Head
from engine.scheduler import Scheduler
from engine.step_runner import EagerRunner, StepKind
from tests.engine.checkpoints import Oracle, prompts
from tests.engine.test_exactness import KINDS, expected, make_draft

SIZE, EOS, PAD = 19, 1, 0
VOCABULARY = Vocabulary(SIZE, frozenset({EOS}), PAD)
KNEE = 11


def next_token(text: list[int]) -> int:
    """Often follows from the last token, sometimes from the last few."""
    value = (text[-1] * 5 + len(text)) if text[-1] % 3 else sum(text[-4:]) * 7 + len(text)
    return value % SIZE


class Ledger:
    """A CausalModel whose K holds the tokens: a row's prediction is made from what it finds at the positions up to its own.

    Rows of no sequence must have slot -1; a text that holds ``poison`` predicts NaN from there on.
    """

    takes_padding = True

    def __init__(self, poison: int | None = None) -> None:
        self.head = Head(LinearWeight.from_dense(torch.eye(SIZE)), None, None)
        self.max_positions = 400
        self.device = torch.device("cpu")
        self.poison = poison
        self.sizes: list[int] = []

    def new_cache(self, pages: int) -> KVCache:
        return KVCache(1, pages, 1, 1, torch.float32, self.device)

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        rows = int(batch.row_start[-1])
        self.sizes.append(len(batch.token_ids))
        assert (batch.slots[rows:] == -1).all()
        cache.k[0].view(-1)[batch.slots[:rows]] = batch.token_ids[:rows].float()
        out = torch.full((len(batch.token_ids), SIZE), float("nan"))
        for s in range(len(batch.row_start) - 1):
            for row in range(int(batch.row_start[s]), int(batch.row_start[s + 1])):
                length = int(batch.positions[row]) + 1
                assert length - 1 == int(batch.first_position[s]) + row - int(batch.row_start[s])
                pages = batch.block_table[s, : -(-length // PAGE_SIZE)].long()
                text = [int(t) for t in cache.k[0].view(-1, PAGE_SIZE)[pages].reshape(-1)[:length]]
                if self.poison not in text:
                    out[row] = torch.eye(SIZE)[next_token(text)]
        return out if batch.logit_rows is None else out[batch.logit_rows]


def make(
    device: bool, model: Ledger | None = None, pages: int = 40, max_batch_tokens: int = 512, max_batch_size: int = 4
) -> Scheduler:
    model = model or Ledger()
    cache = model.new_cache(pages)
    limits = (max_batch_tokens, max_batch_size)
    loop = DeviceLoop(model, cache, VOCABULARY, KNEE, *limits) if device else None
    return Scheduler(model, cache, *limits, loop)


def start(prompt: list[int], draft: list[int], **options: Any) -> JacobiSequence:
    return JacobiSequence(prompt, draft, RefineOptions(**options), VOCABULARY, KNEE, options.get("seed", 0))


def run(scheduler: Scheduler, sequences: list[JacobiSequence]) -> None:
    for sequence in sequences:
        if not sequence.finish_reason:
            scheduler.add(sequence)
    for _ in range(3000):
        if not scheduler.load:
            break
        scheduler.step()
        scheduler.check_integrity()
    assert scheduler.load == 0
    assert scheduler.cache.pool.free_count == scheduler.cache.pool.size


def outcome(sequence: JacobiSequence) -> tuple[object, ...]:
    return sequence.final, sequence.finish_reason, sequence.converged, type(sequence.error)


TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=40)
OPTIONS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 40),
        "keep_prefix": st.sampled_from([0, 0, 1, 5]),
        "realign": st.booleans(),
        "window": st.one_of(st.just("auto"), st.integers(1, 45)),
        "steps": st.sampled_from([None, None, 1, 2, 4]),
        "block_size": st.sampled_from([1, 3, 8, 256]),
        "concurrency": st.sampled_from([None, None, 1, 4]),
        "temperature": st.sampled_from([0.0, 0.0, 0.2, 1]),
        "top_p": st.sampled_from([1.0, 1.0, 1.0, 0.9]),
        "seed": st.sampled_from([0, 5, 2**63 - 1]),
    }
)


@settings(max_examples=150, deadline=None)
@given(TOKENS.filter(bool), TOKENS, OPTIONS, st.sampled_from([None, None, None, 7]))
def test_one_sequence_moves_as_on_the_host(
    prompt: list[int], draft: list[int], options: dict[str, Any], poison: int | None
) -> None:
    """With a fixed window, whole blocks or a concurrency also step by step."""
    host, device = (start(prompt, draft, **options) for _ in range(2))
    run(make(False, Ledger(poison)), [host])
    run(make(True, Ledger(poison)), [device])
    assert outcome(device) == outcome(host)
    if options["window"] != "auto" or options["steps"]:
        # the prompt's last row is fed with the first guesses in either, the rows before it in chunks
        assert (device.steps, device.forward_tokens) == (host.steps, host.forward_tokens)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(TOKENS.filter(bool), TOKENS, OPTIONS), min_size=2, max_size=6),
    st.sampled_from([(512, 4), (20, 3), (7, 6), (512, 1)]),
)
def test_a_mixed_batch_gives_what_each_gives_alone(
    cases: list[tuple[list[int], list[int], dict[str, Any]]], limits: tuple[int, int]
) -> None:
    """Options differ from request to request; those that do not fit the loop are moved by the host beside it."""
    alone = [start(p, d, **o) for p, d, o in cases]
    together = [start(p, d, **o) for p, d, o in cases]
    for sequence in alone:
        if not sequence.finish_reason:
            run(make(False), [sequence])
    run(make(True, None, 6, *limits), together)
    assert [outcome(s) for s in together] == [outcome(s) for s in alone]


def test_a_poisoned_request_ends_alone() -> None:
    sequences = [start([5, 10], [8] * 20, max_new_tokens=20), start([5, 13], [8] * 20, max_new_tokens=20)]
    scheduler = make(True, Ledger(poison=13))
    run(scheduler, sequences)
    assert isinstance(sequences[1].error, NonFiniteLogits)
    assert "response position 0" in str(sequences[1].error)
    assert sequences[0].error is None


@pytest.mark.parametrize("after", range(7))
def test_cancelling_frees_pages_at_once_and_leaves_the_others_alone(after: int) -> None:
    expected_one = start([5, 6, 7] * 9, [], max_new_tokens=30)
    run(make(False), [expected_one])
    scheduler = make(True, pages=4, max_batch_size=2)
    kept, dropped = start([5, 6, 7] * 9, [], max_new_tokens=30), start([3] * 30, [4] * 9, max_new_tokens=30)
    scheduler.add(kept)
    scheduler.add(dropped)
    for _ in range(after):
        scheduler.step()
    scheduler.cancel(dropped)
    scheduler.cancel(dropped)
    scheduler.check_integrity()
    assert scheduler.cache.pool.free_count == (2 if after and not kept.finish_reason else 4)
    next_one = start([3] * 30, [4] * 9, max_new_tokens=30)  # in the pages of the one that was dropped
    scheduler.add(next_one)
    run(scheduler, [])
    reference = start([3] * 30, [4] * 9, max_new_tokens=30)
    run(make(False), [reference])
    assert outcome(kept) == outcome(expected_one)
    assert outcome(next_one) == outcome(reference)


def test_noise_is_made_only_while_somebody_samples() -> None:
    """Greedy steps are those of a loop that knows no sampling; a sampled one among them changes nobody's answer."""
    kinds: list[StepKind] = []
    scheduler = recorded(kinds, 4)
    greedy = [start([5, 10], [], max_new_tokens=30, window=1) for _ in range(2)]
    sampled = start([5, 10], [], max_new_tokens=6, window=1, temperature=0.3, seed=8)
    run(scheduler, greedy[:1])
    assert kinds
    assert not any(kind.sampled for kind in kinds)
    del kinds[:]
    run(scheduler, [greedy[1], sampled])
    assert [kind.sampled for kind in kinds] == sorted((kind.sampled for kind in kinds), reverse=True)
    assert sum(kind.sampled for kind in kinds) in (sampled.steps, sampled.steps + 1)
    assert not kinds[-1].sampled
    assert outcome(greedy[0]) == outcome(greedy[1])
    assert sampled.final != greedy[0].final[: len(sampled.final)]


def recorded(kinds: list[StepKind], max_batch_size: int) -> Scheduler:
    """Which kinds of steps are launched."""

    def record(step: Callable[[StepKind], None]) -> EagerRunner:
        return EagerRunner(lambda kind: (kinds.append(kind), step(kind))[1])

    model = Ledger()
    cache = model.new_cache(40)
    return Scheduler(
        model, cache, 512, max_batch_size, DeviceLoop(model, cache, VOCABULARY, KNEE, 512, max_batch_size, record)
    )


def test_a_step_is_launched_for_the_slots_in_use() -> None:
    """Of few counts: those who come first keep their slots, and the rest ends before them."""
    kinds: list[StepKind] = []
    lengths = [40, *([20] * 7), *([10] * 3)]
    sequences = [start([5, 10], [], max_new_tokens=length, window=1) for length in lengths]
    run(recorded(kinds, 20), sequences)
    slots = [kind.slots for kind in kinds]
    assert slots == sorted(slots, reverse=True)
    assert {count: slots.count(count) for count in slots} == pytest.approx({20: 10, 8: 10, 1: 20}, abs=1)
    assert all(
        s.final[:10] == sequences[0].final[:10] and len(s.final) == n for s, n in zip(sequences, lengths, strict=True)
    )
    assert (slot_counts(5), slot_counts(8), slot_counts(64)) == ((1, 5), (1, 8), (1, 8, 64))


def test_the_host_reads_one_step_late_but_where_all_may_end() -> None:
    """A right draft takes one launch; a sequence whose end nobody sees costs one launch too many."""
    text = [5, 10]
    while len(text) < 12:
        text.append(next_token(text))
    assert EOS not in text
    right = start([5, 10], text[2:], max_new_tokens=10, window=10)
    model = Ledger()
    run(make(True, model), [right])
    assert (right.steps, len(model.sizes)) == (1, 2)  # one of them for the prompt
    early = Ledger()
    sequence = start([3, 11], [], max_new_tokens=300, window=1)
    run(make(True, early), [sequence])
    assert sequence.finish_reason == "eos"
    assert len(early.sizes) == 1 + sequence.steps + 1


def test_few_sizes_and_room_for_what_is_wanted() -> None:
    assert row_counts(2048) == (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    assert row_counts(5) == (5,)
    assert row_counts(300)[-2:] == (256, 300)
    model = Ledger()
    run(make(True, model), [start([5], [6] * 40, max_new_tokens=40, window=40)])
    assert set(model.sizes) <= {16, 32, 64}
    assert model.sizes[0] == 64


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "top_p": 0.9}, False),
        ({"temperature": 0, "top_p": 0.9}, True),
        ({"steps": 2, "block_size": 8, "max_new_tokens": 300}, True),
        ({"steps": 2, "block_size": 60, "max_new_tokens": 300}, False),
        ({"window": 90, "concurrency": 2}, True),
        ({"window": 110, "concurrency": 2}, False),
        ({"max_new_tokens": 400}, True),
        ({"max_new_tokens": 401}, False),
    ],
)
def test_what_the_loop_takes(options: dict[str, Any], taken: bool) -> None:
    loop = make(True, max_batch_tokens=100).loop
    assert loop is not None
    assert loop.takes(start([5], [], **options)) is taken


def test_answers_as_long_as_a_slot() -> None:
    model = Ledger()
    model.max_positions = 20_000
    loop = make(True, model, pages=640, max_batch_size=1).loop
    assert loop is not None
    assert loop.takes(start([5], [], max_new_tokens=LONGEST_ANSWER))
    assert not loop.takes(start([5], [], max_new_tokens=LONGEST_ANSWER + 1))


def test_which_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(choice: str, model: Ledger) -> DeviceLoop | None:
        monkeypatch.setenv("DIFFPO_LOOP", choice)
        return choose_loop(model, model.new_cache(4), VOCABULARY, KNEE, 64, 4)

    model = Ledger()
    assert choose("", model) is None
    assert choose("host", model) is None
    assert isinstance(choose("device", model), DeviceLoop)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose("graphs", model)
    with pytest.raises(ValueError, match="DIFFPO_LOOP"):
        choose("fast", model)
    model.takes_padding = False
    assert choose("device", model) is None


@pytest.mark.parametrize("reason", [None, "its tiles are sized for NVIDIA's chips"])
def test_graphs_are_the_default_where_kernels_can_be_launched(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Ledger()
    cache = model.new_cache(4)
    model.device = torch.device("cuda")
    monkeypatch.delenv("DIFFPO_LOOP", raising=False)
    monkeypatch.setattr(device_loop, "reason_against_triton", lambda tensor: reason)
    made: list[object] = []
    monkeypatch.setattr(device_loop, "DeviceLoop", lambda *given: made.append(given))
    choose_loop(model, cache, VOCABULARY, KNEE, 64, 4)
    assert len(made) == (reason is None)


@contextmanager
def device_refiner(oracle: Oracle, **limits: int) -> Iterator[Refiner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFPO_LOOP", "device")
        refiner = Refiner.from_pretrained(oracle.folder, kv_cache_tokens=2048, **limits)
    with refiner:
        yield refiner
        refiner.check_integrity()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-some-windows", "qwen3", "gemma2"])
@pytest.mark.parametrize(("max_batch_tokens", "max_batch_size"), [(2048, 64), (24, 3)])
def test_equals_greedy_generate(
    name: str, max_batch_tokens: int, max_batch_size: int, oracle: Callable[[str], Oracle]
) -> None:
    model, rng = oracle(name), random.Random(5)
    work = []
    for prompt, kind in itertools.product(prompts(1)[:4], rng.sample(KINDS, 4)):
        work.append((prompt, make_draft(kind, model.greedy(prompt), rng)))
    requests = [{"prompt_ids": prompt, "draft_ids": draft} for prompt, draft in work]
    with device_refiner(model, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size) as refiner:
        for options in (RefineOptions(max_new_tokens=40), RefineOptions(max_new_tokens=25, window=6, keep_prefix=3)):
            results = refiner.refine(requests, options)
            for (prompt, draft), result in zip(work, results, strict=True):
                assert result.token_ids == expected(model, prompt, draft, options)
                assert result.converged


def test_sessions_with_other_options_share_a_refiner(oracle: Callable[[str], Oracle], load: Callable[..., Any]) -> None:
    """Greedy and sampled requests on the device, those with a nucleus by the host, at the same time."""
    options = [
        RefineOptions(max_new_tokens=20),
        RefineOptions(max_new_tokens=20, temperature=0.8, seed=3),
        RefineOptions(max_new_tokens=20, temperature=0.8, seed=3, top_p=0.7),
        RefineOptions(max_new_tokens=20, steps=2, block_size=6),
    ]
    requests = [{"prompt_ids": p, "draft_ids": p[::-1]} for p in prompts(1)[:4]]
    alone = [[r.token_ids for r in load("llama").refine(requests, o)] for o in options]
    with device_refiner(oracle("llama")) as refiner:
        sessions = [refiner.session(o) for o in options]
        for session, (index, request) in itertools.product(sessions, enumerate(requests)):
            assert session.add(request, index) is None
        found: list[dict[int, list[int]]] = [{} for _ in sessions]
        while any(session.open for session in sessions):
            for results, session in zip(found, sessions, strict=True):
                results.update({r.index: r.token_ids for r in session.step()})
    assert [[results[i] for i in range(len(requests))] for results in found] == alone
