"""AsyncRefiner in event loops and threads of its callers: answers, endings, and what is left behind."""

import asyncio
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engine import (
    AsyncRefiner,
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    Iterate,
    QueueFull,
    RefineOptions,
    Refiner,
    RequestTooLong,
    UnsupportedModel,
)
from engine.refiner import DEFAULT_CHECKPOINT
from tests.engine.checkpoints import Oracle, family_model, generate, prompts
from tests.engine.service.helpers import NAN, POISON, Fragile, Record, answer, make_refiner

PROMPTS = prompts(1)
T = TypeVar("T")


def run(test: Coroutine[Any, Any, T]) -> T:
    """Every test ends, or fails, within a minute."""

    async def limited() -> T:
        return await asyncio.wait_for(test, 60)

    return asyncio.run(limited())


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Gate:
    """Holds a model's passes back until they are let through."""

    def __init__(self, model: Fragile) -> None:
        self._turnstile = threading.Semaphore(0)
        model.pause = self._pass

    def _pass(self) -> None:
        assert self._turnstile.acquire(timeout=30)

    def open(self, passes: int = 100_000) -> None:
        self._turnstile.release(passes)


@asynccontextmanager
async def fragile(**limits: Any) -> AsyncIterator[tuple[AsyncRefiner, Fragile]]:
    model = Fragile()
    queue = {name: limits.pop(name) for name in ("max_queue_requests", "metrics") if name in limits}
    async with AsyncRefiner(make_refiner(model, **limits), **queue) as refiner:
        yield refiner, model


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("did not come about")


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


def test_a_slow_reader_holds_up_nobody_and_finds_the_latest() -> None:
    async def read() -> None:
        async with fragile() as (refiner, _):
            async with aclosing(
                refiner.stream({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60, window=1))
            ) as slow:
                first = await anext(slow)
                others = [
                    refiner.refine({"prompt_ids": [2, 4 + i]}, RefineOptions(max_new_tokens=60)) for i in range(8)
                ]
                assert [r.token_ids for r in await asyncio.gather(*others)] == [
                    answer([2, 4 + i], 60) for i in range(8)
                ]
                rest = [event async for event in slow]
            assert first.step >= 1
            assert len(rest) <= 2  # nothing piled up
            assert rest[-1].result is not None
            assert rest[-1].token_ids == answer([2, 3], 60)

    run(read())


def test_cancelling_at_any_moment_frees_pages() -> None:
    async def cancel() -> None:
        async with fragile() as (refiner, model):
            gate = Gate(model)
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3 + i]}, RefineOptions(max_new_tokens=60)))
                     for i in range(6)]  # fmt: skip
            stream = refiner.stream({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60))
            pending = asyncio.ensure_future(anext(stream))
            gate.open(2)
            await until(lambda: model.passes >= 3)  # the third is held back
            for call in (*calls[:1], *calls[2:], pending):
                call.cancel()
            await asyncio.sleep(0.01)
            passes = model.passes
            gate.open(1)
            await until(lambda: model.passes > passes)  # by the next pass, only the second request is there
            refiner._refiner._alive().cache.pool.check_integrity([s.pages for s in refiner._refiner._alive().running])
            assert len(refiner._refiner._alive().running) == 1
            assert refiner._admission.requests == 0
            gate.open()
            assert (await calls[1]).token_ids == answer([2, 4], 60)
            for call in (*calls[:1], *calls[2:]):
                assert call.cancelled()

    run(cancel())


def test_leaving_a_stream_early_cancels_it() -> None:
    async def leave() -> None:
        async with fragile() as (refiner, _):
            async for _ in refiner.stream({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60, window=1)):
                break
            gc.collect()
            pool = refiner._refiner._alive().cache.pool
            await until(lambda: pool.free_count == pool.size)

    run(leave())


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
            await until(lambda: model.passes == 1)
            waiting = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 4 + i]}, options)) for i in range(2)]
            await asyncio.sleep(0)
            before = time.perf_counter()
            with pytest.raises(QueueFull) as refused:
                await refiner.refine({"prompt_ids": [2, 9]}, options)
            assert time.perf_counter() - before < 1  # the step does not end before the gate opens
            assert refused.value.retry_after > 0
            assert record.counts["requests", "shed"] == 1
            gate.open()
            assert [(await r).token_ids for r in (running, *waiting)] == [answer([2, 3 + i], 5) for i in range(3)]

    run(ask())


def test_a_deadline_ends_a_request_that_waits_and_one_in_a_standing_engine() -> None:
    async def ask() -> None:
        async with fragile() as (refiner, _):
            await refiner.pause()
            with pytest.raises(DeadlineExceeded):
                await refiner.refine({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=5), deadline=0.05)
            assert refiner._admission.requests == 0
            refiner.resume()
            assert (await refiner.refine({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=5), deadline=50)).steps

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
            storage = refiner._refiner._alive().model.head.weight.data.data_ptr()
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": p}, options)) for p in PROMPTS]
            await until(lambda: refiner._admission.requests == len(PROMPTS) - 2)
            await refiner.pause(finish=finish)
            done = sum(call.done() for call in calls)
            await refiner.update_weights(new.state_dict())
            with pytest.raises(UnsupportedModel, match=r"no 'model\.norm\.weight'"):
                await refiner.update_weights({k: v for k, v in new.state_dict().items() if k != "model.norm.weight"})
            refiner.resume()
            results = await asyncio.gather(*calls)
            assert refiner._refiner._alive().model.head.weight.data.data_ptr() == storage  # in place
            return results, [await refiner.refine({"prompt_ids": p}, options) for p in PROMPTS], done

    results, after, done = run(ask())
    assert [r.token_ids for r in after] == new_answers
    got = [r.token_ids for r in results]
    assert all(g in (o, n) for g, o, n in zip(got, old_answers, new_answers, strict=True))
    if finish:
        assert done == 2
        assert got == old_answers[:2] + new_answers[2:]
    else:
        assert got[2:] == new_answers[2:]


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


def test_a_dead_engine_says_so_to_every_waiter() -> None:
    async def ask() -> None:
        async with fragile() as (refiner, model):
            gate = Gate(model)
            options = RefineOptions(max_new_tokens=60)
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3 + i]}, options)) for i in range(8)]
            calls.append(asyncio.ensure_future(anext(refiner.stream({"prompt_ids": [2, 3]}, options))))
            calls.append(asyncio.ensure_future(refiner.pause(finish=True)))
            gate.open(1)
            await until(lambda: model.passes == 2)
            model.failures.append(KeyError("engine"))
            gate.open()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {EngineDead}
            assert all("KeyError('engine')" in str(outcome) for outcome in outcomes)
            assert not refiner.alive
            for late in (
                refiner.refine({"prompt_ids": [2]}),
                refiner.pause(),
                anext(refiner.stream({"prompt_ids": [2]})),
            ):
                with pytest.raises(EngineDead):
                    await late

    run(ask())


def test_close_drains_or_does_not_and_leaves_nothing() -> None:
    async def ask(drain: bool) -> list[Any]:
        refiner = AsyncRefiner(make_refiner(Fragile()))
        options = RefineOptions(max_new_tokens=40)
        await refiner.pause()
        calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3 + i]}, options)) for i in range(7)]
        await asyncio.sleep(0)
        await asyncio.gather(refiner.close(drain=drain), refiner.close(drain=drain))
        await refiner.close()
        with pytest.raises(EngineDead):
            await refiner.refine({"prompt_ids": [2]})
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert len(asyncio.all_tasks()) <= 2  # this one and run's
        return outcomes

    run(ask(True))
    before, handles = threads(), files()
    assert [o.token_ids for o in run(ask(True))] == [answer([2, 3 + i], 40) for i in range(7)]
    assert {type(o) for o in run(ask(False))} == {EngineDead}
    assert threads() == before
    assert files() == handles


def test_a_drain_can_be_cut_short() -> None:
    async def ask() -> None:
        model = Fragile()
        refiner, gate = AsyncRefiner(make_refiner(model)), Gate(model)
        call = asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60)))
        await until(lambda: model.passes == 1)
        drain = asyncio.ensure_future(refiner.close())
        await asyncio.sleep(0.01)
        assert not drain.done()
        close = asyncio.ensure_future(refiner.close(drain=False))
        gate.open(1)
        await asyncio.gather(drain, close)
        with pytest.raises(EngineDead, match="closed"):
            await call
        gate.open()

    run(ask())


def test_one_that_nobody_closes_ends_its_thread() -> None:
    async def forget() -> None:
        refiner = AsyncRefiner(make_refiner(Fragile()))
        await refiner.refine({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=5))

    run(forget())
    gc.collect()
    deadline = time.monotonic() + 20
    while "engine" in threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("metrics", [False, True])
def test_many_loops_and_threads_with_cancellations_and_failures(metrics: bool) -> None:
    """Three event loops in three threads at once; whoever was not cancelled gets the right answer or the right error."""
    model, record = Fragile(), Record()
    refiner = AsyncRefiner(make_refiner(model), max_queue_requests=12, metrics=record if metrics else Broken())
    counts = {"answers": 0, "shed": 0, "cancelled": 0, "late": 0, "bad": 0}

    async def one(chance: random.Random) -> None:
        prompt, limit = [chance.choice([2, 2, 2, 2, POISON, NAN]), chance.randrange(19), 3], chance.randint(1, 40)
        options, tight = RefineOptions(max_new_tokens=limit), chance.random() < 0.2
        call = asyncio.ensure_future(refiner.refine({"prompt_ids": prompt}, options, deadline=0.004 if tight else 50))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.02)
            if call.cancel():
                await asyncio.wait([call])
        try:
            result = await call
        except asyncio.CancelledError:
            counts["cancelled"] += 1
        except QueueFull:
            counts["shed"] += 1
        except DeadlineExceeded:
            assert tight
            counts["late"] += 1
        except EngineDead:
            raise
        except Exception:
            assert prompt[0] != 2
            counts["bad"] += 1
        else:
            assert prompt[0] == 2
            assert result.token_ids == answer(prompt, limit)
            counts["answers"] += 1

    async def client(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            if chance.random() < 0.3:
                model.failures = [MemoryError("injected")]
            await asyncio.gather(*(one(chance) for _ in range(chance.randint(1, 12))))

    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            run(client(seed))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    refiner._refiner.check_integrity()
    pool = refiner._refiner._alive().cache.pool
    run(until(lambda: pool.free_count == pool.size))
    run(refiner.close())
    assert min(counts.values()) > 0, counts
    if metrics:
        ends = {reason: count for (name, reason), count in record.counts.items() if name == "requests"}
        assert ends["eos"] + ends["length"] >= counts["answers"]  # some were cancelled when they had just ended
        assert sum(ends.values()) == sum(counts.values())


class Broken:
    """Metrics that raise."""

    def count(self, name: str, amount: int, reason: str | None = None) -> None:
        raise OSError("metrics")

    level = observe = count  # type: ignore[assignment]


def test_a_closed_event_loop_is_no_reader_any_more() -> None:
    model = Fragile()
    refiner, gate = AsyncRefiner(make_refiner(model)), Gate(model)
    loop = asyncio.new_event_loop()
    call = loop.create_task(refiner.refine({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=20)))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    gate.open()
    other = run(refiner.refine({"prompt_ids": [2, 4]}, RefineOptions(max_new_tokens=20)))
    assert other.token_ids == answer([2, 4], 20)
    run(refiner.close())
    call.get_coro().close()  # type: ignore[union-attr]
    call._log_destroy_pending = False  # type: ignore[attr-defined]


SCRIPT = f"""if True:
    import asyncio, os, sys, torch
    torch.set_num_threads(1)
    from engine import AsyncRefiner, EngineDead, RefineOptions
    request, options = {{"prompt": "How do I boil an egg?"}}, RefineOptions(max_new_tokens=8)
    async def main():
        async with AsyncRefiner.from_pretrained({str(DEFAULT_CHECKPOINT)!r}) as refiner:
            first = await refiner.refine(request, options)
            child = os.fork()
            if child == 0:
                for use in (refiner.refine(request, options), refiner.pause(), refiner.stream(request).asend(None)):
                    try:
                        await use
                    except EngineDead as error:
                        print("child:", error, flush=True)
                await refiner.close()
                print("child closed", refiner.alive, flush=True)
                os._exit(0) if sys.argv[1] == "hard" else sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            again = await refiner.refine(request, options)
            print("parent:", again.text == first.text, refiner.alive)
    if sys.argv[1] == "forget":
        async def forget():
            global kept
            kept = AsyncRefiner.from_pretrained({str(DEFAULT_CHECKPOINT)!r})
            await kept.refine(request, options)
            asyncio.ensure_future(kept.refine(request, RefineOptions(max_new_tokens=500)))
            await asyncio.sleep(0.01)
        asyncio.run(forget())
        print("forgotten")
    else:
        asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["hard", "soft", "forget"])
def test_a_forked_child_is_told_and_a_forgotten_engine_lets_the_process_end(way: str) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, timeout=100, env=environment
    )
    assert out.returncode == 0, out.stderr
    if way == "forget":
        assert out.stdout == "forgotten\n"
        return
    assert out.stdout.count("child: this AsyncRefiner belongs to process") == 3
    assert "child closed False" in out.stdout
    assert "parent: True True" in out.stdout


def test_limits_are_checked(load: Callable[..., Refiner]) -> None:
    for name in ("max_queue_requests", "max_queue_tokens"):
        for value in (0, True, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
                AsyncRefiner(load("llama"), **{name: value})
    load("llama").check_integrity()  # it was not taken over
