"""Options of the benchmarks, which of them there are, and what their JSON says about the machine."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.measure import machine
from bench.suite import jacobi, kernels, refinement, training
from bench.suite.case import SIZES, Case, Operation, parse

OPERATIONS: dict[str, Operation] = kernels.OPERATIONS | jacobi.OPERATIONS | training.OPERATIONS | refinement.OPERATIONS
VOLATILE = ("load_before", "date", "command", "commit")
"""What may differ between two runs on one machine."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite")
    group.addoption("--size", choices=SIZES, default="quick", help="which shapes; tiny: a check that everything runs")
    group.addoption("--backwards", action="store_true", help="the last test first")
    group.addoption("--threads", type=int, default=0, help="of PyTorch and the kernels; 0: as they are")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        size = metafunc.config.getoption("size")
        found = [(name, *rest) for name, operation in OPERATIONS.items() for rest in operation.parameters(size)]
        names = ["-".join(each) for each in found]
        metafunc.parametrize(("operation", "shape", "dtype", "implementation"), found, ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("backwards"):
        items.reverse()


class Prepared:
    """The case that was asked for last, its implementations checked against each other; an earlier one is closed before the
    next is built."""

    def __init__(self, size: str) -> None:
        self.size = size
        self.key: tuple[str, str, str] | None = None
        self.case: Case | None = None

    def get(self, operation: str, shape: str, dtype: str) -> Case:
        if self.key != (operation, shape, dtype):
            self.close()
            torch.manual_seed(0)
            self.case = OPERATIONS[operation].build(parse(shape), getattr(torch, dtype))
            self.key = (operation, shape, dtype)
            self.case.check(OPERATIONS[operation].named(self.size))
        assert self.case is not None
        return self.case

    def close(self) -> None:
        if self.case is not None:
            self.case.close()
        self.case = self.key = None


@pytest.fixture(scope="session")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    cases = Prepared(request.config.getoption("size"))
    yield cases
    cases.close()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Only what has to be the same for a comparison, and nothing of the machine's name."""
    return {key: value for key, value in machine().items() if key not in VOLATILE}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    commit = machine()["commit"]
    return {"id": commit and commit.removesuffix("-dirty"), "dirty": bool(commit) and commit.endswith("-dirty")}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["machine"] = machine()
    output_json["size"] = config.getoption("size")
