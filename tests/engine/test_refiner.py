"""The public API: errors of one request, order, closing, and what is left behind."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from engine import EngineDead, InvalidRequest, NonFiniteLogits, RefineOptions, Refiner, Request, RequestTooLong, Result
from tests.engine.checkpoints import VOCABULARY, Oracle, prompts, random_model, save

PROMPTS = prompts(1)
OPTIONS = RefineOptions(max_new_tokens=16)


ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}


def threads() -> tuple[int, int]:
    return len(threading.enumerate()), len(list(Path("/proc/self/task").iterdir()))


def poison(folder: Path, name: str, row: int | None = None) -> None:
    """Makes a tensor, or one row of it, NaN."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][slice(None) if row is None else row] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "no prompt": ({"draft_ids": [5]}, InvalidRequest),
    "two prompts": ({"prompt_ids": [5], "prompt": "a"}, InvalidRequest),
    "text without a tokenizer": ({"prompt": "a"}, InvalidRequest),
    "empty prompt": ({"prompt_ids": []}, InvalidRequest),
    "unknown field": ({"prompt_ids": [5], "temperature": 1}, InvalidRequest),
    "token beyond the vocabulary": ({"prompt_ids": [VOCABULARY]}, InvalidRequest),
    "negative token": ({"prompt_ids": [-1]}, InvalidRequest),
    "huge token": ({"prompt_ids": [2**70]}, InvalidRequest),
    "draft beyond the vocabulary": ({"prompt_ids": [5], "draft_ids": [VOCABULARY]}, InvalidRequest),
    "text as ids": ({"prompt_ids": "abc"}, InvalidRequest),
    "fractions as ids": ({"prompt_ids": [1.0]}, InvalidRequest),
    "negative seed": ({"prompt_ids": [5], "seed": -1}, InvalidRequest),
    "huge seed": ({"prompt_ids": [5], "seed": 2**64}, InvalidRequest),
    "seed beyond int64": ({"prompt_ids": [5], "seed": 2**63}, InvalidRequest),
    "bad id": ({"prompt_ids": [5], "id": [1]}, InvalidRequest),
    "bad metadata": ({"prompt_ids": [5], "metadata": 3}, InvalidRequest),
    "not a request": (7, InvalidRequest),
    "none": (None, InvalidRequest),
    "longer than the model": ({"prompt_ids": [5] * 310}, RequestTooLong),
    "longer than the pool": ({"prompt_ids": [5] * 250}, RequestTooLong),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_request_among_good_ones(kind: str, temperature: float, oracle: Callable[[str], Oracle]) -> None:
    value, error = BAD[kind]
    options = RefineOptions(max_new_tokens=16, temperature=temperature)
    good = [{"prompt_ids": p} for p in PROMPTS]
    with Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=256) as refiner:
        reference = [result.token_ids for result in refiner.refine(good, options)]
        results = refiner.refine([*good[:2], value, *good[2:], value], options)
        refiner.check_integrity()
    assert [result.index for result in results] == list(range(len(good) + 2))
    for bad in (results[2], results[-1]):
        assert type(bad.error) is error
        assert (bad.token_ids, bad.text, bad.converged, bad.finish_reason) == ([], None, False, "error")
        assert bad.id == bad.index
    assert [result.token_ids for result in results if result.error is None] == reference


def test_ids_and_metadata_come_back(load: Callable[..., Refiner]) -> None:
    requests: list[Any] = [
        {"prompt_ids": [5], "id": "a", "metadata": {"k": [1]}},
        {"prompt_ids": [5]},
        Request(prompt_ids=[5], id=0),
        {"prompt_ids": [], "id": "bad", "metadata": {"k": 2}},
        {"prompt_ids": [5], "id": "a"},
    ]
    results = load("llama").refine(requests, OPTIONS)
    assert [result.id for result in results] == ["a", 1, 0, "bad", "a"]
    assert [result.metadata for result in results] == [{"k": [1]}, {}, {}, {"k": 2}, {}]
    assert [result.text for result in results] == [None] * 5  # no tokenizer


def test_unordered_stream_gives_the_same_results(load: Callable[..., Refiner]) -> None:
    requests = [{"prompt_ids": p, "draft_ids": d} for p in PROMPTS for d in PROMPTS]
    refiner = load("qwen3", 2048, 3)
    ordered = refiner.refine(requests, OPTIONS)
    unordered = list(refiner.stream(iter(requests), OPTIONS, ordered=False))
    assert sorted(unordered, key=lambda result: result.index) == ordered
    assert [result.index for result in ordered] == list(range(len(requests)))


def test_requests_are_read_only_as_they_are_needed(load: Callable[..., Refiner]) -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        while True:
            read += 1
            yield {"prompt_ids": [5, 6, read % 50]}

    stream = load("llama", 2048, 4).stream(endless(), OPTIONS)
    for count in range(1, 30):
        assert next(stream).index == count - 1
        assert read <= count + 4 * 16  # results that wait for an earlier one
    stream.close()


def test_an_iterable_that_fails_gives_its_own_error(load: Callable[..., Refiner]) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"prompt_ids": [5]}
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        load("llama").refine(broken(), OPTIONS)
    load("llama").check_integrity()
    assert load("llama").refine([], OPTIONS) == []


def answer(result: Result) -> tuple[object, ...]:
    """What does not depend on the company; how many guesses a step takes does."""
    return result.id, result.index, result.token_ids, result.converged, result.finish_reason, result.steps > 0


def test_calls_from_several_threads_share_the_batch(load: Callable[..., Refiner]) -> None:
    """With different options, and each gets what it would get alone."""
    refiner, requests = load("llama", 64, 3), [{"prompt_ids": p} for p in PROMPTS * 2]
    kinds = [OPTIONS, replace(OPTIONS, temperature=2.0), replace(OPTIONS, steps=2), replace(OPTIONS, window=7)]
    expected = [[answer(result) for result in refiner.refine(requests, options)] for options in kinds]
    seen: dict[int, list[tuple[object, ...]]] = {}

    def work(kind: int) -> None:
        seen[kind] = [answer(result) for result in refiner.refine(requests, kinds[kind])]

    workers = [threading.Thread(target=work, args=(kind,), daemon=True) for kind in range(len(kinds))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [seen[kind] for kind in range(len(kinds))] == expected
    refiner.check_integrity()


def test_open_streams_do_not_keep_others_out(load: Callable[..., Refiner]) -> None:
    """Two streams that nobody reads on hold every place of the batch between them; a new call still gets its turn."""
    refiner = load("llama", 64, 2)
    options = replace(OPTIONS, window=1)
    short, long = ({"prompt_ids": prompt} for prompt in (PROMPTS[0], PROMPTS[2]))
    lengths = [len(result.token_ids) for result in refiner.refine([short, long], options)]
    assert lengths == [4, 16]
    first, second = (refiner.stream(iter([short, long, *[short] * 9]), options, ordered=False) for _ in range(2))
    # the second stream's steps end the first one's long answer, so that the first takes its place without a step
    for stream in (first, second, second, first):
        next(stream)
    done: list[Result] = []
    scheduler = refiner._scheduler
    assert scheduler is not None
    assert scheduler.load == scheduler.max_batch_size
    other = threading.Thread(target=lambda: done.extend(refiner.refine([short], options)), daemon=True)
    other.start()
    other.join(timeout=20)
    kept_out = other.is_alive()
    first.close()
    second.close()
    other.join()
    assert not kept_out
    assert len(done) == 1
    refiner.check_integrity()


def test_close_ends_open_streams(oracle: Callable[[str], Oracle]) -> None:
    refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=512, max_batch_size=2)
    stream = refiner.stream(iter([{"prompt_ids": p} for p in PROMPTS]), OPTIONS)
    next(stream)
    refiner.close()
    with pytest.raises(EngineDead):
        list(stream)


def test_nan_weights_end_the_requests_with_a_typed_error(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3")
    poison(folder, "model.layers.1.mlp.down_proj.weight")
    requests = [{"prompt_ids": p, "draft_ids": [0, 0, 7]} for p in PROMPTS]
    with Refiner.from_pretrained(folder, kv_cache_tokens=2048) as refiner:
        for options in (
            OPTIONS,
            replace(OPTIONS, steps=2),
            replace(OPTIONS, temperature=1.0),
            replace(OPTIONS, window=1),
        ):
            for result in refiner.refine(requests, options):
                assert isinstance(result.error, NonFiniteLogits)
                assert "position 0:" in str(result.error)
                assert (result.token_ids, result.converged, result.finish_reason) == ([], False, "error")
        refiner.check_integrity()


def test_nan_of_one_request_does_not_reach_others(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """Neither those beside it nor those that get its pages afterwards."""
    folder = checkpoint("llama")
    poison(folder, "model.embed_tokens.weight", row=100)
    good = [p for p in PROMPTS if 100 not in p and 100 not in oracle("llama").greedy(p, 16)]
    assert len(good) > 2
    requests = [{"prompt_ids": p} for p in good for _ in range(3)]
    bad = {"prompt_ids": [5, 6, 100, 7] * 12}
    for max_batch_size in (64, 1):
        with Refiner.from_pretrained(folder, kv_cache_tokens=160, max_batch_size=max_batch_size) as refiner:
            results = refiner.refine([bad, *requests, bad, *requests, bad], OPTIONS)
        answers = [result.token_ids for result in results if result.error is None]
        assert answers == [oracle("llama").greedy(p, 16) for p in good for _ in range(3)] * 2
        assert [type(result.error) for result in results if result.error] == [NonFiniteLogits] * 3


def test_nan_position_is_counted_from_the_answers_start(
    checkpoint: Callable[[str], Path], oracle: Callable[[str], Oracle]
) -> None:
    """The token after which the model breaks: it is final, what follows is not."""
    prompt = PROMPTS[2]
    answer = oracle("llama").greedy(prompt, 16)
    place = next(i for i in range(4, 16) if answer[i] not in [*answer[:i], *prompt])
    folder = checkpoint("llama")
    poison(folder, "model.embed_tokens.weight", row=answer[place])
    with Refiner.from_pretrained(folder, kv_cache_tokens=512) as refiner:
        for draft in ([], answer[:3]):
            (result,) = refiner.refine([{"prompt_ids": prompt, "draft_ids": draft}], OPTIONS)
            assert isinstance(result.error, NonFiniteLogits)
            assert f"position {place + 1}:" in str(result.error)


def test_use_after_close(oracle: Callable[[str], Oracle]) -> None:
    refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=256)
    with refiner:
        assert refiner.refine([{"prompt_ids": [5]}], OPTIONS)[0].error is None
    refiner.close()
    for use in (
        lambda: refiner.refine([{"prompt_ids": [5]}]),
        lambda: next(iter(refiner.stream([]))),
        refiner.check_integrity,
    ):
        with pytest.raises(EngineDead, match="closed"):
            use()


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_close_leaves_no_tensor_and_no_thread(backend: str, oracle: Callable[[str], Oracle]) -> None:
    def cycle() -> list[weakref.ref[torch.Tensor]]:
        refiner = Refiner.from_pretrained(oracle("llama").folder, kv_cache_tokens=256, backend=backend)  # type: ignore[arg-type]
        refiner.refine([{"prompt_ids": p} for p in PROMPTS[:4]], OPTIONS)
        scheduler = refiner._scheduler
        assert scheduler is not None
        watched = [scheduler.model.head.weight.data, *scheduler.cache.k, *scheduler.cache.v]
        references = [weakref.ref(tensor) for tensor in watched]
        del watched, scheduler
        refiner.close()
        gc.collect()
        assert refiner is not None  # closed, but still referenced
        return references

    cycle()  # starts the pools of torch and of the libraries beneath it
    before = threads()
    assert [reference() for reference in cycle()] == [None] * len(cycle())
    assert threads() == before


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    """Resident memory of a process around the lives of refiners of 60 MB; the first brings in what stays for good.

    glibc is told to map large blocks always: on its own it comes to keep freed ones for later, whose they ever were.
    """
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    folder = save(random_model(config), tmp_path, [2])
    code = f"""if True:
        import gc, torch
        from engine import Refiner, RefineOptions
        torch.set_num_threads(1)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
        def life():
            with Refiner.from_pretrained({str(folder)!r}, kv_cache_tokens=4096) as refiner:
                refiner.refine([{{"prompt_ids": [5] * 900}}] * 3, RefineOptions(max_new_tokens=4))
                inside = resident()
            gc.collect()
            return inside, resident()
        first = life()
        print(*first, *life(), *life())
    """
    output = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert output.returncode == 0, output.stderr
    _, first, inside, second, _, third = map(int, output.stdout.split())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    assert inside - first > 0.7 * size  # the measurement sees a loaded model
    assert max(second, third) - first < 0.05 * size


@pytest.mark.parametrize("argument", ["max_batch_tokens", "kv_cache_tokens", "max_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None])
def test_limits_are_checked(argument: str, value: Any, oracle: Callable[[str], Oracle]) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be an integer >= 1, got"):
        Refiner.from_pretrained(oracle("llama").folder, **{argument: value})


@pytest.mark.parametrize(("argument", "value"), [("dtype", "int8"), ("dtype", torch.int8), ("backend", "vllm")])
def test_arguments_are_checked(argument: str, value: Any, oracle: Callable[[str], Oracle]) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be .*, got"):
        Refiner.from_pretrained(oracle("llama").folder, **{argument: value})


def test_settings_of_generate_that_the_engine_does_not_apply_are_named(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("llama")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 1.05}))
    with caplog.at_level("WARNING", logger="engine"):
        Refiner.from_pretrained(folder, kv_cache_tokens=64).close()
    assert "repetition_penalty" in caplog.text
    assert "1.05" in caplog.text
