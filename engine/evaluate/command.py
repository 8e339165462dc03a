"""The command line: ``rewards``, ``controls``, ``report``, ``export`` and ``import``."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.evaluate.options import build_parser
from engine.evaluate.variants import Variant, variants
from engine.job.command import EXIT_ERROR_ROWS, EXIT_OK, exit_status
from engine.job.interrupt import Signals
from engine.job.questions import read_questions
from engine.job.source import open_regular
from engine.options import RefineOptions
from engine.refine import LOAD_DEFAULTS
from engine.trajectories.score import SCORER_DEFAULTS, choose_scorer

if TYPE_CHECKING:
    from engine.refiner import Refiner

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)

    def say(text: str) -> None:
        print(f"engine.evaluate: {text}", file=sys.stderr, flush=True)

    commands: dict[str, Callable[[argparse.Namespace, Say, Signals], int]] = {
        "rewards": _evaluate,
        "controls": _evaluate,
        "report": _report,
        "export": _export,
        "import": _import,
    }
    return exit_status(lambda signals: commands[args.command](args, say, signals), say)


def _evaluate(args: argparse.Namespace, say: Say, signals: Signals) -> int:
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"the output {args.output} must be a folder")
    load_options = {name: getattr(args, name) for name in (*LOAD_DEFAULTS, "trust_remote_code")}
    scorer_options = {
        **SCORER_DEFAULTS,
        "device": args.scorer_device, "dtype": args.scorer_dtype, "batch_size": args.scorer_batch_size,
        "max_length": args.scorer_max_length, "trust_remote_code": args.trust_scorer_code,
    }  # fmt: skip
    with signals.at_once():
        source = open_regular(args.input)
        questions, digest = read_questions(args.questions) if args.questions else (None, None)
        identity, load_scorer = choose_scorer(args.reward_model, args.rewards, args.callable, scorer_options, say)

        from engine.evaluate.folder import Folder
        from engine.evaluate.run import Evaluation  # PyTorch: only once the files are in order
        from engine.refiner import DEFAULT_CHECKPOINT, Refiner
        from engine.weights import resolve_checkpoint

        checkpoint = resolve_checkpoint(args.model or DEFAULT_CHECKPOINT)
        evaluation = Evaluation(
            folder=Folder(args.output),
            source=source,
            questions=questions,
            questions_digest=digest,
            checkpoint=checkpoint,
            load_options=load_options,
            variants=_variants(args),
            scorer=identity,
            per_prompt=args.drafts_per_prompt,
            whole_drafts=args.whole_drafts,
            overwrite=args.overwrite,
            retry_errors=args.retry_errors,
        )

    def load() -> "Refiner":
        with signals.at_once():
            return Refiner.from_pretrained(checkpoint, **load_options)

    errors = evaluation.run(load, load_scorer, say, signals.check)
    if not args.no_report:
        _write_report(args.output, say)
    return EXIT_ERROR_ROWS if errors else EXIT_OK


def _variants(args: argparse.Namespace) -> list[Variant]:
    names = [field.name for field in dataclasses.fields(RefineOptions) if field.name != "concurrency"]
    options = RefineOptions(**{name: getattr(args, name) for name in names})
    if args.command == "rewards":
        return variants(options, ["steps"], args.reward_at_steps)
    return variants(options, args.controls, args.reward_at_steps, args.prefix_tokens)


def _write_report(folder: Any, say: Say) -> None:
    from engine.evaluate.report import write_report

    for line in write_report(folder):
        say(line)


def _report(args: argparse.Namespace, say: Say, signals: Signals) -> int:
    with signals.at_once():
        _write_report(args.folder, say)
    return EXIT_OK


def _export(args: argparse.Namespace, say: Say, signals: Signals) -> int:
    from engine.evaluate.export import default_folder, export

    with signals.at_once():
        output = args.output or args.folder / default_folder(args.format, args.variant)
        for line in export(args.folder, args.format, output, args.variant):
            say(line)
    return EXIT_OK


def _import(args: argparse.Namespace, say: Say, signals: Signals) -> int:
    from engine.evaluate.verdicts import import_verdicts

    with signals.at_once():
        lines, left_out = import_verdicts(args.folder, args.format, args.input, args.name, args.variant)
        for line in lines:
            say(line)
    return EXIT_ERROR_ROWS if left_out else EXIT_OK
