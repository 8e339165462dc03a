"""Tables of whole refinements (cpu.json), of README's headlines and of the compiled Triton kernels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report.results import Results
from bench.report.tables import table
from bench.reproduction.paper.compare import Answers, difference
from bench.reproduction.paper.compare import shown as told
from bench.reproduction.table import by_prompt, interval

SUBJECTS = {"shipped": "shipped", "llama-135m-random": "135M"}
BATCHES = ("generate_batch_1", "generate_batch_16")
CASES = {
    "refine_given_draft": "unrelated draft",
    "refine_no_draft": "no draft",
    "refine_right_draft": "the draft is already right",
    "refine_random_draft": "random draft, nothing accepted, no re-alignment",
}
Find = Callable[[dict[str, Any]], float | None]


def times(value: float | None, digits: int = 1) -> str:
    """A ratio as text; empty where it was not measured."""
    return "" if value is None else f"{value:.{digits}f}x"


def refinement(cpu: dict[str, Any]) -> str:
    """How many times as fast as what: a row per case, a column per checkpoint."""

    def row(than: str, case: str, *finds: Find, digits: int = 1) -> list[str]:
        cells = [[times(find(cpu[subject]), digits) for find in finds] for subject in SUBJECTS]
        return [than, case, *(" / ".join(filter(None, found)) for found in cells)]

    def ratio(stage: str, name: str) -> Find:
        return lambda of: of[stage]["ratio"][name] if stage in of else None

    batches = " / ".join(str(cpu["shipped"][stage]["batch"]) for stage in BATCHES)
    rows = [row("the public script's algorithm (full forward per step, no cache)", "unrelated draft, batch 1",
                lambda of: of["script"]["ratio"])]  # fmt: skip
    than = "`transformers` greedy generate (static or dynamic cache, the faster)"
    for name, case in CASES.items():
        rows.append(row(than, f"{case}, batch {batches}", *(ratio(stage, name) for stage in BATCHES)))
        than = ""
    alone = "token_by_token_over_random_draft"
    rows.append(row("this engine token by token", f"random draft, as above, batch {batches}",
                    *(lambda of, s=stage: of[s][alone] for stage in BATCHES), digits=2))  # type: ignore[misc] # fmt: skip
    again = ("realign_batch_1", "realign_batch_16")
    rows.append(row("re-alignment off", f"answer conditioned on the draft, batch {batches}",
                    *(ratio(stage, "realign_off") for stage in again), digits=2))  # fmt: skip
    rows.append(row("`transformers` prompt lookup", "the same, batch 1", ratio(again[0], "prompt_lookup")))
    tokens = " / ".join(str(each["tokens"]) for each in cpu["shipped"]["forward"])
    forwards: list[Find] = [lambda of, i=i: of["forward"][i]["ratio"] for i in range(len(cpu["shipped"]["forward"]))]  # type: ignore[misc]
    rows.append(row("`transformers` forward behind a prompt", f"{tokens} new tokens", *forwards))
    return table(["faster than", "case", *SUBJECTS.values()], rows)


def refinement_work(cpu: dict[str, Any]) -> str:
    """Seconds, sequential steps and token positions fed, and whether the answers were generate's."""
    rows = []
    for subject, shown in SUBJECTS.items():
        for stage in BATCHES:
            found = cpu[subject][stage]
            base = found["faster_generate"]
            rows.append([shown, str(found["batch"]), base.replace("generate_", "generate, cache: "),
                         f"{found['seconds'][base]:.3f}", f"{found['answer_tokens']:,}", "", "", ""])  # fmt: skip
            for name, work in found["work"].items():
                rows.append([
                    shown, str(found["batch"]), CASES.get(name, "token by token"), f"{found['seconds'][name]:.3f}",
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
            f"{shown}: {' / '.join(times(cpu[name][stage]['ratio'][case]) for stage in BATCHES)}"
            for name, shown in SUBJECTS.items()
        )

    dense = [found for name, found in loss.items() if "ours/compile" in found and not name.startswith("states")]
    plain = [row["ratios"]["train_step, one by one"]["one by one"] for row in training["rows"]]
    unclear = sum(low <= 1 <= high for low, _, high in plain)
    many, *_ = results["serve"]["against the engine in one process"].values()
    batches = [
        found["static, sorted / continuous"] for name, found in results["batching"].items() if name[:6] == "batch "
    ]
    nothing = [cpu[name][stage]["token_by_token_over_random_draft"] for name in SUBJECTS for stage in BATCHES]
    generate = "`transformers` generate, speed, batch " + " / ".join(str(cpu["shipped"][s]["batch"]) for s in BATCHES)
    script = ", ".join(f"{shown}: {times(cpu[name]['script']['ratio'])}" for name, shown in SUBJECTS.items())
    rows = [
        ["refine, an unrelated draft", "the public script's algorithm, speed, batch 1", script],
        ["refine, the draft is already right", generate, both("refine_right_draft")],
        ["refine, an unrelated draft", generate, both("refine_given_draft")],
        ["refine, a random draft of which nothing is accepted", "this engine token by token, speed", f"{span(nothing)}x"],
        ["consistency loss, all gradients", "`torch.compile`, time", f"{span([d['ours/compile'] for d in dense])}"],
        ["the same, memory beyond the gradients", "eager PyTorch, all of its memory",
         span([d["ours beyond gradients / eager"] for d in dense], 3)],
        ["train_step", "the strongest plain loop, speed",
         f"{span([median for _, median, _ in plain])}x: within the spread in {unclear} of {len(plain)} settings"],
        ["HTTP server, many clients", "AsyncRefiner in the clients' process, answers/s",
         f"{times(many['throughput, served / one process'], 2)}"],
        ["continuous batching", "static batches sorted by length, speed", f"{span(batches)}x"],
    ]  # fmt: skip
    rows.append(jacobi_steps(results["reproduction"]))
    return table(["what", "against", "measured"], [*rows, *alignment(results["paper_tables"])])


def alignment(paper: dict[str, Any]) -> list[list[str]]:
    """What a DiffPO refiner made of a language model is worth by a reward model, with the control that tells why."""
    sets = {name: Answers(columns) for name, columns in paper["answers"].items()}
    against = {"the base": "base", "+ DPO": "dpo", "+ SimPO": "simpo", "plain fine-tuning": "ar"}
    found = {said: difference(sets["diffpo"], sets[name]) for said, name in against.items()}
    verdict = "" if found["plain fine-tuning"].low > 0 else ": not above that"
    given, random = sets["base + diffpo, 4 steps"], sets["base + diffpo, 4 steps, random"]
    earned = difference(given, random)
    return [
        ["a 135M DiffPO refiner, converged", "the base it is made of, reward", f"+{told(found['the base'])}"],
        ["", "the base + DPO / + SimPO, reward", f"+{told(found['+ DPO'])} / +{told(found['+ SimPO'])}"],
        ["", "plain fine-tuning on the same responses, reward", told(found["plain fine-tuning"]) + verdict],
        ["the same after 4 steps from the base's draft", "from a random draft, reward",
         told(earned) + ("" if earned.low > 0 else ": the draft earns nothing")],
    ]  # fmt: skip


def jacobi_steps(reproduction: dict[str, Any]) -> list[str]:
    """Whether DiffPO training makes Jacobi converge in fewer steps, while the answers remain answers."""
    found = [
        interval(by_prompt(reproduction["runs"][run]["sets"]["plain"]["given"], "steps")) for run in ("omega-1", "ar")
    ]
    ours, theirs = (f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in found)
    verdict = "" if found[0][2] < found[1][1] else ": not fewer"
    return ["Jacobi steps after training with omega 1", "plain fine-tuning", f"{ours} against {theirs}{verdict}"]


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
