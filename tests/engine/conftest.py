"""Fixtures of the engine's tests: each tiny checkpoint is built, and loaded, once per process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine import Refiner
from tests.engine.checkpoints import Oracle, build


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Parallel regions cost these tiny models far more than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Gives the oracle of a name in checkpoints.FAMILIES."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def load(oracle: Callable[[str], Oracle]) -> Iterator[Callable[..., Refiner]]:
    """Gives a Refiner on the checkpoint of that name, shared by all tests that want the same limits."""
    made: dict[tuple[object, ...], Refiner] = {}

    def get(name: str, max_batch_tokens: int = 2048, max_batch_size: int = 64, backend: str = "lean") -> Refiner:
        key = (name, max_batch_tokens, max_batch_size, backend)
        if key not in made:
            made[key] = Refiner.from_pretrained(
                oracle(name).folder, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size,
                kv_cache_tokens=4096, backend=backend,  # type: ignore[arg-type]
            )  # fmt: skip
        return made[key]

    yield get
    for refiner in made.values():
        refiner.check_integrity()
        refiner.close()


@pytest.fixture
def checkpoint(oracle: Callable[[str], Oracle], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a private copy of a checkpoint folder, to be damaged."""

    def copy(name: str) -> Path:
        target = tmp_path / f"{name}-copy"
        target.mkdir()
        for file in oracle(name).folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return copy
