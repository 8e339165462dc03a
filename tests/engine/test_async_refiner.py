"""AsyncRefiner in event loops of its callers: answers, iterates, refusals and new weights."""

import asyncio
import itertools
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from engine import (
    DEFAULT_CONDITION,
    AsyncRefiner,
    InvalidRequest,
    Iterate,
    QueueFull,
    RefineOptions,
    Refiner,
    RequestTooLong,
    UnsupportedModel,
)
from tests.engine.checkpoints import Oracle, family_model, generate, prompts
from tests.engine.service.helpers import Record, answer
from tests.engine.service.loops import Gate, fragile, run, until

PROMPTS = prompts(1)


@pytest.mark.parametrize(
    "options", [RefineOptions(max_new_tokens=24), RefineOptions(max_new_tokens=20, steps=2, keep_prefix=1)]
)
def test_answers_are_those_of_the_synchronous_engine(options: RefineOptions, oracle: Callable[[str], Oracle]) -> None:
    requests = [{"prompt_ids": p, "draft_ids": d, "id": f"{i}-{j}", "metadata": {"i": i}}
                for i, p in enumerate(PROMPTS) for j, d in enumerate(PROMPTS[:3])]  # fmt: skip
    with Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=2048) as sync:
        expected = sync.refine(requests, options)

    async def ask() -> list[Any]:
        async with AsyncRefiner.from_pretrained(
            oracle("llama").folder, kv_cache_tokens=1024, max_batch_size=5
        ) as refiner:
            return await asyncio.gather(*(refiner.refine(r, options, priority=i % 3) for i, r in enumerate(requests)))

    for result, wanted in zip(run(ask()), expected, strict=True):
        for name in ("id", "token_ids", "text", "converged", "finish_reason", "metadata", "error"):
            assert getattr(result, name) == getattr(wanted, name)
        assert result.seconds > 0


def test_stream_shows_the_answer_sharpen() -> None:
    """On the refiner that ships: text, a beginning that only grows, and refine's answer in the end."""
    request = {"prompt": "How do I boil an egg?", "draft": "Put the egg in in cold water, boil it — 8 minutes 🥚."}
    options = RefineOptions(max_new_tokens=40)

    async def ask() -> tuple[list[Iterate], str | None]:
        async with AsyncRefiner.from_pretrained() as refiner:
            events = [event async for event in refiner.stream(request, options)]
            return events, (await refiner.refine(request, options)).text

    events, text = run(ask())
    assert len(events) > 1
    last = events[-1]
    assert last.result is not None
    assert (last.result.text, last.converged_text, last.tentative_text) == (text, text, "")
    for earlier, later in itertools.pairwise(events):
        assert earlier.result is None
        assert earlier.step < later.step
        assert later.token_ids[: earlier.converged_tokens] == earlier.token_ids[: earlier.converged_tokens]
        assert (later.converged_text or "").startswith(earlier.converged_text or "")
        assert 0 < earlier.converged_tokens <= len(earlier.token_ids) <= 40
        assert earlier.tentative_text is not None


def test_encode_gives_what_refine_feeds() -> None:
    """A request of the ids has the answer of the text, also where the draft is part of the prompt."""
    request = {"prompt": "How do I boil an egg?", "draft": "Put egg in cold water and boil it it."}
    conditioned = RefineOptions(max_new_tokens=24, condition=DEFAULT_CONDITION)

    async def ask() -> None:
        async with AsyncRefiner.from_pretrained() as refiner:
            for options in (
                RefineOptions(max_new_tokens=24),
                conditioned,
                RefineOptions(max_new_tokens=24, keep_prefix=9),
            ):
                prompt_ids, draft_ids = refiner.encode(request, options)
                ids = {"prompt_ids": prompt_ids, "draft_ids": draft_ids}
                by_ids, by_text = await asyncio.gather(
                    refiner.refine(ids, replace(options, condition=None)), refiner.refine(request, options)
                )
                assert by_ids.token_ids == by_text.token_ids
            for wrong, kind in (({"prompt": ""}, InvalidRequest), ({"prompt": "egg " * 3000}, RequestTooLong)):
                with pytest.raises(kind):
                    refiner.encode(wrong)

    run(ask())


def test_an_event_loop_does_not_wait_for_a_long_text_that_another_thread_encodes() -> None:
    """Answers are decoded, and requests of token ids let in, while the tokenizer is busy."""
    options = RefineOptions(max_new_tokens=8)

    async def ask() -> None:
        async with AsyncRefiner.from_pretrained() as refiner:
            text = {"prompt": "How do I boil an egg?"}
            prompt_ids, _ = refiner.encode(text)
            wanted = await refiner.refine(text, options)
            busy = refiner._refiner._codec._lock
            busy.acquire()
            too_late = threading.Timer(20, busy.release)  # so that a failure ends too
            too_late.start()
            events = [event async for event in refiner.stream({"prompt_ids": prompt_ids}, options)]
            assert busy.locked()
            too_late.cancel()
            busy.release()
            assert events[-1].converged_text == wanted.text

    run(ask())


def test_a_slow_reader_holds_up_nobody_and_finds_the_latest() -> None:
    async def read() -> None:
        record = Record()
        async with fragile(metrics=record) as (refiner, _):
            async with aclosing(
                refiner.stream({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60, window=1))
            ) as slow:
                first = await anext(slow)  # where this thread is slow, of the end already
                others = [
                    refiner.refine({"prompt_ids": [2, 4 + i]}, RefineOptions(max_new_tokens=60)) for i in range(8)
                ]
                assert [r.token_ids for r in await asyncio.gather(*others)] == [
                    answer([2, 4 + i], 60) for i in range(8)
                ]
                await until(lambda: record.levels.get("running") == 0)  # told at the end of a turn
                rest = [event async for event in slow]
            assert first.step >= 1
            assert len(rest) == (first.result is None)  # nothing piled up
            last = [first, *rest][-1]
            assert last.result is not None
            assert last.token_ids == answer([2, 3], 60)

    run(read())


def test_bad_requests_raise_before_anything_is_waited_for() -> None:
    async def ask() -> None:
        async with fragile() as (refiner, model):
            for request, kind in (
                ({"prompt_ids": [-1]}, InvalidRequest), ({"prompt": "text"}, InvalidRequest), (7, InvalidRequest),
                ({"prompt_ids": [2] * 300}, RequestTooLong),
            ):  # fmt: skip
                with pytest.raises(kind):
                    refiner.refine(request).send(None)  # not one step into the event loop
                with pytest.raises(kind):
                    await anext(refiner.stream(request))
            for arguments in ({"priority": 0.5}, {"deadline": -1}, {"deadline": float("nan")}, {"deadline": True}):
                with pytest.raises(ValueError, match="must be"):
                    await refiner.refine({"prompt_ids": [2]}, **arguments)
            assert model.passes == 0

    run(ask())


def test_shed_at_once_while_a_step_runs() -> None:
    async def ask() -> None:
        record = Record()
        async with fragile(max_queue_requests=2, max_batch_size=1, metrics=record) as (refiner, model):
            gate = Gate(model)
            options = RefineOptions(max_new_tokens=5)
            running = asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3]}, options))
            await until(lambda: gate.passes == 1)
            waiting = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 4 + i]}, options)) for i in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull) as refused:  # the step does not end before the gate opens
                await asyncio.wait_for(refiner.refine({"prompt_ids": [2, 9]}, options), timeout=60)
            assert refused.value.retry_after > 0
            assert record.counts["requests", "shed"] == 1
            gate.open()
            assert [(await r).token_ids for r in (running, *waiting)] == [answer([2, 3 + i], 5) for i in range(3)]

    run(ask())


@pytest.mark.parametrize("family", ["llama", "mistral-tied"])
@pytest.mark.parametrize("finish", [False, True])
def test_new_weights_answer_with_the_new_model_and_lose_nobody(
    family: str, finish: bool, oracle: Callable[[str], Oracle]
) -> None:
    new = family_model(family, seed=7)
    new.generation_config.eos_token_id = sorted(oracle(family).eos)
    options = RefineOptions(max_new_tokens=24, window=1)
    old_answers = [oracle(family).greedy(p, 24) for p in PROMPTS]
    new_answers = [generate(new, p, 24) for p in PROMPTS]
    assert old_answers != new_answers

    async def ask() -> tuple[list[Any], list[Any], int]:
        async with AsyncRefiner.from_pretrained(
            oracle(family).folder, kv_cache_tokens=1024, max_batch_size=2
        ) as refiner:
            model = refiner._refiner._alive().model
            storage, gate = model.head.weight.data.data_ptr(), Gate(model)
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": p}, options)) for p in PROMPTS]
            gate.open(1)
            await until(lambda: gate.passes == 2)
            pause = asyncio.ensure_future(refiner.pause(finish=finish))
            await asyncio.sleep(0)
            gate.open()
            await pause
            done = sum(call.done() for call in calls)
            await refiner.update_weights(new.state_dict())
            with pytest.raises(UnsupportedModel, match=r"no 'model\.norm\.weight'"):
                await refiner.update_weights({k: v for k, v in new.state_dict().items() if k != "model.norm.weight"})
            refiner.resume()
            results = await asyncio.gather(*calls)
            assert model.head.weight.data.data_ptr() == storage  # in place
            return results, [await refiner.refine({"prompt_ids": p}, options) for p in PROMPTS], done

    results, after, done = run(ask())
    assert [r.token_ids for r in after] == new_answers
    # two were in the batch: they finish with the old weights, or begin anew with the new ones
    assert done == (2 if finish else 0)
    assert [r.token_ids for r in results] == (old_answers[:2] if finish else new_answers[:2]) + new_answers[2:]


def test_a_cancelled_pause_pauses_nothing_and_ends_no_other() -> None:
    async def ask() -> None:
        async with fragile() as (refiner, model):
            gate, options = Gate(model), RefineOptions(max_new_tokens=30)
            call = asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3]}, options))
            await until(lambda: gate.passes == 1)
            alone = asyncio.ensure_future(refiner.pause(finish=True))
            await asyncio.sleep(0)
            alone.cancel()
            await asyncio.wait([alone])
            gate.open()
            assert (await call).token_ids == answer([2, 3], 30)
            await refiner.pause()
            second = asyncio.ensure_future(refiner.pause())
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait([second])
            passes = gate.passes
            later = asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 4]}, options))
            await asyncio.sleep(0.05)
            assert gate.passes == passes
            refiner.resume()
            assert (await later).token_ids == answer([2, 4], 30)

    run(ask())


def test_new_weights_answer_what_was_asked_whatever_became_of_the_lists(oracle: Callable[[str], Oracle]) -> None:
    """A request in the batch begins anew with the ids it entered with."""

    async def ask() -> None:
        async with AsyncRefiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=512) as refiner:
            gate, asked = Gate(refiner._refiner._alive().model), {"prompt_ids": list(PROMPTS[2]), "draft_ids": [5, 6]}
            call = asyncio.ensure_future(refiner.refine(asked, RefineOptions(max_new_tokens=12, window=1)))
            await until(lambda: gate.passes == 1)
            asked["prompt_ids"][:] = [-1] * 600
            asked["draft_ids"].clear()
            update = asyncio.ensure_future(refiner.update_weights(oracle("llama").model.state_dict()))
            inbox = refiner._worker.inbox
            await until(lambda: len(inbox) > 0)
            gate.open()
            await update
            assert (await call).token_ids == oracle("llama").greedy(PROMPTS[2], 12)

    run(ask())


def test_untied_weights_for_a_tied_model_are_refused(oracle: Callable[[str], Oracle]) -> None:
    weights = dict(oracle("mistral-tied").model.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    async def ask() -> None:
        async with AsyncRefiner.from_pretrained(oracle("mistral-tied").folder, kv_cache_tokens=512) as refiner:
            with pytest.raises(UnsupportedModel, match="one matrix in both"):
                await refiner.update_weights(weights)
            result = await refiner.refine({"prompt_ids": PROMPTS[2]}, RefineOptions(max_new_tokens=9))
            assert result.token_ids == oracle("mistral-tied").greedy(PROMPTS[2], 9)

    run(ask())


def test_limits_are_checked(load: Callable[..., Refiner]) -> None:
    for name in ("max_queue_requests", "max_queue_tokens"):
        for value in (0, True, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
                AsyncRefiner(load("llama"), **{name: value})
    load("llama").check_integrity()  # it was not taken over
