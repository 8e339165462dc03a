"""Two processes under torchrun, on gloo, against one."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.training.runs import assert_same, log_of, run, small_run, start, weights

pytestmark = pytest.mark.slow


def launch(settings: dict[str, Any]) -> str:
    process = start(settings, processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def without_dropout(folder: Path) -> dict[str, Any]:
    """Processes draw dropout for themselves, so that only without it two can equal one."""
    settings = small_run(folder, steps=4, epochs=1.0, save_every=2, log_every=1, eval_every=2)
    config = folder / "base" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    return settings


def assert_close_runs(actual: Path, expected: Path, steps: int, lr: float) -> None:
    """The log to float32's rounding, summed in another order; weights to what AdamW makes of that, far below its steps."""
    for mine, theirs in zip(log_of(actual), log_of(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    a, b = weights(actual / "model"), weights(expected / "model")
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).abs()
        assert float(difference.mean()) < 1e-3 * lr
        assert float(difference.max()) < steps * lr / 5  # where a gradient is all rounding, its sign is


def test_fsdp(tmp_path: Path) -> None:
    """Equal to one process, in micro-batches and with activations computed again; also gone on from a checkpoint, which then
    ends in the same bits; those of the refiner rounded."""
    settings = without_dropout(tmp_path)
    alone, sharded, resumed = tmp_path / "alone", tmp_path / "sharded", tmp_path / "resumed"
    assert run({**settings, "output": str(alone)}) == 0
    settings |= {"micro_batch": 1, "gradient_checkpointing": True}
    launch({**settings, "output": str(sharded), "fsdp": True})
    assert_close_runs(sharded, alone, 4, settings["lr"])
    shutil.copytree(sharded, resumed)
    for left in ("checkpoint-4", "model"):
        shutil.rmtree(resumed / left)
    record = resumed / "run.job"
    record.write_text(record.read_text().splitlines(keepends=True)[0])  # as before its end
    launch({**settings, "output": str(resumed), "fsdp": True, "save_dtype": "bfloat16"})
    assert_same(weights(resumed / "checkpoint-4"), weights(sharded / "checkpoint-4"))
    rounded = {name: weight.bfloat16() for name, weight in weights(sharded / "model").items()}
    assert_same(weights(resumed / "model"), rounded)
    assert log_of(resumed) == log_of(sharded)
    assert (resumed / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


def test_data_parallel(tmp_path: Path) -> None:
    settings = without_dropout(tmp_path)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run({**settings, "output": str(alone)}) == 0
    launch({**settings, "output": str(shared), "micro_batch": 1})
    assert_close_runs(shared, alone, 4, settings["lr"])


def test_a_rank_ends_as_other_processes_do() -> None:
    """But for the interpreter's teardown: its threads finish, what was registered for its end is done, nothing said is lost."""
    code = """
import atexit, threading, time
from engine.train import end_rank

class Late:
    def __del__(self):
        print("torn down", flush=True)

late = Late()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("said")
end_rank(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("said\nthread\nat exit\n", "", 3)
