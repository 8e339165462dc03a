"""Whole steps and whole refinements on models of real shapes, against transformers and the public script's algorithm."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.baselines import full_reforward_jacobi, greedy_generate
from bench.gpu.host_gaps import host_gaps
from bench.gpu.models import Pair, pair
from bench.gpu.one_launch import OneLaunch
from bench.gpu.timing import Stopwatch
from engine import RefineOptions
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kv_cache import pages_for
from engine.roofline import Roofline

MODELS = ("gemma-2-9b", "gemma-2-2b", "llama-3-8b")
"""The first is what targets are set for."""
FIRST_SHARE = 0.6
"""Of the time: compiling transformers' generate for a model of 42 layers takes up to a minute."""
BATCHES = (1, 8, 32)
STEP_ROWS = 256
PROMPT = 128

Requests = list[dict[str, Any]]


def measure(watch: Stopwatch, ceilings: Roofline, *, tiny: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Of every model its step and its refinements, yielded after each as far as they are known.

    What no time is left for is left out and says so.
    """
    found: dict[str, Any] = {}
    models = ("tiny",) if tiny else MODELS
    for number, name in enumerate(models):
        # what a model leaves of its share goes to those behind it; targets are set for the first, so it gets most
        left = deadline - time.monotonic()
        share = time.monotonic() + left * max(FIRST_SHARE * (number == 0), 1 / (len(models) - number))
        if left < 20 and not tiny:
            found[name] = {"error": "left out: no time"}
            continue
        try:
            for record in of_model(name, watch, ceilings, tiny=tiny, deadline=share):
                found[name] = record
                yield found
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            print(f"{name}: {found[name]['error']}", flush=True)
        torch.compiler.reset()
        gc.collect()  # a compiled model refers to itself, and the next one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    yield found


def of_model(
    name: str, watch: Stopwatch, ceilings: Roofline, *, tiny: bool, deadline: float
) -> Iterator[dict[str, Any]]:
    """What is known of a model, after every part."""
    batches = (1, 2) if tiny else BATCHES
    prompt, answer = (8, 16) if tiny else (PROMPT, 256)
    subject = pair(name, watch.device, max(batches), prompt + answer)
    record: dict[str, Any] = {"parameters": subject.parameters, "prompt": prompt, "answer": answer}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "step": functools.partial(step, subject, watch, ceilings, 16 if tiny else STEP_ROWS, prompt),
        "host_gaps": functools.partial(gaps_alone, subject, watch.device, prompt, answer),
        "one_launch": functools.partial(launches, subject, prompt, answer, 1 if tiny else 3),
    }
    for batch in batches:
        parts[f"batch {batch}"] = functools.partial(
            refinements, subject, batch, prompt, answer, 1 if tiny else 3, deadline
        )
    with subject.refiner:
        for part, measured in parts.items():
            late = time.monotonic() > deadline
            record[part] = {"error": "left out: no time"} if late else attempted(measured)
            print(f"{name} {part}: {record[part]}", flush=True)
            yield record


def attempted(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns; an exception as its text."""
    try:
        return measured()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}


def gaps_alone(subject: Pair, device: torch.device, prompt: int, answer: int) -> dict[str, Any]:
    """Between the steps of one sequence without a draft, which takes most of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, subject.model.spec.vocab_size, (prompt,), generator=generator).tolist()
    options = RefineOptions(max_new_tokens=answer, realign=False)
    return host_gaps(lambda: subject.refiner.refine([{"prompt_ids": ids}], options), device)


def step(subject: Pair, watch: Stopwatch, ceilings: Roofline, rows: int, position: int) -> dict[str, Any]:
    """One Jacobi step of one sequence, embedding to argmax: launched from the host, and as one CUDA graph."""
    model = subject.model
    pages = list(range(pages_for(position + rows)))
    cache = model.new_cache(len(pages))
    batch = StepBatch.pack([Feed([7] * rows, position, pages, 0)], watch.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        head = model.head
        return linear_argmax(model.forward(batch, cache), head.weight, head.bias, softcap=head.softcap)[0]

    variants: dict[str, Callable[[], object]] = {"launched": run}
    if watch.device.type == "cuda":
        variants["graph"] = captured(run)
    seconds = {name: statistics.median(values) for name, values in watch.interleaved(variants, 3).items()}
    weights = subject.parameters * (2 if watch.device.type == "cuda" else 4)
    floor = ceilings.floor(weights, 2 * subject.parameters * rows)
    return {"rows": rows, "seconds": seconds, "floor_seconds": floor, "over_floor": min(seconds.values()) / floor}


def launches(subject: Pair, prompt: int, answer: int, rounds: int) -> dict[str, Any]:
    """A sequence alone: launched step by step, as the engine does, and all of its steps at once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, subject.model.spec.vocab_size, (prompt,), generator=generator).tolist()
    options = RefineOptions(max_new_tokens=answer, realign=False)
    [alone] = subject.refiner.refine([{"prompt_ids": ids}], options)
    found: dict[str, Any] = {}
    other = OneLaunch(subject.refiner)
    try:
        for name, draft in {"no draft": [], "right draft": alone.token_ids}.items():
            requests: Requests = [{"prompt_ids": ids, "draft_ids": draft}]
            calls = {
                "step by step": functools.partial(subject.refiner.refine, requests, options),
                "one launch": functools.partial(other.refine, requests, options),
            }
            # kernels are compiled, graphs captured, graphs replayed
            answers = {variant: [call()[0] for _ in range(2)][-1] for variant, call in calls.items()}
            before = other.launches
            seconds: dict[str, list[float]] = {variant: [] for variant in calls}
            for _ in range(rounds):
                for variant, call in calls.items():
                    seconds[variant].append(timed(call)[0])
            one, many = answers["one launch"], answers["step by step"]
            found[name] = {
                "steps": one.steps, "launches": (other.launches - before) / rounds, "seconds": seconds,
                "tokens_equal": share_equal([one.token_ids], [many.token_ids]),
                "ratio": statistics.median(seconds["one launch"]) / statistics.median(seconds["step by step"]),
            }  # fmt: skip
    finally:
        other.close()
    return found


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The work as a CUDA graph, after a warm-up on another stream as PyTorch's documentation asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def refinements(subject: Pair, batch: int, prompt: int, answer: int, rounds: int, deadline: float) -> dict[str, Any]:
    """A batch of random prompts to a fixed length: right draft and no draft against generate; alone also the script."""
    generator = torch.Generator().manual_seed(batch)
    size = subject.model.spec.vocab_size
    prompts = [torch.randint(1, size, (prompt,), generator=generator).tolist() for _ in range(batch)]
    none: Requests = [{"prompt_ids": ids} for ids in prompts]
    options = RefineOptions(max_new_tokens=answer)
    # re-alignment copies an answer's own repetitions, of which random models have many: it would flatter us
    plain = RefineOptions(max_new_tokens=answer, realign=False)
    answers = [result.token_ids for result in subject.refiner.refine(none, plain)]
    right: Requests = [{**request, "draft_ids": ids} for request, ids in zip(none, answers, strict=True)]

    def generate(**settings: Any) -> list[list[int]]:
        return greedy_generate(subject.theirs, prompts, answer, 0, **settings)

    variants: dict[str, Callable[[], Any]] = {
        "refine, right draft": lambda: subject.refiner.refine(right, options),
        "refine, no draft": lambda: subject.refiner.refine(none, plain),
        "generate, compiled static cache": lambda: generate(cache_implementation="static"),
        "generate": generate,
    }
    if batch == 1:
        draft = torch.randint(1, size, (answer,), generator=generator).tolist()
        variants["public script's loop, random draft"] = lambda: full_reforward_jacobi(
            subject.theirs, prompts[0], draft, answer, 0, frozenset()
        )
    refined = [result.token_ids for result in subject.refiner.refine(right, options)]
    record = {"tokens": batch * answer, "right_draft_kept": share_equal(refined, answers)}
    return record | compared(variants, answers, rounds, deadline)


def compared(
    variants: dict[str, Callable[[], Any]], answers: list[list[int]], rounds: int, deadline: float
) -> dict[str, Any]:
    """Seconds of every variant, in turn, as far as there is time; what a peer fails with is a result."""
    record: dict[str, Any] = {"first_call_seconds": {}, "errors_of_peers": {}}
    for name, call in variants.items():
        if time.monotonic() > deadline:
            break
        try:
            record["first_call_seconds"][name], output = timed(call)
        except Exception as error:
            if name.startswith("refine"):
                raise
            record["errors_of_peers"][name] = f"{type(error).__name__}: {error}"[:400]
            continue
        if name.startswith("generate"):  # in bfloat16 near-ties fall differently
            record["tokens_equal_to_" + name.replace(", ", "_").replace(" ", "_")] = share_equal(output, answers)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        # what was called once, and compiled for that, is timed once at least: it takes a fraction of that call
        if number and time.monotonic() > deadline:
            break
        for name in record["first_call_seconds"]:
            seconds.setdefault(name, []).append(timed(variants[name])[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(map(len, answers))
    record |= {"seconds": seconds, "tokens_per_second": {name: tokens / value for name, value in medians.items()}}
    fastest = min((value for name, value in medians.items() if name.startswith("generate")), default=None)
    if fastest:
        record["times_faster_than_generate"] = {
            name: fastest / value for name, value in medians.items() if name.startswith("refine")
        }
    return record


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, output


def share_equal(some: list[list[int]], others: list[list[int]]) -> float:
    """Share of tokens that are the same at the same place."""
    pairs = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=False)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))
