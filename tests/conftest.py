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
