"""A run that was killed, interrupted or broken while saving ends as one that was not: weights, optimiser, log, samples."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.training import trainer as trainer_module
from engine.training.checkpoint import checkpoints, published
from tests.engine.training.runs import assert_same, log_of, optimizer_state, run, small_run, start, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(small_run(folder)) == 0
    return folder


def again(undisturbed: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The same run into another folder."""
    return small_run(undisturbed, output=str(output), **changes)


def judged_by(checkpoint: Path) -> list[float]:
    """The losses that decide whether the next one explodes."""
    losses: list[float] = json.loads((checkpoint / "watch.json").read_text())
    return losses


def assert_equal_runs(a: Path, b: Path, *, log: bool = True) -> None:
    assert_same(weights(a / "model"), weights(b / "model"))
    assert_same(optimizer_state(a / "checkpoint-9"), optimizer_state(b / "checkpoint-9"))
    assert judged_by(a / "checkpoint-9") == judged_by(b / "checkpoint-9")
    if log:
        assert log_of(a) == log_of(b)
        assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def test_the_run_is_worth_comparing(undisturbed: Path) -> None:
    output, base = undisturbed / "run", undisturbed / "base"
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(output / "model").values(), weights(base).values(), strict=True)
    )
    assert [line["step"] for line in log_of(output) if "loss" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in log_of(output) if "eval_ar" in line] == [4, 8, 9]
    assert [path.name for path in checkpoints(output)] == ["checkpoint-8", "checkpoint-9"]
    assert_same(weights(output / "checkpoint-9"), weights(output / "model"))
    assert len(judged_by(output / "checkpoint-9")) == 9


def test_two_runs_are_equal_and_another_seed_is_not(undisturbed: Path, tmp_path: Path) -> None:
    assert run(again(undisturbed, tmp_path / "run")) == 0
    assert_equal_runs(undisturbed / "run", tmp_path / "run")
    assert run(again(undisturbed, tmp_path / "other", seed=1)) == 0
    assert log_of(tmp_path / "other") != log_of(tmp_path / "run")


KILLED_WHILE_SAVING = """
import os, signal, sys
from engine import train
from engine.training import trainer

inner = trainer.RefinerTrainer._save_rng_state

def killed(self, folder):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    inner(self, folder)

trainer.RefinerTrainer._save_rng_state = killed
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_kill(undisturbed: Path, tmp_path: Path) -> None:
    """By a signal that nothing can catch, with the third checkpoint half written."""
    output = tmp_path / "run"
    process = start(again(undisturbed, output), code=KILLED_WHILE_SAVING)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert (output / ".partial-checkpoint-6" / "model.safetensors").exists()
    assert not (output / "model").exists()
    assert run(again(undisturbed, output)) == 0
    assert_equal_runs(undisturbed / "run", output)


@pytest.mark.parametrize(
    ("where", "call", "last"),
    [("compute_loss", 1, 1), ("compute_loss", 3, 3), ("evaluate", 1, 5), ("compute_loss", 9, 9)],
)
def test_interrupt(
    where: str, call: int, last: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The step it comes in is finished and saved: within an epoch, at its end, the next one while evaluating, the last."""
    inner, calls = getattr(trainer_module.RefinerTrainer, where), []

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RefinerTrainer, where, interrupted)
        assert run(again(undisturbed, tmp_path / "run")) == 130
    assert "interrupted by SIGINT: the same command goes on from here" in capfd.readouterr().err
    assert checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{last}"
    assert run(again(undisturbed, tmp_path / "run")) == 0
    assert_equal_runs(undisturbed / "run", tmp_path / "run", log=last == 9)  # an interrupt adds a line to the log


@pytest.mark.parametrize("broken", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_refiner"])
def test_crash_while_saving(
    broken: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """What is half written is not gone on from."""
    output = tmp_path / "run"
    inner, calls = getattr(trainer_module.RefinerTrainer, broken), []

    def fail(self: Any, folder: Any) -> None:
        calls.append(1)
        if len(calls) < 2 and broken != "save_refiner":
            inner(self, folder)
            return
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RefinerTrainer, broken, fail)
        assert run(again(undisturbed, output)) == 1
    assert "No space left on device" in capfd.readouterr().err
    assert checkpoints(output)[-1].name == ("checkpoint-9" if broken == "save_refiner" else "checkpoint-2")
    assert not (output / "model").exists()
    assert run(again(undisturbed, output)) == 0
    assert_equal_runs(undisturbed / "run", output)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("steps", [4, 6])
def test_a_run_that_lacks_only_its_refiner_takes_no_further_step(
    steps: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, and at the end of one."""
    settings = again(undisturbed, tmp_path / "run", steps=steps, epochs=1.0)

    def fail(*_: Any) -> None:
        raise OSError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RefinerTrainer, "save_refiner", fail)
        assert run(settings) == 1
    before = weights(tmp_path / "run" / f"checkpoint-{steps}")
    assert run(settings) == 0
    assert_same(weights(tmp_path / "run" / "model"), before)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == steps


def test_with_other_ways_to_run(undisturbed: Path, tmp_path: Path) -> None:
    """What does not decide what is learned may change; here the last epoch is computed in micro-batches."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed / "run", output)
    for left in ("checkpoint-9", "model"):
        shutil.rmtree(output / left)
    record = output / "run.job"
    record.write_text(record.read_text().splitlines(keepends=True)[0])  # as before its end
    settings = again(undisturbed, output, micro_batch=2, gradient_checkpointing=True, log_every=1, save_every=100)
    assert run(settings) == 0
    a, b = weights(undisturbed / "run" / "model"), weights(output / "model")
    assert any(not torch.equal(a[name], b[name]) for name in a)  # dropout is drawn in another order
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=4e-3
        )  # one step of lr 1e-3, of either sign, and decay


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(fails: bool) -> None:
        with published(tmp_path / "checkpoint-3") as partial:
            (partial / "a").write_text(str(fails))
            if fails:
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write(fails=True)
    assert checkpoints(tmp_path) == []
    write(fails=False)
    assert (checkpoints(tmp_path)[0] / "a").read_text() == "False"
    with pytest.raises(OSError, match="full"):
        write(fails=True)
    assert (checkpoints(tmp_path)[0] / "a").read_text() == "False"
