"""Tables of whole refinements (cpu.json), of README's headlines and of the compiled Triton kernels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import figures
from bench.peers.catalogue import CONVERGED, REFINER_BEST_OF
from bench.report.results import Results
from bench.report.tables import table
from bench.reproduction.paper.claims import HOLDS, broken, verdict
from bench.reproduction.paper.compare import Answers, difference
from bench.reproduction.paper.compare import shown as told
from bench.reproduction.table import by_prompt, interval, less
from engine.evaluate.statistics import FEWEST, Estimate

BATCHES = ("generate_batch_1", "generate_batch_16")
CASES = {
    "refine_given_draft": "unrelated draft",
    "refine_no_draft": "no draft",
    "refine_right_draft": "the draft is already right",
    "refine_random_draft": "random draft, nothing accepted, no re-alignment",
}
Find = Callable[[dict[str, Any]], list[float]]


def subjects(cpu: dict[str, Any]) -> list[str]:
    """The models that were measured; the one that ships comes first. Raises KeyError without any."""
    found = [name for name, of_model in cpu.items() if isinstance(of_model, dict) and "forward" in of_model]
    if not found:
        raise KeyError("no model in cpu.json")
    return found


def identical(cpu: dict[str, Any]) -> str:
    """How many of the answers that were compared with transformers' greedy generate are its answers."""
    works = [
        (work["identical"], cpu[model][stage]["batch"])
        for model in subjects(cpu) for stage in BATCHES for work in cpu[model][stage]["work"].values()
    ]  # fmt: skip
    same, compared = (sum(column) for column in zip(*works, strict=True))
    return f"all {compared}" if same == compared else f"{same} of {compared}"


def times(value: float | None, digits: int = 1) -> str:
    """A ratio as text; empty where it was not measured."""
    return "" if value is None else f"{value:.{digits}f}x"


def of_rounds(least: float, median: float, most: float) -> str:
    """A ratio and its rounds'."""
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f}x ({least:.{digits}f} to {most:.{digits}f})"


def refinement(cpu: dict[str, Any]) -> str:
    """How many times as fast as what: a row per case, a column per checkpoint."""
    models = subjects(cpu)
    rows: list[list[str]] = []

    def row(than: str, case: str, find: Find) -> None:
        cells = []
        for model in models:
            try:
                cells.append(of_rounds(*find(cpu[model])))
            except KeyError:  # a stage that this model was not taken through
                cells.append("")
        rows.append([than, case, *cells])

    row("the public script's algorithm (full forward per step, no cache)", "unrelated draft, batch 1",
        lambda of: of["script"]["ratios"])  # fmt: skip
    batches = {stage: cpu["shipped"][stage]["batch"] for stage in BATCHES}
    than = "`transformers` greedy generate (static or dynamic cache, the faster)"
    for name, case in CASES.items():
        for stage, batch in batches.items():
            row(than, f"{case}, batch {batch}", lambda of, stage=stage, name=name: of[stage]["ratios"][name])  # type: ignore[misc]
            than = ""
    than = "this engine token by token"
    for stage, batch in batches.items():
        row(than, f"random draft, as above, batch {batch}",
            lambda of, stage=stage: of[stage]["token_by_token_over_random_draft"])  # type: ignore[misc] # fmt: skip
        than = ""
    than = "re-alignment off"
    for stage, batch in zip(("realign_batch_1", "realign_batch_16"), batches.values(), strict=True):
        row(than, f"answer conditioned on the draft, batch {batch}",
            lambda of, stage=stage: of[stage]["ratios"]["realign_off"])  # type: ignore[misc] # fmt: skip
        than = ""
    row(
        "`transformers` prompt lookup", "the same, batch 1", lambda of: of["realign_batch_1"]["ratios"]["prompt_lookup"]
    )
    than = "`transformers` forward behind a prompt"
    for number, size in enumerate(found["tokens"] for found in cpu["shipped"]["forward"]):
        row(than, f"{size} new tokens", lambda of, number=number: of["forward"][number]["ratios"])  # type: ignore[misc]
        than = ""
    return table(["faster than", "case", *models], rows)


def refinement_work(cpu: dict[str, Any]) -> str:
    """Seconds, sequential steps and token positions fed, and whether the answers were generate's."""
    rows = []
    for model in subjects(cpu):
        for stage in BATCHES:
            found = cpu[model][stage]

            def seconds(name: str, found: dict[str, Any] = found) -> str:
                least, most = found["spread"][name]
                return f"{found['seconds'][name]:.3f} ({least:.3f} to {most:.3f})"

            base = found["faster_generate"]
            rows.append([model, str(found["batch"]), base.replace("generate_", "generate, cache: "),
                         seconds(base), f"{found['answer_tokens']:,}", "", "", ""])  # fmt: skip
            for name, work in found["work"].items():
                rows.append([
                    model, str(found["batch"]), CASES.get(name, "token by token"), seconds(name),
                    f"{work['tokens']:,}", f"{work['steps']:,}", f"{work['forward_tokens']:,}",
                    f"{work['identical']} of {found['batch']}",
                ])  # fmt: skip
    header = ["model", "batch", "what", "seconds", "answer tokens", "steps", "token-forwards", "identical answers"]
    return table(header, rows)


def span(values: list[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def headlines(results: Results) -> str:
    """README's table: the gains, and what gains nothing."""
    cpu, loss, training = (results[name] for name in ("cpu", "consistency_loss_cpu", "train_step_cpu"))

    def both(case: str) -> str:
        return ", ".join(
            f"{model}: {' / '.join(times(cpu[model][stage]['ratios'][case][1]) for stage in BATCHES)}"
            for model in subjects(cpu)
        )

    dense = [found for name, found in loss.items() if "ours/compile" in found and not name.startswith("states")]
    plain: dict[str, list[float]] = {}
    for row in training["rows"]:
        plain.setdefault(row["dtype"], []).append(row["ratios"]["train_step, one by one"]["one by one"][1])
    many, *_ = results["serve"]["against the engine in one process"].values()
    batches = [
        found["static, sorted / continuous"] for name, found in results["batching"].items() if name[:6] == "batch "
    ]
    nothing = [cpu[model][stage]["token_by_token_over_random_draft"][1] for model in subjects(cpu) for stage in BATCHES]
    generate = "`transformers` generate, speed, batch " + " / ".join(str(cpu["shipped"][s]["batch"]) for s in BATCHES)
    script = ", ".join(f"{model}: {times(cpu[model]['script']['ratios'][1])}" for model in subjects(cpu))
    rows = [
        ["refine, an unrelated draft", "the public script's algorithm, speed, batch 1", script],
        ["refine, the draft is already right", generate, both("refine_right_draft")],
        ["refine, an unrelated draft", generate, both("refine_given_draft")],
        ["refine, a random draft of which nothing is accepted", "this engine token by token, speed", f"{span(nothing)}x"],
        ["consistency loss, all gradients", "`torch.compile`, time", f"{span([d['ours/compile'] for d in dense])}"],
        ["the same, memory beyond the gradients", "eager PyTorch, all of its memory",
         span([d["ours beyond gradients / eager"] for d in dense], 3)],
        ["train_step", "the strongest plain loop, speed",
         ", ".join(f"{dtype}: {span(found)}x" for dtype, found in plain.items())],
        ["HTTP server, many clients", "AsyncRefiner in the clients' process, answers/s",
         f"{times(many['throughput, served / one process'], 2)}"],
        ["continuous batching", "static batches sorted by length, speed", f"{span(batches)}x"],
    ]  # fmt: skip
    rows.append(jacobi_steps(results["reproduction"]))
    return table(
        ["what", "against", "measured"], [*rows, *alignment(results["paper_tables"]), *search(results["peers"])]
    )


def alignment(paper: dict[str, Any]) -> list[list[str]]:
    """What a DiffPO refiner made of a language model is worth by a reward model, with the control that tells why."""
    sets = {name: Answers(columns) for name, columns in paper["answers"].items()}
    against = {"the base": "base", "+ DPO": "dpo", "+ SimPO": "simpo", "plain fine-tuning": "ar"}
    found = {said: difference(sets["diffpo"], sets[name]) for said, name in against.items()}
    given, random = sets["base + diffpo, 4 steps"], sets["base + diffpo, 4 steps, random"]
    few = "the same after 4 steps from the base's draft" + (
        ", broken text" if broken(sets, "base + diffpo, 4 steps") else ""
    )

    def judged(estimate: Estimate) -> str:
        return told(estimate) if verdict(estimate) == HOLDS else f"{told(estimate)}: {verdict(estimate)}"

    return [
        ["a 135M DiffPO refiner, converged", "the base it is made of, reward above it", judged(found["the base"])],
        ["", "the base + DPO / + SimPO, reward above it", f"{judged(found['+ DPO'])} / {judged(found['+ SimPO'])}"],
        ["", "plain fine-tuning on the same responses, reward above it", judged(found["plain fine-tuning"])],
        [few, "from a random draft, reward above it", judged(difference(given, random))],
    ]  # fmt: skip


def search(peers: dict[str, Any]) -> list[list[str]]:
    """The refiner's converged answer against methods that search with the reward model: the base's best of most samples, and
    whichever gets the highest reward."""
    others = {
        name: found
        for name in peers["methods"]
        if (name.startswith(("best of", "ARGS")) or name == REFINER_BEST_OF) and not figures.text_broken(peers, name)
        and (found := figures.difference(peers, CONVERGED, name)).prompts >= FEWEST
    }  # fmt: skip
    chosen = dict.fromkeys([f"best of {max(peers['settings']['best_of'])}", min(others, key=lambda n: others[n].mean)])
    rows = []
    for name in chosen:
        cost = figures.ratio(peers, CONVERGED, name, "batch 1", cpu=True)
        taken = f", at {cost.mean:.2f} of its CPU time" if cost else ""
        rows.append(
            ["", f"{name}, which searches with the judge itself, reward above it", f"{told(others[name])}{taken}"]
        )
    rows[0][0] = f"{peers['settings']['models']['refiner']}, converged"
    return rows


def jacobi_steps(reproduction: dict[str, Any]) -> list[str]:
    """Whether DiffPO training makes Jacobi converge in fewer steps, while the answers remain answers."""
    ours, theirs = (
        by_prompt(reproduction["runs"][run]["sets"]["plain"]["given"], "steps") for run in ("omega-1", "ar")
    )
    mean, low, high = interval(less(ours, theirs))
    found = f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) of {interval(theirs)[0]:.1f}"
    return [
        "Jacobi steps after training with omega 1",
        "plain fine-tuning",
        found + ("" if high < 0 else ": not fewer"),
    ]


def triton_kernels(folder: Path) -> str:
    """The largest figures of each operation's kernels over all shapes and chips."""
    rows = []
    for path in sorted((folder / "triton_aot").glob("*.json")):
        found = json.loads(path.read_text())
        by_chip = [kernels for chips in found["figures"].values() for kernels in chips.values()]
        kernels = [kernel for of_chip in by_chip for kernel in of_chip.values()]
        names = {name for of_chip in by_chip for name in of_chip}
        rows.append([
            path.stem, found["triton"], str(len(names)), str(len(kernels)), str(max(k["registers"] for k in kernels)),
            str(sum(k["spilled"] > 0 for k in kernels)), f"{max(k['shared'] for k in kernels) / 1024:.1f}",
        ])  # fmt: skip
    header = [
        "operation",
        "Triton",
        "kernels",
        "compilations",
        "most registers",
        "with spills",
        "most shared memory, KiB",
    ]
    return table(header, rows)
