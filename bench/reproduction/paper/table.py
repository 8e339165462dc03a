"""Writes bench/results/paper_tables.md: the paper's tables from paper_tables.json, what the paper reports beside them.

Rewards, differences and win rates are means over held-out prompts with 95 % intervals, computed by engine.evaluate.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.page import write_page
from bench.reproduction.paper.answers import OWN, REAL, STEPS
from bench.reproduction.paper.claims import ALIGNED, claims
from bench.reproduction.paper.compare import Answers, difference, length_controlled, mean, percent, shown, wins
from bench.reproduction.table import controls, differences, overview, similarities
from engine.evaluate.tables import markdown

READING = Path(__file__).with_name("reading.md")
"""Written by hand about one file of results, whose hash its first line has."""
PAPER_MAIN = {"base": "36.83", "dpo": "47.20", "simpo": "52.57", "diffpo": "55.84"}
"""Length-controlled win rates of AlpacaEval 2 with Llama-3-8B-Instruct, against GPT-4-turbo's answers (arXiv 2503.04240)."""
PAPER_BASES = (
    ("Llama-3-8B-Instruct", "36.83", "55.84"),
    ("Llama-3-70B-Instruct", "46.14", "58.18"),
    ("Qwen2.5-7B-Instruct", "45.03", "57.89"),
    ("Llama-3.2-1B-Instruct", "15.57", "50.70"),
)
"""The same figure, before and behind DiffPO-9B."""
PAPER_SIZES = (("8B (Llama-3)", "36.44"), ("9B (Gemma-2)", "55.84"))
NAMES = {"base": "SmolLM2-135M", "dpo": "SmolLM2-135M + DPO", "simpo": "SmolLM2-135M + SimPO"}
RUNS = ("lm", "ar", "diffpo", "omega-1", "omega-1000")
"""The chat model as it is, and refiners from no consistency loss to the most of it."""
Sets = dict[str, Answers]


def reward_model(pairs: dict[str, list[Any]]) -> str:
    """How often each of three judges prefers what the data's judge prefers."""
    judge, prompts = np.array(pairs["judge"]), np.array(pairs["prompt"])
    kinds = {
        "all pairs": np.ones(len(judge), bool),
        "rewards 0.1 apart or more": np.abs(judge) >= 0.1,
        "pairs without FuseChat": ~np.array(pairs["top"]),
    }
    rows = []
    for name, text in (
        ("model", "the reward model"),
        ("length", "the longer one"),
        ("author", "the one whose author has the higher mean reward in training"),
    ):
        right = (np.sign(np.array(pairs[name])) * np.sign(judge) + 1) / 2
        rows.append([text, *(percent(mean(right[kind], prompts[kind].tolist())) for kind in kinds.values())])
    head = ["what it prefers", *(f"{kind} ({int(chosen.sum())})" for kind, chosen in kinds.items())]
    return markdown(head, rows)


def text_of(one: Answers) -> list[str]:
    """What the chat model makes of the text, and the share of word trigrams that it repeats."""
    return [shown(one.mean("nats")), shown(one.mean("repeated"))]


def bases(sets: Sets) -> str:
    """What the reward model makes of real answers, beside the judge's own rewards of the whole ones."""
    rows = []
    for name in (*REAL, *OWN):
        if name in sets:
            known = sets[name]
            judge = f"{np.mean(known.columns['judge']):.3f}" if "judge" in known.columns else "–"
            rows.append([NAMES.get(name, name), judge, shown(known.mean("reward")), *text_of(known), known.length])
    return markdown(["base", "the judge's reward", "reward model", "nats per token", "repeated", "characters"], rows)


def main_rows(sets: Sets) -> Iterator[tuple[str, str, str]]:
    """Name, set and what the paper has for it."""
    yield "base", "base", PAPER_MAIN["base"]
    yield "+ DPO", "dpo", PAPER_MAIN["dpo"]
    yield "+ SimPO", "simpo", PAPER_MAIN["simpo"]
    yield "+ plain fine-tuning (omega 0), not in the paper", "ar", "–"
    yield "+ DiffPO, converged: the refiner alone", "diffpo", PAPER_MAIN["diffpo"]
    yield from ((f"+ DiffPO, {k} {'steps' if k > 1 else 'step'}", f"base + diffpo, {k} steps", "–") for k in STEPS)
    yield "+ DiffPO, draft shown in the prompt", "base + shown", "–"


def versus(sets: Sets, rows: Sequence[tuple[str, str, str]], baseline: str, last: str) -> str:
    """Rewards, and comparisons with one base."""
    head = [
        "answers",
        "reward",
        "minus the base",
        "win rate",
        "length-controlled",
        "characters",
        "nats per token",
        "repeated",
        last,
    ]
    made = []
    for text, name, paper in rows:
        if name not in sets:
            continue
        one, other = sets[name], sets[baseline]
        compared = ["", "", ""]
        if name != baseline:
            compared = [
                shown(difference(one, other)),
                percent(wins(one, other)),
                percent(length_controlled(one, other)),
            ]
        made.append([text, shown(one.mean("reward")), *compared, one.length, *text_of(one), paper])
    return markdown(head, made)


def every_base(sets: Sets) -> str:
    """One refiner behind every base."""
    head = [
        "base",
        "its reward",
        "4 steps minus base",
        "shown minus base",
        "converged minus base",
        "win rate, converged",
    ]
    rows = []
    for base in (*REAL, *OWN):
        others = [sets.get(name) for name in (f"{base} + diffpo, 4 steps", f"{base} + shown", "diffpo")]
        if base not in sets or not any(others):
            continue
        minus = [shown(difference(other, sets[base])) if other else "–" for other in others]
        won = percent(wins(others[-1], sets[base])) if others[-1] else "–"
        rows.append([NAMES.get(base, base), shown(sets[base].mean("reward")), *minus, won])
    return markdown(head, rows)


def on_top(sets: Sets) -> str:
    """DiffPO behind bases that were aligned already, and the refiner against them."""
    rows = []
    for base in ("dpo", "simpo"):
        for text, name in (
            ("4 steps", f"{base} + diffpo, 4 steps"),
            ("draft shown", f"{base} + shown"),
            ("alone", "diffpo"),
        ):
            if base in sets and name in sets:
                one, other = sets[name], sets[base]
                compared = (
                    shown(difference(one, other)),
                    percent(wins(one, other)),
                    percent(length_controlled(one, other)),
                )
                rows.append([NAMES[base], text, *compared])
    return markdown(["base", "DiffPO", "minus the base", "win rate", "length-controlled"], rows)


def sizes(results: dict[str, Any], sets: Sets) -> str:
    """Refiners of several sizes, with the same training."""
    head = [
        "refiner",
        "AR loss, last steps of training",
        "alone",
        "minus the base",
        "4 steps",
        "minus the base",
        "nats per token, alone",
        "repeated, alone",
    ]
    rows = []
    for text, name in (("135M, 30 layers", "diffpo"), ("24 of them", "layers-24"), ("18 of them", "layers-18")):
        if name not in sets:
            continue
        curve = results.get("training", {}).get(name, {}).get("curve")
        loss = f"{np.mean(curve['ar'][-3:]):.2f}" if curve else "–"
        alone, after = sets[name], sets.get(f"base + {name}, 4 steps")
        later = [shown(after.mean("reward")), shown(difference(after, sets["base"]))] if after else ["–", "–"]
        cells = [shown(alone.mean("reward")), shown(difference(alone, sets["base"])), *later, *text_of(alone)]
        rows.append([text, loss, *cells])
    if "base + shipped, shown" in sets:
        small = sets["base + shipped, shown"]
        cells = [
            shown(small.mean("reward")),
            shown(difference(small, sets["base"])),
            "–",
            "–",
            *text_of(small),
        ]
        rows.append(["6.4M that ships, draft shown (trained to mend slips)", "–", *cells])
    return markdown(head, rows)


def drafts(sets: Sets) -> str:
    """What the draft is good for: the same refiner with another one."""
    head = ["refined", "draft", "reward", "minus the right draft's", "kept of the draft", "nats per token", "repeated"]
    rows = []
    for kind in ("diffpo, 4 steps", "shown"):
        for control in ("", "shuffled", "random"):
            name = f"base + {kind}" + (f", {control}" if control else "")
            if name in sets:
                one, right = sets[name], sets[f"base + {kind}"]
                minus = shown(difference(one, right)) if control else ""
                cells = [shown(one.mean("reward")), minus, shown(one.mean("kept")), *text_of(one)]
                rows.append([kind, control or "the base's", *cells])
    return markdown(head, rows)


def cost(sets: Sets) -> str:
    """Work per answer; what the base did to write the draft is a part of it, and is also shown by itself."""
    rows = []
    for text, name, _ in main_rows(sets):
        if name not in sets:
            continue
        one = sets[name]
        cells = [f"{np.mean(one.columns['tokens']):.1f}"]
        for column in ("steps", "forward_tokens"):
            own = np.mean(one.columns[column])
            draft = np.mean(sets["base"].columns[column]) if name.startswith("base +") else 0
            cells.append(f"{own + draft:.1f}" + (f" ({draft:.1f} of them the draft's)" if draft else ""))
        ended = sum(reason == "eos" for reason in one.columns["finish_reason"])
        rows.append([text, *cells, f"{ended} of {len(one.columns['prompt'])}"])
    return markdown(["answers", "tokens", "sequential steps", "tokens fed to a model", "ended by themselves"], rows)


def training(results: dict[str, Any]) -> str:
    """How every model was trained, and what trl says of its pairs."""
    head = [
        "run",
        "omega",
        "mean of the KL over",
        "steps",
        "batch",
        "learning rate",
        "AR loss, first steps",
        "last steps",
    ]
    rows = []
    for run, trained in results.get("training", {}).items():
        used, curve = trained["settings"], trained["curve"]
        mean_over = "–" if not used["omega"] else used["kl_normalization"]
        shown_settings = [str(curve["step"][-1]), str(used["batch_size"]), f"{used['lr']:g}"]
        losses = [f"{curve['ar'][0]:.2f}", f"{np.mean(curve['ar'][-3:]):.2f}"]
        rows.append([run, f"{used['omega']:g}", mean_over, *shown_settings, *losses])
    table = markdown(head, rows)
    pairs = []
    logs = {method: log for method, log in results.get("preference", {}).items() if log}  # a short run has no line
    for method, log in logs.items():
        accuracy, margin = (np.mean([e[f"rewards/{n}"] for e in log[-3:]]) for n in ("accuracies", "margins"))
        pairs.append(
            [ALIGNED[method], f"{log[0]['loss']:.3f}", f"{log[-1]['loss']:.3f}", f"{accuracy:.2f}", f"{margin:.2f}"]
        )
    return table + "\n" + markdown(["trl", "loss, first steps", "last steps", "pairs ranked right", "margin"], pairs)


def seconds(results: dict[str, Any]) -> str:
    """Of every stage."""
    rows = [[name, str(used["processor"]), str(used["clock"])] for name, used in results.get("seconds", {}).items()]
    total = [sum(used[kind] for used in results.get("seconds", {}).values()) for kind in ("processor", "clock")]
    return markdown(["stage", "seconds of one core", "by the clock"], [*rows, ["all", *map(str, total)]])


def report(results: dict[str, Any], read: str = "") -> str:
    """All tables as Markdown."""
    sets = {name: Answers(columns) for name, columns in results.get("answers", {}).items()}
    steps = {run: results["steps"][run] for run in RUNS if run in results.get("steps", {})}
    parts = [("The paper's claims at this scale", markdown(["claim", "the paper", "here", "verdict"], claims(sets)))]
    if read:
        parts.append(("Reading them", read))
    if "reward_model" in results:  # not where the folder had one from before the results
        parts.append(("The reward model against the judge, held-out prompts", reward_model(results["reward_model"])))
    parts += [
        ("Bases", bases(sets)),
        (
            "SmolLM2-135M and what was made of it",
            versus(sets, list(main_rows(sets)), "base", "paper: Llama-3-8B, LC win rate"),
        ),
        ("One refiner behind every base", every_base(sets)),
        ("The same in the paper: LC win rate", markdown(["base", "by itself", "+ DiffPO-9B"], PAPER_BASES)),
        ("On top of DPO and SimPO, and against them", on_top(sets)),
        ("Size of the refiner", sizes(results, sets)),
        ("The same in the paper: LC win rate behind Llama-3-8B", markdown(["refiner", "LC win rate"], PAPER_SIZES)),
        ("What the draft is good for", drafts(sets)),
        ("Work per answer", cost(sets)),
        ("Training", training(results)),
    ]
    if steps:
        parts.append(("Jacobi iteration: losses and steps by omega", overview(steps, "plain")))
        parts.append(
            ("Jacobi iteration: similarity of tokens to the best response", similarities(steps, "plain", "tokens"))
        )
        if "ar" in steps:
            parts.append(("Jacobi iteration: against plain fine-tuning, prompt by prompt", differences(steps, "plain")))
        parts.append(("Jacobi iteration: controls", controls(steps, "plain")))
    parts.append(("Time", seconds(results)))
    return "\n".join(f"### {title}\n\n{table}" for title, table in parts)


def figures_hash(results: dict[str, Any]) -> str:
    """Of what a reading is about: the tables as they are shown, but for the times."""
    return hashlib.sha256(report(results | {"seconds": {}}).encode()).hexdigest()[:16]


def reading(results: dict[str, Any]) -> str:
    """How to read these results; nothing where what was written is about others."""
    first, _, text = READING.read_text(encoding="utf-8").partition("\n")
    return text.strip() + "\n" if first == f"<!-- of {figures_hash(results)} -->" else ""


def page(results: dict[str, Any], path: Path) -> str:
    """All tables, and how to read them."""
    return report(results, reading(results))


def main() -> None:
    """Command line."""
    write_page(__doc__.splitlines()[0], "paper_tables", page)


if __name__ == "__main__":
    main()
