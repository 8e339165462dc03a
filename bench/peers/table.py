"""Writes bench/results/peers.md from peers.json: rewards, latencies and what they took, with 95% intervals over prompts."""

from bench.page import write_page
from bench.peers import figures
from bench.peers.catalogue import ALIGNER, ARGS_CANDIDATES, BASE, CONVERGED, REFINER, REFINER_BEST_OF, reference
from bench.peers.figures import Estimate, Results, average, percentile
from engine.evaluate.statistics import FEWEST

THEIR_CODE = {
    "refiner, prompt lookup": "refiner, generate",
    "refiner, lookahead": "refiner, generate",
}
"""Peers on transformers' modules, and what decodes token by token there."""


HEAD = """\
Base {base}, refiner {refiner}, rewards of {reward_model}; {prompts} {kind} prompts, answers of up to {tokens} tokens,
{dtype}, rounds: {rounds}, processes: {processes}. Load average while it ran: {loads}. Samples of best-of-n at temperature
{temperature}; ARGS tries {candidates} tokens a step{default}. Best-of-n and ARGS search with the reward model that judges them
here: their rewards show what it can be brought to, not that another judge would agree.

Seconds are the wait of one request whose batch was handed over as a whole. Where a method needs a draft the base model's
time is in them, and so is the reward model's where it takes part. Prompt lookup, lookahead, *generate* and the public loop
run on transformers' modules of the same weights, everything else on this engine's decoder; those of the four that take one
request at a time are measured at batch 1 only. Ratios are geometric means of pairs from the same batch; batches of the same
prompts count once. CPU seconds are those of a whole batch, its drafts included (threads: {threads}): on one thread, about what
it takes on a core of its own, while seconds of the clock hold other work on the machine as well. {same}

*{converged}* is the same answer as *{alone}*: run to convergence, greedy refinement does not depend on its draft. The
rewards of other methods that give the same tokens are those of their reference, too. What a draft can do for an answer is in
the rows of few steps, and in *{aligner}*, where {corrector}."""

SAME = 0.05
"""Ratios that differ from one by less are called the same: so much do rounds of one method differ."""
BROKEN = "broken text"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def estimate(found: Estimate | None, digits: int = 3, sign: str = "") -> str:
    """A figure and its interval, if it is of enough prompts, or batches of different ones; empty where it was not measured."""
    if found is None:
        return ""
    form = f"{{:{sign}.{digits}f}}"
    if found.prompts < FEWEST:
        return form.format(found.mean)
    return f"{form} ({form} to {form})".format(found.mean, found.low, found.high)


def rewards(results: Results) -> str:
    """A row per method whose answers are its own, and one for converged DiffPO; differences are taken prompt by prompt."""
    rows = []
    for method in (name for name in results["methods"] if name == CONVERGED or not reference(name)):
        own = figures.scores(results, method)
        against = [
            "" if method == other else estimate(figures.difference(results, method, other), sign="+")
            for other in (BASE, REFINER)
        ]
        tokens = [count for measured in results["methods"][method].values() for count in measured["tokens"]]
        nats = figures.by_prompt(results, method, "nats")
        name = figures.label(results, method) + f" ({BROKEN})" * figures.text_broken(results, method)
        rows.append([
            name, str(len(own)), estimate(figures.mean(own)), *against, estimate(figures.mean(nats) if nats else None, 2),
            f"{average(tokens):.1f}",
        ])  # fmt: skip
    head = ["method", "prompts", "reward", f"minus {BASE}", f"minus {REFINER}", "nats per token", "tokens"]
    return markdown(head, rows)


def texts(results: Results) -> str:
    """What nats per token are, and when a text is called broken."""
    if not any(figures.by_prompt(results, method, "nats") for method in results["methods"]):
        return "Nats per token were not measured: which texts are broken is not known."
    nats = "Nats per token are those of an answer's text behind its prompt, under the base model. "
    real = {
        model: [value for value in found["nats"] if value is not None]
        for model, found in results.get("real", {}).items()
    }
    known = "; ".join(f"{model} {average(values):.2f}" for model, values in real.items() if values)
    if not known:
        return nats + "The data has no real models' answers to hold them against: which texts are broken is not known."
    return nats + (
        f"*{BROKEN.capitalize()}* is what it finds less likely than any real model's answers to the same prompts, beyond both"
        f" intervals, the rule of the [paper's tables](paper_tables.md); real models' answers, cut at the same length: {known}."
        " The reward model has not learned from such text, so its reward is no sign of quality: these methods are left out of"
        " what follows from rewards."
    )


def latencies(results: Results, batch: str) -> str:
    """A row per method that takes so many requests at a time."""
    rows = []
    for method in results["methods"]:
        found = figures.columns(results, method, batch)
        if found is None:
            continue
        seconds = figures.seconds(found)
        same = [value for value in found["same"] if value is not None]
        rows.append([
            figures.label(results, method), str(len(seconds)),
            *(f"{percentile(seconds, percent):.2f}" for percent in (50, 95)),
            " + ".join(f"{average(found[part]):.2f}" for part in figures.PARTS),
            estimate(figures.ratio(results, method, REFINER, batch), 2), f"{average(found['cpu']):.2f}",
            estimate(figures.ratio(results, method, REFINER, batch, cpu=True), 2),
            *(f"{average(found[name]):,.0f}" for name in ("token_forwards", "sequential_steps", "reward_tokens")),
            f"{sum(same)} of {len(same)}" if same else "",
        ])  # fmt: skip
    head = ["method", "answers", "p50, s", "p95, s", "draft + refinement + reward, s", f"/ {REFINER}", "CPU s of the batch",
            f"/ {REFINER}", "token-forwards", "sequential steps", "reward tokens", "same tokens"]  # fmt: skip
    return markdown(head, rows)


def beaten(results: Results) -> str:
    """Which methods the refiner by itself, token by token, is better than in reward at no higher cost; broken text and a
    corrector that was not trained are no contenders."""
    if figures.text_broken(results, REFINER):
        return f"The text of *{REFINER}* is broken: its reward is held against no other's."
    worse, surely, sizes = [], [], figures.batches(results)
    for method in (name for name in results["methods"] if name not in (REFINER, CONVERGED) and not reference(name)):
        if figures.text_broken(results, method) or (figures.untrained(results) and method.startswith(ALIGNER)):
            continue
        ratios = {batch: figures.ratio(results, method, REFINER, batch, cpu=True) for batch in sizes}
        known = {batch: found.mean for batch, found in ratios.items() if found is not None}
        gain = figures.difference(results, method, REFINER)
        if gain.prompts >= FEWEST and gain.mean < 0 and known and all(value > 1 - SAME for value in known.values()):
            worse.append(method if len(known) == len(sizes) else f"{method} ({', '.join(known)})")
            surely += [method] * (gain.high < 0)
    return (
        f"*{REFINER}*, which needs no draft, has a higher mean reward and takes no more CPU seconds (within {SAME:.0%})"
        " at every batch size at which both were measured (named where it is not all of them) than:"
        f" {'; '.join(worse) or 'none'}. The interval of the difference in reward excludes zero for:"
        f" {'; '.join(surely) or 'none'}."
    )


def against_search(results: Results) -> str:
    """DiffPO beside methods that ask the reward model, the paper's comparison, in CPU seconds; broken text is left out."""
    names = [name for name in results["methods"] if not figures.text_broken(results, name)]
    sizes = figures.batches(results)
    rows = []
    for method in (
        name for name in names if name.startswith("DiffPO") and " loop" not in name and "window" not in name
    ):
        for other in (name for name in names if name.startswith(("best of", "ARGS")) or name == REFINER_BEST_OF):
            ratios = [estimate(figures.ratio(results, method, other, batch, cpu=True), 2) for batch in sizes]
            gain = figures.difference(results, method, other)
            if gain.prompts >= FEWEST:
                rows.append([method, other, str(gain.prompts), estimate(gain, sign="+"), *ratios])
    return markdown(["method", "against", "prompts", "reward, difference", *(f"CPU s /, {b}" for b in sizes)], rows)


def per_pass(results: Results) -> str:
    """Lossless decoding on transformers' modules, beside token by token there."""
    rows = []
    for method, other in THEIR_CODE.items():
        found, plain = (figures.columns(results, name, "batch 1") for name in (method, other))
        if found and plain:
            shared = set(found["prompt"]) & set(plain["prompt"])
            steps = [
                average([s for p, s in zip(c["prompt"], c["sequential_steps"], strict=True) if p in shared])
                for c in (found, plain)
            ]
            ratio = estimate(figures.ratio(results, method, other, "batch 1", cpu=True), 2)
            rows.append([method, f"{steps[0]:.1f}", f"{steps[1]:.1f}", ratio])
    return markdown(["method", "steps", f"steps of {THEIR_CODE['refiner, lookahead']}", "CPU s /"], rows)


def page(results: Results) -> str:
    """All of it as Markdown."""
    settings = results["settings"]
    checked = {
        method: sum(value is False for measured in found.values() for value in measured["same"])
        for method, found in results["methods"].items()
        if reference(method)
    }
    different = {method: count for method, count in checked.items() if count}
    same = "All answers that must have the same tokens have them." if not different else (
        f"Answers with other tokens than they must have: {different}."
    )  # fmt: skip
    if results["left_out"]:
        same += f" {results['left_out']} of the planned batches are missing: the run's time was over."
    models, loads = settings["models"], results["loads"]
    corrector = "the refiner reads it in its prompt, for which it was not trained; one that was may do better"
    if models["corrector"]:
        corrector = f"another refiner, {models['corrector']}, reads it in its prompt"
    of = {
        **models, "corrector": corrector, "aligner": figures.label(results, ALIGNER),
        **{name: settings[name] for name in ("prompts", "tokens", "dtype", "rounds")},
        "same": same, "converged": CONVERGED, "alone": REFINER, "processes": len(results.get("machines", [None])),
        "loads": ", ".join(f"{b} {min(loads[b]):.1f} to {max(loads[b]):.1f}" for b in figures.batches(results)),
        "kind": "development" if settings.get("development") else "held-out",
        "default": "" if settings["candidates"] == ARGS_CANDIDATES else f" (its authors' default is {ARGS_CANDIDATES})",
        "threads": results["machine"]["threads"], **{name: settings[name] for name in ("temperature", "candidates")},
    }  # fmt: skip
    parts = [
        ("Reward", f"{rewards(results)}\n\n{texts(results)}\n\n{beaten(results)}"),
        ("DiffPO against search with a reward model", against_search(results)),
        *((f"Latency and work, {batch}", latencies(results, batch)) for batch in figures.batches(results)),
        ("Lossless decoding on transformers' modules", per_pass(results)),
    ]
    picture = (
        "![Reward against latency](peers.png)\n\nIn the picture every method's reward is over all prompts that it answered; the"
        " tables say how many, and have the differences on the same prompts."
    )
    if any(figures.text_broken(results, method) for method in results["methods"]):
        picture += f" A hollow point that no line joins is {BROKEN}."
    note = [f"Note of the run: {results['note'].rstrip('.')}."] if results.get("note") else []
    return "\n\n".join([HEAD.format(**of), *note, picture, *(f"### {title}\n\n{text}" for title, text in parts)]) + "\n"


def main() -> None:
    """Command line."""
    write_page(__doc__, "peers", lambda results, path: page(results))


if __name__ == "__main__":
    main()
