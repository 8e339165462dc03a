"""One refiner for all tests of the server in a process; after each of them it must be idle and whole."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engine import AsyncRefiner, RefineOptions
from engine.server import Settings, create_app
from engine.service.prometheus import PrometheusMetrics
from tests.engine.server.servers import Base, idle, running, wait_until

REGISTRY = CollectorRegistry()


@pytest.fixture(scope="session")
def shared_refiner() -> Iterator[AsyncRefiner]:
    refiner = AsyncRefiner.from_pretrained(kv_cache_tokens=4096, metrics=PrometheusMetrics(REGISTRY))
    yield refiner
    asyncio.run(refiner.close())


@pytest.fixture
def refiner(shared_refiner: AsyncRefiner) -> Iterator[AsyncRefiner]:
    """The refiner that ships."""
    yield shared_refiner
    wait_until(lambda: idle(shared_refiner))
    shared_refiner._refiner.check_integrity()


@pytest.fixture
def base() -> Iterator[Base]:
    base = Base()
    yield base
    base.release.set()


@pytest.fixture
def start(refiner: AsyncRefiner, base: Base) -> Iterator[Callable[..., str]]:
    """Starts the application, behind the scripted base API unless ``base_url`` is given, and gives its URL."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> str:
            if "base_url" not in settings:
                settings["base_url"] = stack.enter_context(running(base.app())) + "/v1"
            settings.setdefault("options", RefineOptions(max_new_tokens=40))
            return stack.enter_context(running(create_app(refiner, Settings(**settings), registry=REGISTRY)))

        yield begin
        base.release.set()
