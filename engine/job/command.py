"""What the command lines have in common: subcommands, exit status, errors in one line, log messages, an output's name."""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from engine.errors import EngineError
from engine.job.interrupt import Interrupted, Signals

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_ERROR_ROWS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
OTHER_FORMATS = (".csv", ".gz", ".parquet", ".tsv", ".zip", ".zst")
"""Names of outputs that would promise what they don't hold."""


def subcommands(
    prog: str,
    description: str,
    epilog: str,
    commands: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]],
) -> argparse.ArgumentParser:
    """A parser of ``commands``: of every name its help and what adds its options. The epilog is in the help of each."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, (text, add) in commands.items():
        add(parsers.add_parser(name, help=text, epilog=epilog, formatter_class=form, allow_abbrev=False))
    return parser


def positive(text: str) -> int:
    """An option's whole number. Raises argparse.ArgumentTypeError below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def check_output(output: Path, source: str) -> None:
    """Raises ValueError unless rows of ``source`` can be written there."""
    if output.exists() and source != "-" and os.path.samefile(output, source):
        raise ValueError(f"the output {output} is the input: give another file")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"the output {output} must be a file in a folder that exists")
    if output.suffix.lower() in OTHER_FORMATS:
        raise ValueError(f"the output is JSON lines, or for .json an array; got the name {output.name!r}: use .jsonl")


def explain(error: BaseException) -> str:
    """An error in one line; with its type, unless its message was written for the user."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return text if isinstance(error, EngineError | ValueError | OSError) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def engine_logs(say: Callable[[str], None]) -> Iterator[None]:
    """In a ``with`` block, what the engine logs is said too."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.name}: {record.getMessage()}")

    logger, handler = logging.getLogger("engine"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def exit_status(run: Callable[[Signals], int], say: Callable[[str], None]) -> int:
    """Of a command that resumes what it finds begun: runs it, with what the engine logs said too, and says what ended it."""
    with engine_logs(say), Signals() as signals:
        try:
            return run(signals)
        except Interrupted as error:
            say(f"interrupted by {error}: the same command goes on from here")
            return error.exit_status
        except KeyboardInterrupt:
            say("interrupted twice")
            return EXIT_INTERRUPTED
        except (ValueError, FileNotFoundError, IsADirectoryError) as error:
            say(f"error: {explain(error)}")
            return EXIT_USAGE
        except (OSError, EngineError) as error:
            say(f"error: {explain(error)}")
            return EXIT_FAILED
