"""Refines a file of drafts: ``python -m engine.refine --input drafts.jsonl --output refined.jsonl``.

Rows are streamed, so memory does not grow with the file, and whatever ends a run, the same command goes on from where it
was. ``--help`` describes rows, options and exit status; the work is done in ``engine.job``.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.job.command import (
    EXIT_ERROR_ROWS,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    check_output,
    engine_logs,
    explain,
)
from engine.job.interrupt import Interrupted, Signals
from engine.job.output import Refused, record_path
from engine.job.questions import read_questions
from engine.job.report import Reporter
from engine.job.run import Job, StoppedAtError
from engine.job.settings import job_settings
from engine.job.shards import Shard
from engine.job.source import Source
from engine.options import DEFAULT_CONDITION, RefineOptions

if TYPE_CHECKING:
    from engine.refiner import Refiner

LOAD_DEFAULTS = {
    "dtype": "float32",
    "device": "cpu",
    "backend": "auto",
    "max_batch_tokens": 2048,
    "kv_cache_tokens": 16384,
    "max_batch_size": 64,
}
"""Those of Refiner.from_pretrained, without importing it: help and usage errors need no PyTorch."""

_EPILOG = """\
input:       .jsonl or .json (an array), either also as .gz, or .parquet; -: JSON lines from standard input.
input row:   prompt, messages or prompt_ids; draft or draft_ids; id, if it has one. Other fields are carried through.
             Or a row of a known format, as it is: turns and drafts; instruction and output (AlpacaEval's model outputs);
             question_id and choices (FastChat's MT-bench answers, with --questions); custom_id and response (OpenAI's batch
             results, also those of vllm run-batch, with --questions BATCH_INPUT). Of several turns each is refined behind
             the refined answers of those before it.
output row:  the carried fields, id (the index where it had none), index (number of the input row, from 0), text, steps,
             converged, forward_tokens, finish_reason, seconds, error (null, or its type and message); answers (one per turn)
             where there are turns; in the known formats the refined answers also stand where their drafts stood.
             One for every input row, in the same order; blank lines are no rows. A .json output is an array.
resume:      the same command again goes on where the last one ended, however that was; rows that are finished are kept.
             Beside the output lies a record of how it was made (.job): another model, input or option is refused.
exit status: 0 all rows refined, 3 some rows have errors, 2 wrong option, model or file, 1 reading or writing failed on
             the way, 130 Ctrl-C, 143 SIGTERM.
data parallel: torchrun --nproc-per-node 8 -m engine.refine --data-parallel --device cuda ...
             Each rank completes its own part file, the last one merges them. When a rank dies, torchrun sends the others
             SIGTERM, and SIGKILL after its --shutdown-timeout (30 s): they go on for --grace seconds. With --max-restarts
             they go on by themselves, without it when the command is run again.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.refine",
        description="Refine a file of draft answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="drafts; -: standard input")
    parser.add_argument("--output", required=True, metavar="FILE", help="refined answers; -: standard output")
    parser.add_argument("--questions", metavar="FILE", help="FastChat's question file, or the batch's input file")
    parser.add_argument("--token-ids", action="store_true", help="also write the answers' token_ids")
    _add_job_options(parser.add_argument_group("job"))
    add_refine_options(parser.add_argument_group("refinement"))
    add_model_options(parser.add_argument_group("model"))
    return parser


def _add_job_options(group: argparse._ArgumentGroup) -> None:
    text = "what an error in a row does: become that row's result, or stop the job before it (default: row)"
    group.add_argument("--on-error", choices=("row", "stop"), default="row", help=text)
    group.add_argument("--unordered", action="store_true", help="write rows as they finish, not in the input's order")
    group.add_argument(
        "--overwrite", action="store_true", help="start anew if the output is complete or of another job"
    )
    group.add_argument("--retry-errors", action="store_true", help="compute the error rows of the output again")
    group.add_argument("--metrics-file", type=Path, metavar="FILE", help="statistics as JSON, kept up to date")
    group.add_argument(
        "--data-parallel", action="store_true", help="under torchrun: share the rows among its processes"
    )
    text = "with --data-parallel: how long to go on after SIGTERM (default: %(default)s)"
    group.add_argument("--grace", type=float, default=25.0, metavar="SECONDS", help=text)


def add_refine_options(group: argparse._ArgumentGroup) -> None:
    defaults = dataclasses.asdict(RefineOptions())
    group.add_argument("--steps", type=int, metavar="K", help="Jacobi steps per block (default: until converged)")
    add_option(group, "block-size", defaults, "with --steps: response positions iterated together")
    add_option(group, "keep-prefix", defaults, "leading draft tokens to keep as they are")
    add_option(group, "max-new-tokens", defaults, "longest answer in tokens")
    add_option(
        group, "window", defaults, "rows computed per sequence and step, or auto; changes only the speed", _window
    )
    text = "do not look for the answer's tokens in the draft; changes only the speed"
    group.add_argument("--no-realign", dest="realign", action="store_false", help=text)
    text = "template with {prompt} and {draft}, to show the model the draft; without a value: the shipped refiner's"
    group.add_argument("--condition", nargs="?", const=DEFAULT_CONDITION, metavar="TEMPLATE", help=text)
    add_option(group, "temperature", defaults, "0: greedy")
    add_option(group, "top-p", defaults, "sample from the most probable tokens with this mass")
    add_option(group, "seed", defaults, "seed of the sampling noise")


def add_model_options(group: argparse._ArgumentGroup) -> None:
    defaults = LOAD_DEFAULTS
    group.add_argument("--model", help="checkpoint folder or hub id (default: the refiner that ships with the engine)")
    add_option(group, "dtype", defaults, "float32, bfloat16 or float16")
    add_option(group, "device", defaults, "such as cpu or cuda")
    add_option(
        group, "backend", defaults, "lean: the engine's own decoder, hf: transformers' modules, auto: what works"
    )
    add_option(group, "max-batch-tokens", defaults, "rows of one forward pass")
    add_option(group, "kv-cache-tokens", defaults, "positions the KV cache holds")
    add_option(group, "max-batch-size", defaults, "sequences that run at once")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")


def add_option(
    group: argparse._ArgumentGroup, name: str, defaults: dict[str, Any], text: str, kind: Any = None
) -> None:
    value = defaults[name.replace("-", "_")]
    metavar = "N" if isinstance(value, int) else name.upper()
    group.add_argument(
        f"--{name}", type=kind or type(value), default=value, metavar=metavar, help=f"{text} (default: {value})"
    )


def _window(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or auto, got {text!r}") from None


def read_shard(args: argparse.Namespace) -> Shard | None:
    """This process's shard, from the environment that torchrun gives. Raises ValueError."""
    if not args.data_parallel:
        return None
    try:
        shard = Shard(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"--data-parallel needs RANK and WORLD_SIZE as torchrun sets them, got {error}") from None
    for what, wrong in {
        "--unordered": args.unordered,
        "--input -": args.input == "-",
        "--output -": args.output == "-",
    }.items():
        if wrong:
            raise ValueError(
                f"--data-parallel cannot be used with {what}: every process reads the file, parts are merged by index"
            )
    return shard


def build_job(args: argparse.Namespace, shard: Shard | None) -> "tuple[Job, Callable[[], Refiner]]":
    """The job of a command line, and what loads its model. Raises ValueError, OSError, EngineError."""
    output = None if args.output == "-" else Path(args.output)
    if output is not None:
        check_output(output, args.input)
        if shard and output.exists() and not output.is_file():
            raise ValueError(f"the output {output} of a --data-parallel job must be a regular file")
    if args.metrics_file is not None:
        _check_metrics(args.metrics_file, [Path(args.input), *([output, record_path(output)] if output else [])])
    names = [field.name for field in dataclasses.fields(RefineOptions) if field.name != "concurrency"]
    options = RefineOptions(**{name: getattr(args, name) for name in names})
    load_options = {name: getattr(args, name) for name in (*LOAD_DEFAULTS, "trust_remote_code")}
    if shard and args.device == "cuda" and "LOCAL_RANK" in os.environ:
        load_options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    source = Source.open(args.input)
    questions, questions_digest = read_questions(args.questions) if args.questions else (None, None)

    from engine.refiner import DEFAULT_CHECKPOINT, Refiner  # PyTorch: only once the files are in order
    from engine.weights import resolve_checkpoint

    checkpoint = resolve_checkpoint(args.model or DEFAULT_CHECKPOINT)
    settings = job_settings(
        source, questions_digest, checkpoint, load_options, options,
        token_ids=args.token_ids, ordered=not args.unordered,
    )  # fmt: skip
    job = Job(
        source=source,
        output=output,
        settings=settings,
        options=options,
        questions=questions,
        token_ids=args.token_ids,
        ordered=not args.unordered,
        on_error=args.on_error,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
        shard=shard,
    )
    return job, lambda: Refiner.from_pretrained(checkpoint, **load_options)


def _check_metrics(metrics: Path, others: list[Path]) -> None:
    for path in others:
        if metrics.resolve() == path.resolve() or (metrics.exists() and path.exists() and metrics.samefile(path)):
            raise ValueError(f"--metrics-file {metrics} would overwrite {path}: give another file")
    if metrics.is_dir() or not metrics.parent.is_dir():
        raise ValueError(f"--metrics-file {metrics} must be a file in a folder that exists")


class _CannotStart(Exception):
    """Nothing was done; the cause says why."""


def _prepare(args: argparse.Namespace, shard: Shard | None) -> "tuple[Job, Callable[[], Refiner]]":
    try:
        return build_job(args, shard)
    except (ValueError, OSError, EngineError) as error:
        raise _CannotStart from error


def _run(job: Job, load: "Callable[[], Refiner]", reporter: Reporter, signals: Signals) -> tuple[int, str]:
    """Exit status and state of a job that has begun; says what went wrong. Raises _CannotStart."""

    def load_model() -> "Refiner":
        try:
            with signals.at_once():
                return load()
        except Exception as error:  # checkpoints and the libraries that read them fail in many ways of their own
            raise _CannotStart from error

    failure = ""
    try:
        errors = job.run(load_model, reporter, signals.check)
    except Interrupted as error:
        status, state, failure = (
            error.exit_status,
            "interrupted",
            f"interrupted by {error}: the same command goes on from here",
        )
    except KeyboardInterrupt:
        status, state, failure = EXIT_INTERRUPTED, "interrupted", "interrupted twice"
    except Refused as error:
        raise _CannotStart from error
    except StoppedAtError as error:
        status, state, failure = EXIT_ERROR_ROWS, "stopped", f"stopped at {error}"
    except (OSError, EngineError) as error:
        status, state, failure = EXIT_FAILED, "failed", f"error: {explain(error)}"
    else:
        # of a data-parallel job only the last rank may fail: torchrun ends the others as soon as one does
        status, state = EXIT_ERROR_ROWS if errors else EXIT_OK, "finished"
    if failure:
        reporter.close()
        reporter.say(failure)
    return status, state


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        shard = read_shard(args)
    except ValueError as error:
        Reporter().say(f"error: {error}")
        return EXIT_USAGE
    metrics = args.metrics_file
    if shard and metrics:
        metrics = metrics.with_name(f"{metrics.name}.rank{shard.rank}")
    reporter = Reporter(metrics, shard.rank if shard else None)
    grace = args.grace if shard else 0.0
    with engine_logs(reporter.say), Signals(grace) as signals, contextlib.closing(reporter):
        try:
            with signals.at_once():
                job, load = _prepare(args, shard)
            status, state = _run(job, load, reporter, signals)
        except Interrupted as error:
            reporter.say(f"interrupted by {error}")
            return error.exit_status
        except _CannotStart as error:
            reporter.say(f"error: {explain(error.__cause__ or error)}")
            return EXIT_USAGE
        try:
            reporter.end(state)
        except OSError as error:
            reporter.say(f"error: the metrics could not be written: {explain(error)}")
            return EXIT_FAILED
        return status


if __name__ == "__main__":
    sys.exit(main())
