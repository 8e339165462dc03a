"""RefineColumns in real Ray Data actors, one of which is killed on the way. Skipped where Ray is not installed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import RefineOptions, Refiner
from engine.columns import RefineColumns

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

OPTIONS = RefineOptions(max_new_tokens=12)
ROWS = 64
BAD = (5, 40)


class KilledOnce(RefineColumns):
    """Ends its process with SIGKILL in the batch that holds row 24, the first time any actor comes to it."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._folder = Path(folder)

    def __call__(self, batch: Any) -> Any:
        out = super().__call__(batch)
        (self._folder / f"pid-{os.getpid()}").touch()
        if 24 in batch["key"]:
            try:
                (self._folder / "killed").touch(exist_ok=False)
            except FileExistsError:
                return out
            os.kill(os.getpid(), signal.SIGKILL)
        return out


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_two_actors_one_killed(cluster: None, tmp_path: Path) -> None:
    rows = [{"key": i, "prompt": f"What is {i} plus one?", "draft": f"It is {i}"} for i in range(ROWS)]
    for i in BAD:
        rows[i]["prompt"] = ""
    out = (
        ray.data.from_items(rows, override_num_blocks=8)
        .map_batches(
            KilledOnce,
            fn_constructor_args=[str(tmp_path)],
            fn_constructor_kwargs={"options": OPTIONS},
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=8,
        )
        .take_all()
    )
    with Refiner.from_pretrained() as refiner:
        wanted = refiner.refine([{"prompt": row["prompt"], "draft": row["draft"]} for row in rows], OPTIONS)
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.glob("pid-*"))) == 3  # two, and the one that took the dead one's place
    out.sort(key=lambda row: row["key"])
    assert [row["key"] for row in out] == list(range(ROWS))
    assert [row["text"] for row in out] == [result.text for result in wanted]
    assert [i for i, row in enumerate(out) if row["error"]] == list(BAD)
    print(f"{len(out)} rows, errors: {sorted({row['error'] for row in out if row['error']})}")
