"""What the batch job itself costs: seconds per row and memory over a million rows.

python -m bench.bench_job [--rows N] [--model-rows N] [--only stub,model] [--scratch FOLDER]

``stub``: the command with a model that answers at once, so that all that is measured is the job. ``model``: the command with
a random Llama of a few thousand parameters. Each runs in a process of its own, whose resident memory is sampled; writes
bench/results/job.json and a plot, bench/results/job_memory.png.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from bench.measure import RESULTS, machine, save
from engine import RefineOptions, Refiner, refine
from engine.request import Request, Result

SAMPLE_SECONDS = 0.25
BATCH = 64
ANSWER = "An answer of a sentence or two, as long as many that a refiner gives. " * 3
ANSWER_IDS = list(range(48))
Samples = list[tuple[float, float]]
"""Seconds since the start, MiB resident."""


class StubSession:
    """Answers everything in the step after it was asked."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Request]] = []

    @property
    def has_room(self) -> bool:
        return len(self.waiting) < BATCH

    def add(self, value: Request, index: int) -> None:
        self.waiting.append((index, value))

    def step(self) -> list[Result]:
        done, self.waiting = self.waiting, []
        return [
            Result(
                id=value.id, index=index, text=ANSWER, token_ids=ANSWER_IDS, steps=9, converged=True, forward_tokens=99,
                finish_reason="eos", seconds=0.125,
            )
            for index, value in done
        ]  # fmt: skip

    def close(self) -> None:
        pass


class StubRefiner:
    """A model that costs nothing."""

    max_batch_size = BATCH

    def session(self, options: RefineOptions) -> StubSession:
        return StubSession()

    def close(self) -> None:
        pass


def write_text_rows(path: Path, rows: int) -> None:
    """Rows of text, of about 350 bytes."""
    with path.open("w") as file:
        for i in range(rows):
            row = {
                "id": f"row-{i}",
                "prompt": f"Question {i}? " * 4,
                "draft": ANSWER,
                "source": {"file": "a", "line": i},
            }
            file.write(json.dumps(row) + "\n")


def write_id_rows(path: Path, rows: int) -> None:
    """Rows of token ids for a vocabulary of 64."""
    with path.open("w") as file:
        for i in range(rows):
            ids = [4 + (i * 7 + j * 13) % 60 for j in range(12)]
            file.write(json.dumps({"id": i, "prompt_ids": ids[:6], "draft_ids": ids[6:]}) + "\n")


def tiny_llama(folder: Path) -> int:
    """A random Llama; how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def sampled() -> Iterator[Samples]:
    """Resident memory over time, from a thread."""
    samples: Samples = []
    stop, start = threading.Event(), time.monotonic()

    def sample() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not stop.wait(SAMPLE_SECONDS):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append((time.monotonic() - start, pages * page / 2**20))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def run_stage(stage: str, rows: int, folder: Path, results: "multiprocessing.Queue[dict[str, Any]]") -> None:
    """One stage, in the process it is measured in."""
    source, target, model = folder / "in.jsonl", folder / "out.jsonl", folder / "model"
    model.mkdir()
    (write_text_rows if stage == "stub" else write_id_rows)(source, rows)
    arguments = ["--model", str(model), "--input", str(source), "--output", str(target), "--max-batch-size", str(BATCH)]
    out: dict[str, Any] = {"rows": rows}
    with contextlib.ExitStack() as stack:
        if stage == "stub":
            (model / "config.json").write_text("{}")
            load = wraps(Refiner.from_pretrained)(lambda path, **options: StubRefiner())
            stack.enter_context(mock.patch.object(Refiner, "from_pretrained", load))
        else:
            out["parameters"] = tiny_llama(model)
            arguments += ["--max-new-tokens", "8"]
        errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        samples = stack.enter_context(sampled())
        start, cpu = time.monotonic(), time.process_time()
        status = refine.main(arguments)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    with target.open("rb") as file:
        written = sum(1 for _ in file)
    assert (status, written) == (0, rows), errors.getvalue()
    again, cpu_again = time.monotonic(), time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        assert refine.main(arguments) == 0
    out |= {
        "seconds": seconds,
        "microseconds_per_row": seconds / rows * 1e6,
        "cpu_microseconds_per_row": cpu / rows * 1e6,
        "microseconds_per_finished_row": (time.monotonic() - again) / rows * 1e6,
        "cpu_microseconds_per_finished_row": (time.process_time() - cpu_again) / rows * 1e6,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "slope_kib_per_100k_rows": slope(samples) * 1024 * seconds / rows * 1e5,
        "samples": [(round(t, 2), round(mib, 2)) for t, mib in samples[:: max(1, len(samples) // 400)]],
    }
    results.put(out)


def slope(samples: Samples) -> float:
    """MiB per second in the second half: the least-squares line."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return float("nan")
    return statistics.linear_regression([t for t, _ in half], [mib for _, mib in half]).slope


def plot(results: dict[str, Any], path: Path) -> None:
    """Resident memory over time, one curve for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for stage, result in results.items():
        if isinstance(result, dict) and "samples" in result:
            times, sizes = zip(*result["samples"], strict=True)
            share = [100 * t / result["seconds"] for t in times]
            axes.plot(share, sizes, label=f"{stage}: {result['rows']:,} rows in {result['seconds']:.0f} s")
    axes.set(xlabel="% of the run", ylabel="resident memory (MiB)", ylim=(0, None), title="python -m engine.refine")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="of the stub stage")
    parser.add_argument("--model-rows", type=int, metavar="N", help="of the model stage (default: a tenth)")
    parser.add_argument("--only", default="stub,model")
    parser.add_argument("--scratch", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--name", default="job", help="file name under bench/results/")
    args = parser.parse_args()
    rows = {"stub": args.rows, "model": args.model_rows or max(args.rows // 10, 1)}
    results: dict[str, Any] = {"machine": machine()}
    context = multiprocessing.get_context("spawn")
    for stage in args.only.split(","):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            queue: multiprocessing.Queue[dict[str, Any]] = context.Queue()
            process = context.Process(target=run_stage, args=(stage, rows[stage], Path(folder), queue))
            process.start()
            while process.is_alive() and queue.empty():
                process.join(0.2)
            if process.exitcode:
                raise SystemExit(f"the stage {stage} ended with status {process.exitcode}")
            results[stage] = queue.get(timeout=60)
            process.join()
        print(stage, {name: value for name, value in results[stage].items() if name != "samples"}, flush=True)
    save(args.name, results)
    try:
        plot(results, RESULTS / f"{args.name}_memory.png")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'diffpo-engine[bench]')")


if __name__ == "__main__":
    main()
