"""Refinements of a batch against transformers' generate and the public script's loop: how fast, and whether right."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.baselines import full_reforward_jacobi, greedy_generate
from bench.gpu.models import Pair
from bench.gpu.restart import DeviceLost, lost
from engine import RefineOptions

SLOW_SECONDS = 3.0
"""What takes longer is timed once: it hardly varies, and the time is others' too."""
MOST_REGRET = 0.25
"""Of bfloat16. Random models of 32 and 42 layers were off by up to 0.035 on a CPU; tokens at random are by 5."""

Record = dict[str, Any]
Requests = list[dict[str, Any]]


def refinements(subject: Pair, batch: int, prompt: int, answer: int, rounds: int, deadline: float) -> Iterator[Record]:
    """A batch of random prompts to a fixed length: right draft and no draft against generate; alone also the script.

    Yielded after every variant.
    """
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
        "generate": generate,
        "generate, compiled static cache": lambda: generate(cache_implementation="static"),
        "refine, no draft": lambda: subject.refiner.refine(none, plain),
    }
    if batch == 1:
        draft = torch.randint(1, size, (answer,), generator=generator).tolist()
        variants["public script's loop, random draft"] = lambda: full_reforward_jacobi(
            subject.theirs, prompts[0], draft, answer, 0, frozenset()
        )
    refined = [result.token_ids for result in subject.refiner.refine(right, options)]
    record = {"tokens": batch * answer, "right_draft_kept": share_equal(refined, answers)}
    record |= judged(subject, prompts, refined, answers)
    yield record
    before = graphs_compiled()
    for found in compared(variants, answers, rounds, deadline, subject.model.device):
        # by torch.compile, all of it for generate: transformers may have decided against it
        compiled = {name: count - before[name] for name, count in graphs_compiled().items()}
        yield record | found | {"generate_compiled": compiled}


def compared(
    variants: dict[str, Callable[[], Any]],
    answers: list[list[int]],
    rounds: int,
    deadline: float,
    device: torch.device,
) -> Iterator[Record]:
    """Seconds of every variant, as far as there is time, yielded after each; what a peer fails with is a result."""
    record: Record = {"first_call_seconds": {}, "errors_of_peers": {}}
    seconds: dict[str, list[float]] = {}
    tokens = sum(map(len, answers))
    for name, call in variants.items():
        if time.monotonic() > deadline:
            break
        try:
            record["first_call_seconds"][name], output = timed(call)
            # what was called once, and compiled for that, is timed once at least: it takes a fraction of that call
            seconds[name] = [timed(call)[0]]
        except Exception as error:
            if name.startswith("refine"):
                raise
            record["errors_of_peers"][name] = f"{type(error).__name__}: {error}"[:400]
            yield record
            if lost(device):
                raise DeviceLost from error
            continue
        if name.startswith("generate"):  # in bfloat16 near-ties fall differently
            record["tokens_equal_to_" + name.replace(", ", "_").replace(" ", "_")] = share_equal(output, answers)
        yield record | summary(seconds, tokens)
    # the rest in turn: a slow moment of the machine meets all of them
    for _ in range(rounds - 1):
        for name, values in seconds.items():
            if values[0] < SLOW_SECONDS and time.monotonic() < deadline:
                values.append(timed(variants[name])[0])
        yield record | summary(seconds, tokens)
    yield record | summary(seconds, tokens)


def summary(seconds: dict[str, list[float]], tokens: int) -> Record:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found: Record = {
        "seconds": seconds,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
    }
    fastest = min((value for name, value in medians.items() if name.startswith("generate")), default=None)
    if fastest:
        found["times_faster_than_generate"] = {
            name: fastest / value for name, value in medians.items() if name.startswith("refine")
        }
    return found


def graphs_compiled() -> dict[str, int]:
    """Since the process began."""
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def judged(subject: Pair, prompts: list[list[int]], found: list[list[int]], expected: list[list[int]]) -> Record:
    """Of two sets of our answers how far the worse is from transformers' greedy choice, and an error if that is too far.

    In float32 they are the same answers. Below it rounding, which depends on how many rows are computed together, decides
    between tokens that are nearly equal, on both sides: there every token is held against transformers' logits for it.
    """
    exact = subject.theirs.dtype is torch.float32
    equal = found == expected
    worst = regret(subject, prompts, expected if equal else [*expected, *found])
    most = 1e-3 if exact else MOST_REGRET
    record: Record = {"regret": worst}
    if exact and not equal:
        record["error"] = "wrong: from another draft, or launched otherwise, other tokens come out"
    elif not worst <= most:  # NaN too
        record["error"] = f"wrong: a token is {worst:.3g} below transformers' choice, at most {most} is right"
    return record


@torch.inference_mode()
def regret(subject: Pair, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """How much lower than the highest transformers' logits of our tokens are, given what comes before; in standard deviations
    of the row's logits, the most of all. Answers may be of the prompts several times over."""
    found = []
    for number, answer in enumerate(answers):
        prompt = prompts[number % len(prompts)]
        ids = torch.tensor([prompt + answer], device=subject.theirs.device)
        logits = subject.theirs(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        ours = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        found.append(((logits.amax(-1) - ours) / logits.std(-1)).max())
    return torch.stack(found).max().item()


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
