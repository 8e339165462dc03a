"""Whole steps and whole refinements on models of real shapes, against transformers and the public script's algorithm."""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.gpu.choices import Choices, counted
from bench.gpu.host_gaps import host_gaps
from bench.gpu.models import Pair, pair
from bench.gpu.one_launch import OneLaunch
from bench.gpu.refinements import Record, judged, refinements, share_equal, timed
from bench.gpu.restart import DeviceLost, lost
from bench.gpu.timing import Stopwatch
from engine import RefineOptions
from engine.batch import Feed, StepBatch
from engine.kernels import linear_argmax
from engine.kernels.triton_choice import forced_on_cpus
from engine.kv_cache import pages_for
from engine.roofline import Roofline
from engine.step_runner import StepRunner

MODELS = ("gemma-2-9b", "gemma-2-2b", "llama-3-8b")
"""The first is what targets are set for."""
FIRST_SHARE = 0.7
"""Of the time: compiling transformers' generate for a model of 42 layers takes up to a minute."""
BATCHES = (1, 8, 32)
STEP_ROWS = 256
PROMPT = 128


def measure(
    watch: Stopwatch,
    ceilings: Roofline,
    *,
    tiny: bool,
    deadline: float,
    before: dict[str, Any] | None = None,
    models: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Of every model its step and its refinements, yielded after each variant as far as they are known.

    What no time is left for is left out and says so. ``before``: what a process found that could not go on; what is in it is
    not measured again.
    """
    found: dict[str, Any] = dict(before or {})
    models = models or (("tiny",) if tiny else MODELS)
    for number, name in enumerate(models):
        # what a model leaves of its share goes to those behind it; targets are set for the first, so it gets most
        left = deadline - time.monotonic()
        share = time.monotonic() + left * max(FIRST_SHARE * (number == 0), 1 / (len(models) - number))
        if left < 20 and not tiny:
            found.setdefault(name, {"error": "left out: no time"})
            continue
        try:
            for record in of_model(name, watch, ceilings, tiny=tiny, deadline=share, before=found.get(name)):
                found[name] = record
                yield found
        except DeviceLost:
            yield found
            raise
        except Exception as error:
            found[name] = found.get(name, {}) | {"error": described(error)}
            print(f"{name}: {found[name]['error']}", flush=True)
            yield found
            if lost(watch.device):
                raise DeviceLost from error
        torch.compiler.reset()
        gc.collect()  # a compiled model refers to itself, and the next one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    yield found


def of_model(
    name: str,
    watch: Stopwatch,
    ceilings: Roofline,
    *,
    tiny: bool,
    deadline: float,
    before: Record | None = None,
) -> Iterator[Record]:
    """What is known of a model, after every variant. What targets are set for comes first, what reaches deepest last."""
    batches = (1, 2) if tiny else BATCHES
    prompt, answer = (8, 6) if tiny else (PROMPT, 256)
    rounds = 1 if tiny else 3
    if before and "error" in before:  # it could not even be made
        return
    subject = pair(name, watch.device, max(batches), prompt + answer)
    record: Record = {"parameters": subject.parameters, "prompt": prompt, "answer": answer} | (before or {})

    def of_batch(batch: int, part_deadline: float) -> Iterator[Record]:
        return refinements(subject, batch, prompt, answer, rounds, part_deadline)

    # shares of the time; what a part leaves goes to those behind it
    parts: dict[str, tuple[int, Callable[[float], Iterator[Record]]]] = {
        "step": (1, lambda _: step(subject, watch, ceilings, 16 if tiny else STEP_ROWS, prompt)),
        **{f"batch {batch}": (5 if batch == 1 else 3, functools.partial(of_batch, batch)) for batch in batches},
        "host_gaps": (1, lambda _: gaps_alone(subject, watch.device, prompt, answer)),
        "one_launch": (2, lambda until: launches(subject, prompt, answer, rounds, until)),
    }
    parts = {part: how for part, how in parts.items() if part not in record}
    waiting = sum(weight for weight, _ in parts.values())
    with subject.refiner, counted() as choices:
        for part, (weight, measured) in parts.items():
            now = time.monotonic()
            if now > deadline:
                record[part] = {"error": "left out: no time"}
            else:
                for found in attempted(measured, now + (deadline - now) * weight / waiting, watch.device):
                    record[part] = found
                    record["launched"] = launched(subject, choices, refined=part != "step")
                    yield record
            waiting -= weight
            print(f"{name} {part}: {record[part]}", flush=True)
        print(f"{name} launched: {record.get('launched')}", flush=True)
        yield record


def attempted(measured: Callable[[float], Iterator[Record]], deadline: float, device: torch.device) -> Iterator[Record]:
    """What it yields; an exception as its text, beside what was found before."""
    found: Record = {}
    try:
        for found in measured(deadline):
            yield found
    except Exception as error:
        yield found | {"error": described(error)}
        if isinstance(error, DeviceLost) or lost(device):
            raise DeviceLost from error


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def launched(subject: Pair, choices: Choices, *, refined: bool) -> Record:
    """By which kernels and graphs; on a GPU it is an error if an operation has no kernel, or a step no graph."""
    scheduler = subject.refiner._scheduler
    loop = scheduler.loop if scheduler else None
    found: Record = {"operations": choices, "graphs": graph_counts(loop._runner) if loop else None}
    on_gpu = subject.model.device.type == "cuda"
    plain = [operation for operation, calls in choices.items() if calls["torch"]]
    if plain and (on_gpu or forced_on_cpus()):
        found["error"] = f"without a Triton kernel: {', '.join(plain)}"
    elif found["graphs"] and found["graphs"]["failed"]:
        found["error"] = "a step could not be captured as a graph"
    elif on_gpu and refined and not (found["graphs"] and found["graphs"]["replayed"]):
        found["error"] = "no step was replayed from a graph"
    return found


def graph_counts(runner: StepRunner) -> dict[str, int] | None:
    """Captured, failed and replayed; None where steps are not captured."""
    counts = getattr(runner, "counts", None)
    return dataclasses.asdict(counts) if counts else None


def gaps_alone(subject: Pair, device: torch.device, prompt: int, answer: int) -> Iterator[Record]:
    """Between the steps of one sequence without a draft, which takes most of them."""
    ids = random_ids(subject, prompt)
    options = RefineOptions(max_new_tokens=answer, realign=False)
    yield host_gaps(lambda: subject.refiner.refine([{"prompt_ids": ids}], options), device)


def random_ids(subject: Pair, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(1, subject.model.spec.vocab_size, (count,), generator=generator).tolist()
    return ids


def step(subject: Pair, watch: Stopwatch, ceilings: Roofline, rows: int, position: int) -> Iterator[Record]:
    """One Jacobi step of one sequence, embedding to argmax: launched from the host, and as one CUDA graph."""
    model = subject.model
    pages = list(range(pages_for(position + rows)))
    cache = model.new_cache(len(pages))
    batch = StepBatch.pack([Feed(random_ids(subject, rows), position, pages, 0)], watch.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        head = model.head
        return linear_argmax(model.forward(batch, cache), head.weight, head.bias, softcap=head.softcap)[0]

    variants: dict[str, Callable[[], object]] = {"launched": run}
    if watch.device.type == "cuda":
        variants["graph"] = captured(run)
    seconds = {name: statistics.median(values) for name, values in watch.interleaved(variants, 3).items()}
    weights = subject.parameters * (2 if watch.device.type == "cuda" else 4)
    record = {"rows": rows, "seconds": seconds, "bytes": weights, "flops": 2 * subject.parameters * rows}
    rate(record, ceilings)
    yield record


def rate(record: Record, ceilings: Roofline) -> None:
    """What of a step depends on the ceilings, by these."""
    record["floor_seconds"] = ceilings.floor(record["bytes"], record["flops"])
    record["over_floor"] = min(record["seconds"].values()) / record["floor_seconds"]


def rated(results: dict[str, Any], ceilings: Roofline) -> None:
    """As ``rate``, of all models."""
    for record in results.values():
        if "bytes" in record.get("step", {}):
            rate(record["step"], ceilings)


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


def launches(subject: Pair, prompt: int, answer: int, rounds: int, deadline: float) -> Iterator[Record]:
    """A sequence alone: launched step by step, as the engine does, and all of its steps at once."""
    ids = random_ids(subject, prompt)
    options = RefineOptions(max_new_tokens=answer, realign=False)
    [alone] = subject.refiner.refine([{"prompt_ids": ids}], options)
    found: Record = {}
    other = OneLaunch(subject.refiner)
    try:
        for name, draft in {"no draft": [], "right draft": alone.token_ids}.items():
            if time.monotonic() > deadline:
                found[name] = {"error": "left out: no time"}
                continue
            requests = [{"prompt_ids": ids, "draft_ids": draft}]
            calls = {
                "step by step": functools.partial(subject.refiner.refine, requests, options),
                "one launch": functools.partial(other.refine, requests, options),
            }
            # kernels are compiled, graphs captured, graphs replayed
            answers = {variant: [call()[0] for _ in range(2)][-1] for variant, call in calls.items()}
            before, done = other.launches, 0
            seconds: dict[str, list[float]] = {variant: [] for variant in calls}
            while done < rounds and not (done and time.monotonic() > deadline):
                for variant, call in calls.items():
                    seconds[variant].append(timed(call)[0])
                done += 1
            one, many = answers["one launch"], answers["step by step"]
            found[name] = {
                "steps": one.steps, "launches": (other.launches - before) / done, "seconds": seconds,
                "graphs": graph_counts(other._runner),
                "ratio": statistics.median(seconds["one launch"]) / statistics.median(seconds["step by step"]),
                "tokens_equal": share_equal([one.token_ids], [many.token_ids]),
            } | judged(subject, [ids], [one.token_ids], [many.token_ids])  # fmt: skip
            yield found
    finally:
        other.close()
    yield found
