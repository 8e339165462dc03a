"""Serves a refiner over HTTP: ``python -m engine.serve --base-url http://127.0.0.1:8000/v1``.

OpenAI's chat completions in front of a base API that speaks them too, /v1/refine for drafts of your own, and a page to try it
on. The work is done in ``engine.server``, which can be mounted in other applications; needs ``diffpo-engine[serve]``.
"""

import argparse
import asyncio
import dataclasses
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.job.command import EXIT_OK, EXIT_USAGE, explain
from engine.options import RefineOptions
from engine.refine import LOAD_DEFAULTS, add_model_options, add_option, add_refine_options

if TYPE_CHECKING:
    from engine.server import Settings

QUEUE_DEFAULTS = {"max_queue_requests": 1024, "max_queue_tokens": 262_144}
"""Those of AsyncRefiner, without importing it."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_EPILOG = """\
paths:    /  a page to try it on    /v1/chat/completions  /v1/refine  /v1/models  /health  /metrics  /openapi.json
access:   on the loopback interface nobody needs a token, and only loopback names are answered to; elsewhere the environment
          variable DIFFPO_TOKEN (or --token-env) must hold one, which clients bring as Authorization: Bearer ...
drafts:   come from --base-url, whose key is read from OPENAI_API_KEY (or --base-key-env). Without it the refiner answers chats
          alone. A chat's answer is refined while its draft still arrives, in blocks of --stream-block tokens (with --steps: of
          --block-size); with --condition the draft is part of the prompt, so refinement waits for all of it.
signals:  SIGTERM or Ctrl-C lets what is in progress finish for --grace seconds; a second Ctrl-C ends it at once.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.serve",
        description="Serve a refiner over HTTP.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_server_options(parser.add_argument_group("server"))
    _add_base_options(parser.add_argument_group("base API"))
    add_refine_options(parser.add_argument_group("refinement, where a request does not say otherwise"))
    add_model_options(parser.add_argument_group("model"))
    return parser


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    defaults = {
        "max_answer": 1024, "max_in_progress": 256, **QUEUE_DEFAULTS, "max_body_bytes": 1 << 20, "timeout": 300.0,
    }  # fmt: skip
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8321, help="0: any that is free (default: %(default)s)")
    text = "environment variable with the bearer token that clients must bring (default: %(default)s)"
    group.add_argument("--token-env", default="DIFFPO_TOKEN", metavar="NAME", help=text)
    text = "listen beyond the loopback interface without a token"
    group.add_argument("--allow-anyone", action="store_true", help=text)
    add_option(group, "max-answer", defaults, "longest answer in tokens that a request may ask for")
    add_option(group, "max-in-progress", defaults, "requests worked on at once; more are told to come again")
    add_option(group, "max-queue-requests", defaults, "refinements that may wait for a place in the batch")
    add_option(group, "max-queue-tokens", defaults, "their tokens, prompts and longest answers")
    add_option(group, "max-body-bytes", defaults, "longest body of a request")
    add_option(group, "timeout", defaults, "seconds that a request may take, its draft included")
    text = "seconds for which what is in progress may go on after SIGTERM (default: %(default)s)"
    group.add_argument("--grace", type=int, default=30, metavar="SECONDS", help=text)
    group.add_argument("--access-log", action="store_true", help="log every request")


def _add_base_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", metavar="URL", help="OpenAI-compatible API that writes the drafts of chats")
    group.add_argument("--base-model", metavar="NAME", help="its only model that may be asked for (default: any)")
    text = "environment variable with its key (default: %(default)s)"
    group.add_argument("--base-key-env", default="OPENAI_API_KEY", metavar="NAME", help=text)
    text = "seconds for which it may say nothing (default: %(default)s)"
    group.add_argument("--base-timeout", type=float, default=60.0, metavar="SECONDS", help=text)
    text = "do not ask it for token counts: for servers that refuse stream_options"
    group.add_argument("--no-base-usage", dest="base_usage", action="store_false", help=text)
    text = "answer tokens refined together while the draft still arrives (default: %(default)s)"
    group.add_argument("--stream-block", type=int, default=64, metavar="N", help=text)


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_settings(args: argparse.Namespace) -> "Settings":
    """What the command line and the environment ask for. Raises ValueError."""
    try:
        from engine.server import Settings
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'diffpo-engine[serve]'") from None
    token = os.environ.get(args.token_env) or None
    local = is_loopback(args.host)
    if not local and token is None and not args.allow_anyone:
        raise ValueError(
            f"--host {args.host} can be reached from other machines: put a token into {args.token_env}, or say --allow-anyone"
        )
    names = [field.name for field in dataclasses.fields(RefineOptions) if field.name != "concurrency"]
    return Settings(
        options=RefineOptions(**{name: getattr(args, name) for name in names}),
        model_name=Path(args.model).name if args.model else "refiner",
        base_url=args.base_url,
        base_model=args.base_model,
        base_key=os.environ.get(args.base_key_env) or None if args.base_url else None,
        base_usage=args.base_usage,
        base_timeout=args.base_timeout,
        token=token,
        allowed_hosts=LOOPBACK_NAMES | {args.host.lower()} if local and token is None else None,
        max_body_bytes=args.max_body_bytes,
        max_new_tokens=args.max_answer,
        max_in_progress=args.max_in_progress,
        timeout=args.timeout,
        stream_block=args.stream_block,
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not listening yet. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


async def serve(args: argparse.Namespace, settings: "Settings", bound: socket.socket) -> None:
    """Loads the refiner and serves until a signal. Raises what loading raises."""
    import uvicorn
    from prometheus_client import CollectorRegistry

    from engine.async_refiner import AsyncRefiner
    from engine.server import create_app
    from engine.server.protocol import Protocol
    from engine.service.prometheus import PrometheusMetrics

    loading: dict[str, Any] = {
        name: getattr(args, name) for name in (*LOAD_DEFAULTS, *QUEUE_DEFAULTS, "trust_remote_code")
    }
    registry = CollectorRegistry()
    refiner = AsyncRefiner.from_pretrained(args.model, metrics=PrometheusMetrics(registry), **loading)
    app = create_app(refiner, settings, registry=registry)

    class Server(uvicorn.Server):
        """Closes the refiner before uvicorn raises the signal again that ended it."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = bound.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.server.drain()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            await refiner.close(drain=False)  # of its requests only those are left whose time is over

    config = uvicorn.Config(
        app, http=Protocol, ws="none", proxy_headers=False, server_header=False, lifespan="on",
        access_log=args.access_log, log_level="info" if args.access_log else "warning",
        timeout_graceful_shutdown=args.grace,
    )  # fmt: skip
    try:
        await Server(config).serve([bound])
    finally:
        await refiner.close(drain=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 for what could not be started."""
    args = build_parser().parse_args(argv)
    try:
        settings = build_settings(args)
        with bind(args.host, args.port) as bound:
            asyncio.run(serve(args, settings, bound))
    except KeyboardInterrupt:
        return EXIT_OK
    except (ValueError, OSError, EngineError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
