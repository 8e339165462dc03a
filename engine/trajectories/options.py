"""Options and help of the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

from engine.job.command import positive, subcommands

_EPILOG = """\
row of a trajectory file (JSON lines):
  {"prompt_id": .., "prompt": .., "source"?: .., "responses": [{"model": .., "text": .., "reward"?: number or null}, ..]}
  messages beside prompt: the chat, where it is more than one user's turn. truncated beside text: the answer was cut.
  Files that score writes also have index (number of the row) and error (null, or why the row is not usable).
repeats:     prompts that are the same but for white space are kept once, with the responses of all; identical responses to
             a prompt are kept once, the first, with the first reward among them.
ties, gaps:  a response without a reward, or without text, is not trained on; the others are sorted by reward, those of equal
             reward stay in the order of the file, and the last of the best is the target. A tie costs no draft.
bad rows:    are told with file and row and cost only themselves: build lists them in OUTPUT.errors, score makes them
             error rows, inspect shows them.
resume:      the same command again goes on where the last one ended, however that was. Other inputs, models or options are
             refused (a record lies beside the output). --retry-errors asks again for what failed, --overwrite starts anew.
exit status: 0 all done, 3 some rows or answers have errors, 2 wrong option or file, 1 failed on the way, 130 Ctrl-C, 143
             SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return subcommands(
        "python -m engine.trajectories",
        "Collect, score and look at responses to train a refiner on.",
        _EPILOG,
        {
            "build": ("prompts x models -> responses", _add_build),
            "score": ("responses -> rewards", _add_score),
            "inspect": ("tables of rewards, length bias, ties, gaps", _add_inspect),
        },
    )


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text}")
    return value


def _several(
    group: argparse._ArgumentGroup, name: str, metavar: str, text: str, kind: Callable[[str], object] = str
) -> None:
    group.add_argument(f"--{name}", action="append", default=[], type=kind, metavar=metavar, help=text)


def _add_build(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    text = (
        "rows of prompt, instruction or messages; AlpacaEval's model outputs, UltraFeedback (completions, pairs, or SimPO's "
        "scored samples), HH-RLHF and trajectory files as they are, with the responses they hold (.jsonl, .json, either "
        "gzipped, .parquet)"
    )
    group.add_argument("--prompts", required=True, nargs="+", metavar="FILE", help=text)
    text = "existing responses to these prompts, in the same formats; those to other prompts are left out"
    group.add_argument("--responses", nargs="+", default=[], metavar="FILE", help=text)
    text = "trajectories; beside it lie the models' answers (.responses, what a run is resumed from) and .errors"
    group.add_argument("--output", required=True, metavar="FILE", help=text)
    group.add_argument("--sample", type=positive, metavar="N", help="take N of the prompts, drawn by --seed")
    text = "of pairs without scores: reward 1 for chosen, 0 for rejected (default: none)"
    group.add_argument("--pair-rewards", action="store_true", help=text)
    _add_resume(group)
    group = parser.add_argument_group("models at OpenAI-compatible endpoints")
    _several(group, "endpoint", "URL", "such as http://host:8000/v1; once for all of --model, or once for each")
    _several(group, "model", "NAME", "may be repeated; prompts that have a response of that name are not asked again")
    group.add_argument("--concurrency", type=positive, default=8, metavar="N", help="requests at once (default: 8)")
    text = "environment variable that holds the key"
    group.add_argument("--api-key-env", metavar="VAR", help=text)
    text = "without a sign of life from the endpoint (default: 300)"
    group.add_argument("--timeout", type=_seconds, default=300.0, metavar="SECONDS", help=text)
    text = "attempts after a first that failed by 408, 425, 429, 5xx, a timeout or a cut connection (default: 6)"
    group.add_argument("--retries", type=int, choices=range(101), default=6, metavar="N", help=text)
    _several(
        group, "price-in", "PRICE", "of a million tokens of prompts, once for all of --model or once for each", _price
    )
    _several(group, "price-out", "PRICE", "of a million tokens of answers", _price)
    group = parser.add_argument_group("local models")
    _several(group, "checkpoint", "PATH", "folder or hub id; the last part of it names the model; may be repeated")
    _add_device(group)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=positive, default=1024, metavar="N", help="longest answer (default: 1024)")
    group.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    text = "of --sample, and with prompt and model of each request (default: 0)"
    group.add_argument("--seed", type=int, default=0, help=text)


def _add_resume(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--overwrite", action="store_true", help="start anew")
    group.add_argument("--retry-errors", action="store_true", help="do what failed again")


def _add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    names = ("float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=names, default="float32", help="of the weights (default: float32)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")


def _add_score(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--input", required=True, metavar="FILE", help="trajectories")
    group.add_argument("--output", required=True, metavar="FILE", help="the same with rewards, a row for every row")
    group.add_argument("--again", action="store_true", help="also score responses that have a reward")
    _add_resume(group)
    group = parser.add_argument_group("scorer (one of these)")
    scorer = group.add_mutually_exclusive_group(required=True)
    text = "sequence classification model, folder or hub id; ArmoRM's kind needs --trust-remote-code"
    scorer.add_argument("--reward-model", metavar="PATH", help=text)
    text = "rows of prompt_id or prompt, model or text, and reward; or trajectories with rewards"
    scorer.add_argument("--rewards", metavar="FILE", help=text)
    text = "Python function of a prompt and a list of texts that returns one number, or None, for each"
    scorer.add_argument("--callable", metavar="MODULE:NAME", help=text)
    group = parser.add_argument_group("reward model")
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="texts at once (default: 8)")
    text = "longer texts get no reward (default: the model's positions)"
    group.add_argument("--max-length", type=positive, metavar="N", help=text)
    _add_device(group)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="trajectories")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw all of it (needs matplotlib)")
