"""What a batch job of N drafts takes, from what was measured here and what has to be assumed.

python -m bench.plan [--drafts 1e9] [--parameters 2.6e9] [--tokens 300] [--row-bytes 1500] [--tflops 200]
                     [--gpus 256] [--rows-per-file 100000] [--failures-per-gpu-day 0.02]

Measured, and read from bench/results: token-forwards per output token (cpu.json, re-alignment at batch 16) and the batch job's
own CPU time per row (job.json). Assumed: everything on the command line. --tflops is what a GPU sustains in a forward pass,
which was not measured with this engine. Prints a table in Markdown.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure import RESULTS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("drafts", 1e9), ("parameters", 2.6e9), ("tokens", 300), ("row-bytes", 1500), ("tflops", 200), ("gpus", 256),
        ("rows-per-file", 100_000), ("failures-per-gpu-day", 0.02),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=default)
    return parser.parse_args(arguments)


def plan(args: argparse.Namespace, results: Mapping[str, Any]) -> str:
    """The table. ``results``: the content of cpu.json and job.json by their names."""
    work = results["cpu"]["shipped"]["realign_batch_16"]["work"]["realign_on"]
    job = results["job"]["stub"]
    forwards = work["forward_tokens"] / work["tokens"]
    flop_per_draft = 2 * args.parameters * args.tokens * forwards
    gpu_hours = args.drafts * flop_per_draft / (args.tflops * 1e12) / 3600
    files = args.drafts / args.rows_per_file
    days = gpu_hours / args.gpus / 24
    failures = args.failures_per_gpu_day * args.gpus * days
    rows = [
        ("token-forwards per output token, prompt and missed guesses included", f"{forwards:.2f}", "measured"),
        ("compute", f"{args.drafts * flop_per_draft:.2g} FLOP = 2 x {args.parameters:.2g} x {args.tokens:g} x "
         f"{forwards:.2f} x {args.drafts:.0e}", "computed"),
        ("GPU hours", f"{gpu_hours:,.0f}, at {args.tflops:g} TFLOP/s each", "assumed speed"),
        ("wall time", f"{days:.1f} days on {args.gpus:g} GPUs", "computed"),
        ("CPU time of reading, checking, writing and recording",
         f"{args.drafts * job['cpu_microseconds_per_row'] / 3.6e9:,.1f} hours", "measured per row"),
        ("input, output", f"{args.drafts * args.row_bytes / 1e12:.1f} TB each, {files:,.0f} files of "
         f"{args.rows_per_file * args.row_bytes / 1e6:,.0f} MB", "assumed row"),
        ("a file's time on one GPU", f"{gpu_hours / files * 60:,.0f} minutes", "computed"),
        ("host memory of a process, beside the model", f"{job['peak_mib']:.0f} MiB", "measured, flat over 10^6 rows"),
        ("failures to expect", f"{failures:.0f}", "assumed rate"),
        ("lost to a failure", "the answers under way (one batch) and loading the model; finished rows are read again at "
         f"{job['cpu_microseconds_per_finished_row']:.0f} µs each", "measured per row"),
    ]  # fmt: skip
    return "\n".join(
        ["| what | figure | how it is known |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def main() -> None:
    print(plan(parse(), {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "job")}))


if __name__ == "__main__":
    main()
