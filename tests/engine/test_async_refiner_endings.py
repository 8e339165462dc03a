"""How requests and an AsyncRefiner end: cancelled, late, failed, closed, forgotten, forked; and what is left behind."""

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine import (
    AsyncRefiner,
    DeadlineExceeded,
    EngineDead,
    QueueFull,
    RefineOptions,
)
from engine.refiner import DEFAULT_CHECKPOINT
from tests.engine.service.helpers import NAN, POISON, Fragile, Record, answer, make_refiner
from tests.engine.service.loops import Gate, fragile, run, until


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_cancelling_at_any_moment_frees_pages() -> None:
    async def cancel() -> None:
        async with fragile() as (refiner, model):
            gate = Gate(model)
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3 + i]}, RefineOptions(max_new_tokens=60)))
                     for i in range(6)]  # fmt: skip
            stream = refiner.stream({"prompt_ids": [2, 3]}, RefineOptions(max_new_tokens=60))
            pending = asyncio.ensure_future(anext(stream))
            gate.open(2)
            await until(lambda: gate.passes == 3)  # the third is held back
            for call in (*calls[:1], *calls[2:], pending):
                call.cancel()
            await asyncio.sleep(0.01)
            gate.open(1)
            await until(lambda: gate.passes == 4)  # by the next pass, only the second request is there
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


def test_a_dead_engine_says_so_to_every_waiter() -> None:
    async def ask() -> None:
        async with fragile() as (refiner, model):
            gate = Gate(model)
            options = RefineOptions(max_new_tokens=60)
            calls = [asyncio.ensure_future(refiner.refine({"prompt_ids": [2, 3 + i]}, options)) for i in range(8)]
            calls.append(asyncio.ensure_future(anext(refiner.stream({"prompt_ids": [2, 3]}, options))))
            calls.append(asyncio.ensure_future(refiner.pause(finish=True)))
            gate.open(1)
            await until(lambda: gate.passes == 2)
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
        await until(lambda: gate.passes == 1)
        drain = asyncio.ensure_future(refiner.close())
        await asyncio.sleep(0.01)
        assert not drain.done()
        close = asyncio.ensure_future(refiner.close(drain=False))
        await asyncio.sleep(0)  # for it to be posted
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

    before = threads()
    run(forget())
    gc.collect()
    deadline = time.monotonic() + 20
    while threads() - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("metrics", [False, True])
def test_many_loops_and_threads_with_cancellations_and_failures(metrics: bool) -> None:
    """Three event loops in three threads at once; whoever was not cancelled gets the right answer or the right error."""
    model, record = Fragile(), Record()
    refiner = AsyncRefiner(make_refiner(model), max_queue_requests=8, metrics=record if metrics else Broken())
    counts = {"answers": 0, "shed": 0, "cancelled": 0, "late": 0, "bad": 0}

    async def one(chance: random.Random) -> None:
        prompt, limit = [chance.choice([2, 2, 2, 2, POISON, NAN]), chance.randrange(19), 3], chance.randint(1, 40)
        options, tight = RefineOptions(max_new_tokens=limit), chance.random() < 0.2
        call = asyncio.ensure_future(refiner.refine({"prompt_ids": prompt}, options, deadline=0 if tight else 50))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.choice([0, 0.01]))
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
                os._exit(0)  # as multiprocessing ends its own
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


@pytest.mark.parametrize("way", ["fork", "forget"])
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
