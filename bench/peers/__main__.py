"""Reward against latency of DiffPO and its peers, on one pair of models.

python -m bench.peers --base MODEL --refiner MODEL --reward-model MODEL --data alpaca_responses.jsonl

Same code, dtype, threads, prompts, EOS rule and limit of tokens for all; where a method needs a draft, the base model's time to
write it counts. The prompts are held-out ones of ``bench.reproduction``. Writes bench/results/peers.json, from which
``bench.peers.table`` and ``bench.peers.plot`` make the page and the picture.
"""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import RESULTS, machine
from bench.peers.answer import Peer
from bench.peers.catalogue import ARGS_CANDIDATES, BEST_OF, Settings, load, peers
from bench.peers.engine_peers import BaseModel
from bench.peers.fluency import of_real_answers
from bench.peers.measure import measure
from bench.reproduction.data import HELD_OUT, Fields
from bench.reproduction.measure import dump
from bench.reproduction.paper.measure import Fluency
from engine import Request

WARM_UP_TOKENS = 2


def read_rows(path: Path, count: int, *, development: bool = False) -> list[Fields]:
    """The first of the held-out rows, or of as many before them."""
    rows = path.read_text(encoding="utf-8").splitlines()
    rows = rows[-2 * HELD_OUT : -HELD_OUT] if development else rows[-HELD_OUT:]
    return [json.loads(row) for row in rows[:count]]


def prompts_of(rows: Sequence[Fields]) -> list[Request]:
    return [Request(prompt=row["prompt"], seed=number) for number, row in enumerate(rows)]


def batch_plan(text: str, prompts: int) -> dict[int, int]:
    """From "1:8,8:16,32" how many prompts each batch size gets; those without a number all of them."""
    plan = {}
    for part in text.split(","):
        size, _, count = part.partition(":")
        plan[int(size)] = min(int(count or prompts), prompts)
    return plan


def chosen(made: dict[str, Peer], only: str) -> dict[str, Peer]:
    return {name: peer for name, peer in made.items() if not only or re.fullmatch(only, name)}


def limits(given: list[str], names: list[str]) -> dict[str, int]:
    """Most prompts of every peer that has a limit, from "BEGINNING OF ITS NAME=N"."""
    pairs = [(start, int(count)) for start, _, count in (text.rpartition("=") for text in given)]
    return {name: count for start, count in pairs for name in names if name.startswith(start)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="checkpoint folder of the model that writes drafts")
    parser.add_argument("--refiner", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--corrector", type=Path, help="checkpoint folder of a refiner that reads the draft in its prompt"
    )
    parser.add_argument("--reward-model", type=Path, required=True, help="sequence classification model with one label")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with prompt; the last ones are held out")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, each with :PROMPTS if it gets fewer")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no further batch begins after so many")
    parser.add_argument("--temperature", type=float, default=0.7, help="of best-of-n")
    parser.add_argument("--args-weights", default="1.5", help="of the reward in ARGS")
    parser.add_argument(
        "--args-candidates", type=int, default=ARGS_CANDIDATES, help="tokens that ARGS tries at each step"
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=N",
        help="peers whose name begins so get N prompts at most",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="peers whose whole name matches")
    parser.add_argument(
        "--development", action="store_true", help="prompts before the held-out ones, to choose settings on"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", help="what else is to be known of the run")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    settings = Settings(
        tokens=args.tokens,
        temperature=args.temperature,
        weights=tuple(float(weight) for weight in args.args_weights.split(",") if weight),
        candidates=args.args_candidates,
    )
    rows = read_rows(args.data, args.prompts, development=args.development)
    requests = prompts_of(rows)
    about: dict[str, Any] = {"machine": machine(), **({"note": args.note} if args.note else {})}
    about["settings"] = dataclasses.asdict(settings) | {
        "models": {
            "base": args.base.name, "refiner": args.refiner.name, "reward_model": args.reward_model.name,
            "corrector": args.corrector.name if args.corrector else None,
        },
        "prompts": len(requests), "development": args.development, "rounds": args.rounds, "best_of": BEST_OF,
        "dtype": "float32",
    }  # fmt: skip
    fluency = Fluency(args.base)
    about["real"] = of_real_answers(rows, fluency, fluency.tokenizer, args.tokens)

    def record(results: dict[str, Any]) -> None:
        about["machine"]["load_after"] = os.getloadavg()[0]
        args.out.write_text(dump(about | results))
        print({batch: len(loads) for batch, loads in results["loads"].items()}, flush=True)

    with load(args.base, args.refiner, args.corrector, args.reward_model) as models:
        few = chosen(peers(models, dataclasses.replace(settings, tokens=WARM_UP_TOKENS)), args.only)
        drafts = BaseModel(models.base.engine, WARM_UP_TOKENS).answer(requests[:1])
        for peer in few.values():
            peer.answer(requests[:1], drafts)
        made = chosen(peers(models, settings), args.only)
        measure(
            BaseModel(models.base.engine, args.tokens), made, requests, models.base.scorer,
            batches=batch_plan(args.batch, len(requests)), rounds=args.rounds, minutes=args.minutes, record=record,
            limits=limits(args.limit, list(made)), fluency=fluency,
        )  # fmt: skip


if __name__ == "__main__":
    main()
