"""Refines a file of drafts: ``python -m engine.refine --input drafts.jsonl --output refined.jsonl``.

Rows of JSON lines are streamed: memory does not grow with the file. However a run ends, its output holds the results of
the first rows of the input. ``--help`` describes rows, options and exit status.
"""

import argparse
import codecs
import contextlib
import dataclasses
import inspect
import json
import logging
import math
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from tqdm import tqdm  # type: ignore[import-untyped]

from engine.errors import EngineError, InvalidRequest
from engine.options import DEFAULT_CONDITION, RefineOptions
from engine.refiner import Refiner
from engine.request import Request, Result

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_ERROR_ROWS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
FLUSH_SECONDS = 0.5
REPORT_SECONDS = 10.0
BUFFER_BYTES = 1 << 20

_REQUEST_FIELDS = ("prompt", "messages", "prompt_ids", "draft", "draft_ids")
_REFINE_OPTIONS = "steps keep_prefix max_new_tokens window realign condition temperature top_p seed block_size".split()
_EPILOG = """\
input row:   prompt, messages or prompt_ids; draft or draft_ids; id, if it has one. Other fields are carried through.
output row:  the carried fields, id (the index where it had none), index (number of the input row, from 0), text, steps,
             converged, forward_tokens, finish_reason, error (null, or its type and message).
             One for every input row, in the same order; blank lines are no rows.
exit status: 0 all rows refined, 3 some rows have errors, 2 wrong option, model or file, 1 reading or writing failed on
             the way, 130 Ctrl-C.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.refine",
        description="Refine a file of draft answers (JSON lines).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="drafts, one JSON object per line; -: stdin")
    parser.add_argument("--output", required=True, metavar="FILE", help="refined answers, overwritten; -: stdout")
    parser.add_argument("--token-ids", action="store_true", help="also write the answers' token_ids")
    _add_refine_options(parser.add_argument_group("refinement"))
    _add_model_options(parser.add_argument_group("model"))
    return parser


def _add_refine_options(group: argparse._ArgumentGroup) -> None:
    defaults = dataclasses.asdict(RefineOptions())
    group.add_argument("--steps", type=int, metavar="K", help="Jacobi steps per block (default: until converged)")
    _add(group, "block-size", defaults, "with --steps: response positions iterated together")
    _add(group, "keep-prefix", defaults, "leading draft tokens to keep as they are")
    _add(group, "max-new-tokens", defaults, "longest answer in tokens")
    _add(group, "window", defaults, "rows computed per sequence and step, or auto; changes only the speed", _window)
    text = "do not look for the answer's tokens in the draft; changes only the speed"
    group.add_argument("--no-realign", dest="realign", action="store_false", help=text)
    text = "template with {prompt} and {draft}, to show the model the draft; without a value: the shipped refiner's"
    group.add_argument("--condition", nargs="?", const=DEFAULT_CONDITION, metavar="TEMPLATE", help=text)
    _add(group, "temperature", defaults, "0: greedy")
    _add(group, "top-p", defaults, "sample from the most probable tokens with this mass")
    _add(group, "seed", defaults, "seed of the sampling noise")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    defaults = _load_defaults()
    group.add_argument("--model", help="checkpoint folder or hub id (default: the refiner that ships with the engine)")
    _add(group, "dtype", defaults, "float32, bfloat16 or float16")
    _add(group, "device", defaults, "such as cpu or cuda")
    _add(group, "backend", defaults, "lean: the engine's own decoder, hf: transformers' modules, auto: what works")
    _add(group, "max-batch-tokens", defaults, "rows of one forward pass")
    _add(group, "kv-cache-tokens", defaults, "positions the KV cache holds")
    _add(group, "max-batch-size", defaults, "sequences that run at once")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")


def _add(group: argparse._ArgumentGroup, name: str, defaults: dict[str, Any], text: str, kind: Any = None) -> None:
    value = defaults[name.replace("-", "_")]
    metavar = "N" if isinstance(value, int) else name.upper()
    group.add_argument(
        f"--{name}", type=kind or type(value), default=value, metavar=metavar, help=f"{text} (default: {value})"
    )


def _load_defaults() -> dict[str, Any]:
    parameters = inspect.signature(Refiner.from_pretrained).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _window(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or auto, got {text!r}") from None


def read_jsonl(file: Iterable[bytes]) -> Iterator[dict[str, Any] | InvalidRequest]:
    """The objects of a file of JSON lines; where a line holds none, what is wrong with it."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip().decode(), parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            row = InvalidRequest(f"line {number} is not valid JSON: {reason}")
        if not isinstance(row, dict | InvalidRequest):
            row = InvalidRequest(f"line {number} must hold a JSON object, got {type(row).__name__}")
        yield row


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity or 1e999: could not be written as JSON again
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def to_request(row: dict[str, Any] | InvalidRequest) -> Request | dict[str, Any]:
    """What ``Refiner.stream`` gets for a row: a Request, or for a bad row something it refuses, which keeps the row's
    place. The metadata has the fields to carry and the row's own error, for ``output_row``."""
    if isinstance(row, InvalidRequest):
        return {"metadata": {"carried": {}, "error": row}}
    carried = {name: value for name, value in row.items() if name != "id" and name not in _REQUEST_FIELDS}
    fields = {name: row[name] for name in _REQUEST_FIELDS if name in row}
    try:
        return Request(**fields, id=row.get("id"), metadata={"carried": carried, "error": None})
    except InvalidRequest as error:
        refused = error
    except RecursionError:  # from showing a value, in a message, that is nested just short of what json.loads takes
        refused = InvalidRequest("the row is nested too deeply")
    return {"id": row.get("id"), "metadata": {"carried": carried, "error": refused}}


def output_row(result: Result, token_ids: bool) -> dict[str, Any]:
    """The output for a result of ``to_request``; its fields come before carried ones of the same name."""
    error = result.metadata["error"] or result.error
    row = dict(result.metadata["carried"])
    for name in ("id", "index", "text", "steps", "converged", "forward_tokens", "finish_reason"):
        row[name] = getattr(result, name)
    if token_ids:
        row["token_ids"] = result.token_ids
    row["error"] = {"type": type(error).__name__, "message": str(error)} if error else None
    return row


class JsonlWriter:
    """Appends JSON lines to a file, at most FLUSH_SECONDS behind."""

    def __init__(self, file: BinaryIO) -> None:
        """``file`` has a buffer of BUFFER_BYTES."""
        self._file = file
        self._buffered = 0
        self._flushed = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        try:
            line = f"{text}\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON has only as an escape
            line = f"{json.dumps(row)}\n".encode()
        # a line that fits into the buffer is never torn by Ctrl-C, which may come while a full buffer is emptied
        if self._buffered + len(line) > BUFFER_BYTES:
            self.flush()
        self._file.write(line)
        self._buffered += len(line)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._buffered = 0
        self._flushed = time.monotonic()


@dataclasses.dataclass(slots=True)
class Statistics:
    """Sums over the results so far; those after ``errors`` are of refined answers only."""

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    steps: int = 0
    forward_tokens: int = 0

    def add(self, result: Result) -> None:
        self.rows += 1
        if result.error:
            self.errors += 1
        else:
            self.tokens += len(result.token_ids)
            self.steps += result.steps
            self.forward_tokens += result.forward_tokens

    def summary(self, seconds: float) -> str:
        answers = self.rows - self.errors
        return (
            f"{self.rows} rows, {self.errors} errors, {seconds:.1f} s, {_ratio(self.tokens, seconds)} tokens/s, "
            f"{_ratio(self.steps, answers)} steps per answer, "
            f"{_ratio(self.forward_tokens, self.tokens)} token-forwards per output token"
        )


def _ratio(total: float, count: float) -> str:
    return f"{total / count:.2f}" if count else "-"


class Progress:
    """How a run goes, on stderr: a bar on a terminal, else a line now and then; at the end a summary."""

    def __init__(self) -> None:
        self.statistics = Statistics()
        self._started = self._reported = time.monotonic()
        self._bar = tqdm(unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        _say(self.statistics.summary(time.monotonic() - self._started))

    def add(self, result: Result) -> None:
        self.statistics.add(result)
        now = time.monotonic()
        rate = _ratio(self.statistics.tokens, now - self._started)
        self._bar.set_postfix_str(f"{rate} tokens/s", refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            _say(f"{self.statistics.rows} rows, {self.statistics.errors} errors, {rate} tokens/s")


def refine_file(
    refiner: Refiner, source: Iterable[bytes], target: BinaryIO, options: RefineOptions, token_ids: bool
) -> Statistics:
    """Refines all rows of ``source`` into ``target``."""
    writer = JsonlWriter(target)
    results = refiner.stream(map(to_request, read_jsonl(source)), options)
    with Progress() as progress, contextlib.closing(results):
        for result in results:
            writer.write(output_row(result, token_ids))
            progress.add(result)
        writer.flush()
    return progress.statistics


def _open(path: str, mode: str) -> BinaryIO:
    standard = {"rb": 0, "ab": 1}[mode]
    return cast(BinaryIO, open(standard if path == "-" else path, mode, BUFFER_BYTES, closefd=path != "-"))


def _is_regular(file: BinaryIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _say(text: str) -> None:
    print(f"engine.refine: {text}", file=sys.stderr, flush=True)


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EngineError | ValueError | OSError) and text else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("engine"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    try:
        options = RefineOptions(**{name: getattr(args, name) for name in _REFINE_OPTIONS})
        source = stack.enter_context(_open(args.input, "rb"))
        # opened for appending: what the file held is lost only when the run starts
        target = stack.enter_context(_open(args.output, "ab"))
        if _is_regular(target) and os.path.sameopenfile(source.fileno(), target.fileno()):
            raise ValueError(f"the output {args.output} is the input: give another file")
        load_options = {name: getattr(args, name) for name in _load_defaults()}
        refiner = stack.enter_context(Refiner.from_pretrained(args.model, **load_options))
    except Exception as error:  # checkpoints and the libraries that read them fail in many ways of their own
        _say(f"error: {_explain(error)}")
        return EXIT_USAGE
    if args.output != "-" and _is_regular(target):
        target.truncate(0)
    statistics = refine_file(refiner, source, target, options, args.token_ids)
    return EXIT_ERROR_ROWS if statistics.errors else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        with _logs_on_stderr(), contextlib.ExitStack() as stack:
            return _run(args, stack)
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        _say(f"error: {_explain(error)}")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
