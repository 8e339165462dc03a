"""The command line ``python -m engine.train``: settings and trajectories in, a refiner out."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.job.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, engine_logs, explain
from engine.job.interrupt import Interrupted, Signals
from engine.job.output import Claim
from engine.training.config import TrainConfig, describe, read_config

if TYPE_CHECKING:
    from engine.training.prepare import Start
    from engine.training.trainer import RefinerTrainer

Say = Callable[[str], None]
_EPILOG = """\
resume:      the same command goes on from the last checkpoint, however the run ended; on a CPU to the same bits. Other settings
             or files are refused, but for micro_batch, device, gradient_checkpointing and what only says how to log and save.
processes:   torchrun --nproc-per-node N -m engine.train .. shares batch_size among N; the same batches are learned from.
exit status: 0 done, 1 failed on the way (also when the loss diverges), 2 refused before any work, 130 Ctrl-C, 143 SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; the settings are described, not parsed, by it."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.train",
        description="Train a refiner on ranked trajectories (DiffPO, arXiv 2503.04240).",
        epilog=f"settings, in the file as 'name: value', behind it as name=value:\n{describe()}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "settings", nargs="*", metavar="config.yaml|name=value", help="a YAML file first, or settings alone"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        print(f"engine.train: {text}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.enter_context(engine_logs(say if first else lambda _: None))
        try:
            return _run(args.settings, signals, stack)
        except _CannotStart as error:
            if first:
                say(f"error: {explain(error.__cause__ or error)}")
            return EXIT_USAGE
        except Interrupted as error:
            if first:
                say(f"interrupted by {error}: the same command goes on from here")
            return error.exit_status
        except KeyboardInterrupt:
            say("interrupted twice: the same command goes on from the last checkpoint")
            return EXIT_INTERRUPTED
        except (OSError, EngineError, RuntimeError) as error:
            say(f"error: {explain(error)}")
            return EXIT_FAILED


class _CannotStart(Exception):
    """Nothing was done; the cause says why."""


def _run(texts: Sequence[str], signals: Signals, stack: ExitStack) -> int:
    try:
        with signals.at_once():
            config = _config(texts)
            trainer, claim, checkpoint = _prepare(config, stack, signals)
    except (ValueError, OSError, EngineError, ImportError) as error:
        raise _CannotStart from error
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped:
        raise trainer.interrupted or Interrupted(signal.SIGTERM)  # another process was asked to end
    from engine.training.checkpoint import MODEL

    folder = Path(config.output, MODEL)
    trainer.save_refiner(folder)
    trainer.save_state()
    if claim:
        claim.finish(trainer.state.global_step)
        logging.getLogger("engine.training").info("the refiner is in %s", folder)
    return EXIT_OK


def _config(texts: Sequence[str]) -> TrainConfig:
    named = bool(texts) and "=" not in texts[0]
    return read_config(texts[0] if named else None, texts[1:] if named else texts)


def _prepare(
    config: TrainConfig, stack: ExitStack, signals: Signals
) -> "tuple[RefinerTrainer, Claim | None, Path | None]":
    """The trainer, on the first process the claim on the output, and the checkpoint to go on from."""
    from engine.training.prepare import look, read_data

    start = look(config)
    claim = _claim(config, start, stack)
    train, evaluation = read_data(config, start)
    from engine.training.checkpoint import begin_run, checkpoints
    from engine.training.prepare import arguments, load_model
    from engine.training.trainer import RefinerTrainer

    output = Path(config.output)
    args = arguments(config, start, evaluates=evaluation is not None)
    device = args.device
    with args.main_process_first(local=False):
        if claim:
            begin_run(output, claim, start.settings)
    checkpoint = next(reversed(checkpoints(output)), None)
    model = load_model(config, start, device, checkpoint)
    trainer = RefinerTrainer(
        model, args, config,
        train=train, evaluation=evaluation, vocabulary=start.vocabulary, tokenizer=start.tokenizer, check=signals.check,
    )  # fmt: skip
    return trainer, claim, checkpoint


def _claim(config: TrainConfig, start: "Start", stack: ExitStack) -> Claim | None:
    """Only the first of several processes writes."""
    from engine.training.checkpoint import claim_run

    if os.environ.get("RANK", "0") != "0":
        return None
    return stack.enter_context(claim_run(Path(config.output), start.settings, overwrite=config.overwrite))


if __name__ == "__main__":
    sys.exit(main())
