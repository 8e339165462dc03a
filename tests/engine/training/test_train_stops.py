"""Where a run stops by itself: at a loss that is none, at one that explodes, without memory; and that it goes on."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.training import trainer as trainer_module
from engine.training.checkpoint import checkpoints
from engine.training.data import EpochBatches
from engine.training.watch import Watch
from tests.engine.training.runs import assert_same, make_model, run, small_run, weights


def test_nan_stops_before_the_weights(tmp_path: Path, capfd: Any) -> None:
    """A token whose embedding is NaN is in one row: that row is named, and no weight is ever touched by it."""
    settings = small_run(tmp_path, held_out=0, micro_batch=1, save_every=1, keep_checkpoints=9)
    base, data = Path(settings["model"]), Path(settings["data"])
    make_model(base, tied=False)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    order = list(EpochBatches(len(rows), 4, 4, seed=0, process=0, processes=1))
    victim = order[1][2]
    for row in [rows[victim]]:
        row["prompt"] = "Zebra"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(base)
    others = {token for row in rows if row["prompt"] != "Zebra" for token in tokenizer(json.dumps(row))["input_ids"]}
    own = [token for token in tokenizer("Zebra", add_special_tokens=False)["input_ids"] if token not in others]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[own] = math.nan
    model.save_pretrained(base)
    assert run(settings) == 1
    said = capfd.readouterr().err
    assert (
        "step 2 of 9 was not taken: ar is nan (ar nan, consistency nan, omega 1000, gradient norm nan, lr 0.00" in said
    )
    assert (
        f"trajectories in it: 'row{victim}'; the last checkpoint is {settings['output']}/checkpoint-1: look at" in said
    )
    assert [path.name for path in checkpoints(Path(settings["output"]))] == ["checkpoint-1"]
    saved = weights(Path(settings["output"], "checkpoint-1"))
    embedding = saved.pop("model.embed_tokens.weight")
    assert int(embedding.isnan().any(1).sum()) == len(own)
    assert all(bool(torch.isfinite(weight).all()) for weight in saved.values())
    assert run(settings) == 1  # and again, from the checkpoint
    assert "step 2 of 9 was not taken" in capfd.readouterr().err


def test_an_explosion_stops_the_run_and_the_same_command_goes_on(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 23 of 24, for once; what is gone on from ends as if it had not been."""
    settings = small_run(tmp_path, epochs=8, save_every=11, eval_every=99)
    whole = {**settings, "output": str(tmp_path / "whole")}
    assert run(whole) == 0
    inner, calls = trainer_module.train_step, []

    def explode(*args: Any, **options: Any) -> Any:
        calls.append(1)
        out = inner(*args, **options)
        return dataclasses.replace(out, consistency=out.consistency * 1e4) if len(calls) == 23 else out

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "train_step", explode)
        assert run(settings) == 1
    said = capfd.readouterr().err
    assert "step 23 of 24 was not taken: the loss is" in said
    assert "more than explosion=50 times the usual" in said
    assert "the last checkpoint is" in said
    output = Path(settings["output"])
    assert [path.name for path in checkpoints(output)] == ["checkpoint-11", "checkpoint-22"]
    assert run(settings) == 0
    assert_same(weights(output / "model"), weights(tmp_path / "whole" / "model"))


def test_out_of_memory_says_what_to_lower(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_run(tmp_path)
    inner, calls = trainer_module.train_step, []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        return inner(*args, **options)

    monkeypatch.setattr(trainer_module, "train_step", fail)
    assert run(settings) == 1
    said = "CUDA out of memory. Tried to allocate 2 GiB.; the same command goes on with a smaller micro_batch"
    assert said in capfd.readouterr().err
    assert run({**settings, "micro_batch": 2}) == 0


def test_an_explosion_is_told_by_the_losses_before() -> None:
    watch = Watch(omega=10.0, explosion=5.0)
    assert [watch.problem(1.0, 9.0 if step == 7 else 0.1, 1.0) for step in range(20)] == [
        None
    ] * 20  # too early to judge
    assert watch.problem(1.0, 0.89, 1.0) is None
    said = "the loss is 10.1, more than explosion=5 times the usual 2"
    assert watch.problem(1.0, 0.91, 1.0) == said
    assert watch.problem(1.0, 0.91, 1.0) == said  # it is not among the usual ones now
    never = Watch(omega=1.0, explosion=0.0)
    assert [never.problem(10.0**step, 0.0, 1.0) for step in range(30)] == [None] * 30


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(("place", "name"), list(enumerate(("ar", "consistency", "the gradient's norm"))))
def test_what_is_not_finite_is_named(place: int, name: str, wrong: float) -> None:
    values = [1.0, 1.0, 1.0]
    values[place] = wrong
    assert Watch(omega=10.0, explosion=0.0).problem(*values) == f"{name} is {wrong}"
