"""Sessions: requests pushed one by one, collected after each step."""

from collections.abc import Callable

import pytest

from engine import EngineDead, InvalidRequest, RefineOptions, Refiner, Result
from tests.engine.checkpoints import Oracle, prompts

OPTIONS = RefineOptions(max_new_tokens=12)
REQUESTS = [{"prompt_ids": p, "metadata": {"mine": i}} for i, p in enumerate(prompts(1))]


def test_requests_added_between_steps_get_what_refine_gives(load: Callable[..., Refiner]) -> None:
    refiner = load("llama", 2048, 2)
    expected = refiner.refine(REQUESTS, OPTIONS)
    results: dict[int, Result] = {}
    waiting = list(enumerate(REQUESTS))
    with refiner.session(OPTIONS) as session:
        while waiting or session.open:
            if waiting and session.has_room:  # one between two steps: they come late
                index, request = waiting.pop()
                assert session.add(request, 100 + index) is None
            for result in session.step():
                results[result.index - 100] = result
    assert [results[i].token_ids for i in range(len(REQUESTS))] == [r.token_ids for r in expected]
    assert [results[i].metadata["mine"] for i in results] == list(results)
    assert all(result.id == result.index for result in results.values())
    assert all(result.seconds > 0 for result in results.values())


def test_a_bad_request_comes_back_at_once(load: Callable[..., Refiner]) -> None:
    with load("llama").session(OPTIONS) as session:
        result = session.add({"prompt_ids": [-1], "id": "bad"}, 7)
        assert result is not None
        assert (result.id, result.index, type(result.error)) == ("bad", 7, InvalidRequest)
        assert session.open == 0


def test_room_is_what_the_batch_has(load: Callable[..., Refiner]) -> None:
    refiner = load("llama", 2048, 2)
    with refiner.session(OPTIONS) as session, refiner.session(OPTIONS) as other:
        session.add(REQUESTS[0], 0)
        assert session.has_room
        other.add(REQUESTS[1], 0)
        assert not session.has_room
        assert (session.open, other.open) == (1, 1)
    refiner.check_integrity()


def test_closing_gives_back_what_runs_and_leaves_other_sessions_alone(load: Callable[..., Refiner]) -> None:
    refiner = load("llama", 2048, 4)
    (expected,) = refiner.refine(REQUESTS[:1], OPTIONS)
    with refiner.session(OPTIONS) as kept:
        kept.add(REQUESTS[0], 0)
        with refiner.session(OPTIONS) as dropped:
            dropped.add(REQUESTS[1], 0)
            dropped.step()
        refiner.check_integrity()
        assert (dropped.open, kept.open) == (0, 1)
        results: list[Result] = []
        while kept.open:
            results += kept.step()
    assert [result.token_ids for result in results] == [expected.token_ids]


def test_a_closed_refiner_says_so(oracle: Callable[[str], Oracle]) -> None:
    refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=256)
    session = refiner.session(OPTIONS)
    session.add(REQUESTS[0], 0)
    refiner.close()
    for call in (session.step, lambda: session.has_room, lambda: session.add(REQUESTS[0], 1), refiner.session):
        with pytest.raises(EngineDead):
            call()
    session.close()
