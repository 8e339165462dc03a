"""The command line: ``build``, ``score`` and ``inspect``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.job.command import EXIT_ERROR_ROWS, EXIT_OK, check_output, exit_status
from engine.job.interrupt import Signals
from engine.job.output import Refused
from engine.job.source import open_regular
from engine.trajectories.build import Build, Client, Model
from engine.trajectories.endpoint import Sampling, completions_url
from engine.trajectories.options import build_parser
from engine.trajectories.schema import read_rows
from engine.trajectories.score import SCORER_DEFAULTS, Score, choose_scorer
from engine.trajectories.summary import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)

    def say(text: str) -> None:
        print(f"engine.trajectories: {text}", file=sys.stderr, flush=True)

    command: Callable[..., int] = {"build": _build, "score": _score, "inspect": _inspect}[args.command]
    return exit_status(lambda signals: command(args, say, signals), say)


def _output(output: str, sources: Sequence[str]) -> Path:
    path = Path(output)
    for source in sources:
        check_output(path, source)
    if path.suffix.lower() == ".json":
        raise ValueError(f"the output is JSON lines, got the name {path.name!r}: use .jsonl")
    return path


def _build(args: argparse.Namespace, say: Callable[[str], None], signals: Signals) -> int:
    output = _output(args.output, [*args.prompts, *args.responses])
    load_options = {name: getattr(args, name) for name in ("dtype", "device", "trust_remote_code")}
    with signals.at_once():
        job = Build(
            output=output,
            prompts=[open_regular(path) for path in args.prompts],
            responses=[open_regular(path) for path in args.responses],
            models=_models(args),
            sampling=Sampling(max_tokens=args.max_tokens, temperature=args.temperature),
            seed=args.seed,
            sample=args.sample,
            pair_rewards=args.pair_rewards,
            client=Client(
                key=_key(args.api_key_env), concurrency=args.concurrency, timeout=args.timeout, retries=args.retries
            ),
            load_options=load_options,
            overwrite=args.overwrite,
            retry_errors=args.retry_errors,
        )
    return EXIT_ERROR_ROWS if job.run(say, signals.check) else EXIT_OK


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"--api-key-env {variable}: there is no such environment variable, or it is empty")
    return key


def _models(args: argparse.Namespace) -> list[Model]:
    def each(option: str, values: list[object], default: object) -> list[object]:
        if len(values) not in (0, 1, len(args.model)):
            raise ValueError(f"{option} is given {len(values)} times: once for all of --model, or once for each")
        return (values or [default]) * (len(args.model) if len(values) < 2 else 1)

    if args.model and not args.endpoint:
        raise ValueError("--model needs --endpoint; a local checkpoint is given with --checkpoint")
    if args.endpoint and not args.model:
        raise ValueError("--endpoint needs the --model to ask for")
    urls = [completions_url(str(url)) for url in each("--endpoint", args.endpoint, "")] if args.model else []
    prices = [each(f"--price-{way}", values, 0.0) for way, values in (("in", args.price_in), ("out", args.price_out))]
    models = [
        Model(name=name, url=url, price_in=price_in, price_out=price_out)
        for name, url, price_in, price_out in zip(args.model, urls, *prices, strict=True)
    ]
    if args.checkpoint:
        from engine.weights import resolve_checkpoint

        models += [Model(name=Path(path).name, checkpoint=resolve_checkpoint(path)) for path in args.checkpoint]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"every model needs a name of its own, got {names}")
    return models


def _score(args: argparse.Namespace, say: Callable[[str], None], signals: Signals) -> int:
    output = _output(args.output, [args.input, *([args.rewards] if args.rewards else [])])
    with signals.at_once():
        source = open_regular(args.input)
        options = {name: getattr(args, name) for name in SCORER_DEFAULTS}
        identity, load = choose_scorer(args.reward_model, args.rewards, args.callable, options, say)
    job = Score(
        source=source,
        output=output,
        scorer=identity,
        again=args.again,
        overwrite=args.overwrite,
        retry_errors=args.retry_errors,
    )
    return EXIT_ERROR_ROWS if job.run(load, say, signals.check) else EXIT_OK


def _inspect(args: argparse.Namespace, say: Callable[[str], None], signals: Signals) -> int:
    with signals.at_once():
        summary = Summary.of(read_rows(args.file))
        if args.plot is not None:
            from engine.trajectories.plot import plot

            if args.plot.exists() and args.plot.samefile(args.file):
                raise Refused(f"--plot {args.plot} would overwrite the trajectories: give another file")
            plot(summary, args.plot)
        print(json.dumps(summary.figures(), indent=2) if args.json else summary.text(), flush=True)
    return EXIT_ERROR_ROWS if summary.bad else EXIT_OK
