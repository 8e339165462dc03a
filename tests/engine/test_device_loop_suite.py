"""Tests written for the host's loop, in a process of their own where the device's moves the sequences."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = (
    "test_steps.py",
    "test_sampling.py::test_equals_sequential_sampling[llama]",
    "test_sampling.py::test_the_seed_of_the_options_is_for_requests_without_one",
    "test_async_refiner.py::test_stream_shows_the_answer_sharpen",
    "service/test_chaos.py",
)


@pytest.mark.slow
def test_other_tests_on_the_device_loop() -> None:
    environment = os.environ | {"DIFFPO_LOOP": "device", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of the process above, which may be one of several
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-W", "ignore"]
    command += [str(HERE / test) for test in TESTS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
