"""What all tests share."""

import os
from collections.abc import Iterator

# Idle OpenMP threads sleep: with other processes on the same cores, spinning makes small operations take milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils import deterministic

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", type=int, help="run this many tests of every file, spread over it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    few = config.getoption("--few")
    if few is None:
        return
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    items[:] = [mine[i * len(mine) // few] for mine in files.values() for i in range(few) if few < len(mine)] + [
        item for mine in files.values() if few >= len(mine) for item in mine
    ]


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Tensors from torch.empty and its relatives hold NaN (integers: the largest one) instead of what lay there."""
    fill, before = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
