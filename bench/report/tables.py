"""Tables of the results under bench/results/: functions of a file's content to Markdown."""

import json
from pathlib import Path
from typing import Any

from bench.gpu import targets


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, or what to say without rows."""
    if not rows:
        return "Not measured."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def consistency_loss(results: dict[str, Any]) -> str:
    """Time and memory of the dense plan, a row per shape."""
    rows = []
    for name, found in results.items():
        if "median_seconds" not in found or name.startswith("states"):
            continue
        kind = name.split("-")[0].replace("fp", "float").replace("bf", "bfloat")
        m, d, v = found["shape"]
        rows.append([
            f"{m:,} × {d:,} × {v:,}", kind + (", soft-cap" if name.endswith("softcap") else ""),
            f"{found['median_seconds']['ours']:.2f} s", f"{found['ours/eager']:.2f}", f"{found['ours/compile']:.2f}",
            f"{found['ours beyond gradients / eager']:.3f}",
        ])  # fmt: skip
    header = ["rows × D × V", "dtype", "time", "/ eager", "/ torch.compile", "memory / eager"]
    return table(header, rows)


def sparse_loss(results: dict[str, Any]) -> str:
    """Time and errors of the gradients on hidden states of a trained model, a row per dtype and plan."""
    rows = []
    for name, found in results.items():
        if not name.startswith("states"):
            continue
        errors = found["gradient errors"]
        for variant in ("eager", "compile", *(v for v in errors if v.startswith("ours"))):
            plan = variant.replace("compile", "torch.compile").replace("ours, ", "").replace("ours", "dense")
            seconds = found["median_seconds"]
            relative = 1.0 if variant == "compile" else found.get(f"{variant}/compile")
            relative = seconds[variant] / seconds["compile"] if relative is None else relative
            kind = name.split("-")[1].replace("fp", "float").replace("bf", "bfloat")
            of_gradients = [f"{errors[variant][tensor]:.1e}" for tensor in ("target", "draft", "head")]
            rows.append([kind, plan, f"{seconds[variant]:.2f} s", f"{relative:.2f}", *of_gradients])
    header = ["dtype", "plan", "time", "/ torch.compile", "error: target", "draft", "head"]
    return table(header, rows)


def accuracy(results: dict[str, Any]) -> str:
    """Error of the drafts' gradient by how far the streams are apart, in percent."""
    rows = [
        [f"{kind}, {name}", *(f"{errors[name]:.2%}" for errors in by_distance.values())]
        for kind, by_distance in results["accuracy"].items()
        for name in ("output's own rounding", "eager", "ours")
    ]
    distances = next(iter(results["accuracy"].values()))
    return table(["hidden states", *(f"distance {distance}" for distance in distances)], rows)


def training_step(results: dict[str, Any]) -> str:
    """Times of other loops over that of train_step in micro-batches of one, medians and quartiles over the rounds."""
    ours = "train_step, one by one"
    rows = []
    for found in results["rows"]:
        ratios = [f"{median:.2f} ({low:.2f} to {high:.2f})" for low, median, high in found["ratios"][ours].values()]
        seconds = found["seconds"][ours]
        rows.append([found["model"], found["dtype"], str(found["drafts"]), f"{seconds:.2f} s", *ratios])
    peers = list(results["rows"][0]["ratios"][ours]) if results["rows"] else []
    return table(["model", "dtype", "drafts", "train_step", *(f"{name} /" for name in peers)], rows)


def serving(results: dict[str, Any]) -> str:
    """The server under every load, a row each."""
    rows = []
    for load, found in results.items():
        if not load.startswith(("closed loop", "load ")):
            continue
        latency, told = found["latency ms"], found["shed told after ms"]
        rows.append([
            load.replace("load ", "") + (" × capacity" if load.startswith("load") else ""), f"{found['sent']:,}",
            f"{found['answers/s']:.0f}", f"{latency['p50'] / 1000:.1f} s, {latency['p99'] / 1000:.1f} s", f"{found['shed']:,}",
            f"{told['p50']:.1f} ms, {told['p99']:.0f} ms" if told else "",
            str(found["lost"] + found["wrong answers"] + sum(found["other errors"].values())),
            f"{max(found['MiB resident']):.0f} MiB" if found["MiB resident"] else "",
        ])  # fmt: skip
    header = ["arrivals", "requests", "answers/s", "answered after: p50, p99", "refused", "told after: p50, p99",
              "lost, wrong or failed", "server's memory"]  # fmt: skip
    beside = results["against the engine in one process"]
    ratios = [
        f"{clients}: {found['throughput, served / one process']:.2f} of its answers/s,"
        f" {found['p50 ms, served - one process']:.1f} ms later at the median"
        for clients, found in beside.items()
    ]
    return f"{table(header, rows)}\n\nBeside an AsyncRefiner in the clients' own process, {'; '.join(ratios)}."


def batching(results: dict[str, Any]) -> str:
    """Time of static batches over continuous batching, a row per limit."""
    rows = []
    for name, found in results.items():
        if name.startswith("batch "):
            seconds = found["seconds"]
            ratios = [
                sorted(a / b for a, b in zip(seconds[other], seconds["continuous"], strict=True))
                for other in ("static", "static, sorted")
            ]
            of_all = [f"{found[f'{other} / continuous']:.2f} ({low:.2f} to {high:.2f})"
                      for other, (low, *_, high) in zip(("static", "static, sorted"), ratios, strict=True)]  # fmt: skip
            rows.append([name.removeprefix("batch "), f"{found['answers/s']['continuous']:.1f}", *of_all])
    return table(["sequences at once", "continuous, answers/s", "static /", "static, sorted by length /"], rows)


def on_gpus(folder: Path) -> str:
    """Every operation and the engine, with what bench/gpu.sh measured, if it did, beside what is to be reached."""

    def results(stage: str) -> dict[str, Any]:
        path = folder / f"{stage}_gpu.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    lines = targets.kernel_lines(results("kernels").get("kernels", {}))
    lines += targets.loss_lines(results("consistency_loss"))
    lines += targets.engine_lines(results("engine").get("engine", {}))
    return table(["on a GPU, bfloat16", "target", "measured"], [list(line) for line in lines])
