"""The command line ``python -m engine.train``: settings and trajectories in, a refiner out."""

import argparse
import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from engine.errors import EngineError, OutOfMemory
from engine.job.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, engine_logs, explain
from engine.job.interrupt import Interrupted, Signals
from engine.job.output import Claim
from engine.training.config import TrainConfig
from engine.training.config_file import describe, read_config

if TYPE_CHECKING:
    from engine.training.prepare import Start
    from engine.training.trainer import RefinerTrainer

_EPILOG = """\
resume:      the same command goes on from the last checkpoint, however the run ended; on a CPU, with as many threads, to the
             same bits. Other settings or files are refused, but for micro_batch, device, gradient_checkpointing and what
             only says how to log and save.
picture:     --plot OUTPUT draws both terms of the loss, while the run goes on too (up to its last checkpoint).
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
    text = "draw the losses of the run in this folder into it, as loss.png, instead of training (needs matplotlib)"
    parser.add_argument("--plot", type=Path, metavar="OUTPUT", help=text)
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
            if args.plot is not None:
                return _plot(args.plot, args.settings, say)
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
        except (OSError, EngineError) as error:
            say(f"error: {explain(error)}")
            return EXIT_FAILED


class _CannotStart(Exception):
    """Nothing was done; the cause says why."""


def _plot(output: Path, settings: Sequence[str], say: Callable[[str], None]) -> int:
    from engine.training.plot import plot_run

    try:
        if settings:
            raise ValueError(f"--plot draws a run as it is and takes no settings, got {settings[0]!r}")
        say(f"{plot_run(output)} shows the losses")
    except (ValueError, OSError) as error:
        raise _CannotStart from error
    return EXIT_OK


def _run(texts: Sequence[str], signals: Signals, stack: ExitStack) -> int:
    try:
        with signals.at_once():
            config = _config(texts)
            trainer, claim, checkpoint = _prepare(config, stack, signals)
    except (ValueError, OSError, EngineError, ImportError) as error:
        raise _CannotStart from error
    import torch

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        hint = "the same command goes on with a smaller micro_batch or gradient_checkpointing=true"
        raise OutOfMemory(f"{error.args[0]}; {hint}") from error
    if trainer.stopped:
        _leave_group()
        raise trainer.interrupted or Interrupted(signal.SIGTERM)  # another process was asked to end
    from engine.training.checkpoint import MODEL

    folder = Path(config.output, MODEL)
    trainer.save_refiner(folder)
    trainer.save_state()
    _leave_group()
    if claim:
        claim.finish(trainer.state.global_step)
        logging.getLogger("engine.training").info("the refiner is in %s", folder)
    return EXIT_OK


def _leave_group() -> None:
    """Ends this process's part in the group: threads of a group that is still there at exit can abort the process."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _config(texts: Sequence[str]) -> TrainConfig:
    named = bool(texts) and "=" not in texts[0]
    return read_config(texts[0] if named else None, texts[1:] if named else texts)


def _prepare(
    config: TrainConfig, stack: ExitStack, signals: Signals
) -> "tuple[RefinerTrainer, Claim | None, Path | None]":
    """The trainer, on the first process the claim on the output, and the checkpoint to go on from."""
    from transformers.utils.logging import disable_progress_bar

    from engine.training.checkpoint import begin_run, resume_point
    from engine.training.prepare import arguments, load_model, look, read_data
    from engine.training.trainer import RefinerTrainer

    start = look(config)
    claim = _claim(config, start, stack)
    train, evaluation = read_data(config, start)
    output = Path(config.output)
    args = arguments(config, start, evaluates=evaluation is not None)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading and saving; training says a line per log_every steps instead
    checkpoint = resume_point(output, start.settings)
    model = load_model(config, start, args.device, checkpoint)
    trainer = RefinerTrainer(
        model, args, config,
        train=train, evaluation=evaluation, vocabulary=start.vocabulary, tokenizer=start.tokenizer, check=signals.check,
    )  # fmt: skip
    with args.main_process_first(local=False):
        if claim:
            begin_run(output, claim, start.settings)
    return trainer, claim, checkpoint


def _claim(config: TrainConfig, start: "Start", stack: ExitStack) -> Claim | None:
    """Only the first of several processes writes."""
    from engine.training.checkpoint import claim_run

    if os.environ.get("RANK", "0") != "0":
        return None
    stack.callback(_remove_if_empty, Path(config.output))
    return stack.enter_context(claim_run(Path(config.output), start.settings, overwrite=config.overwrite))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def end_rank(status: int) -> NoReturn:
    """Ends one of several processes as ``sys.exit`` does, but without the interpreter's teardown.

    DTensor's caches keep gloo's threads alive behind destroy_process_group. One that lets go of a last tensor then asks for
    the interpreter, is ended for it in the middle of a destructor, and std::terminate aborts a process whose work is done.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # such as a tracker's last upload
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_status = main()
    if "RANK" in os.environ:
        end_rank(exit_status)
    sys.exit(exit_status)
