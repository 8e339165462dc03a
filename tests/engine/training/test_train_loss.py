"""The trainer's gradients and evaluation against the loss by its definition, in float64 and from plain forward passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine.jacobi import Vocabulary
from engine.training import Trajectory, TrajectoryCollator
from engine.training.samples import STEPS, refine_samples
from tests.engine.checkpoints import PAD
from tests.engine.training.references import (
    EOS,
    Results,
    assert_close,
    chosen_by,
    double,
    fitted,
    plain_loss,
    trajectories,
)
from tests.engine.training.runs import Gradients, trainer_on

Family = Callable[..., PreTrainedModel]


def first_step(model: PreTrainedModel, given: list[Trajectory], folder: Path, **changes: Any) -> Results:
    """Loss and gradients of one optimiser step over all of them."""
    trainer = trainer_on(model, given, folder, **changes)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    line = trainer.state.log_history[0]
    terms = [torch.tensor(line[name], dtype=torch.float64) for name in ("loss", "ar", "consistency")]
    collator = trainer.collator
    collator.set_epoch(0)
    batch = collator(given)
    return Results(*terms, kept.steps[0], int(batch["label_count"]), int(batch["pair_count"]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"micro_batch": 4}),
        ("llama", {"micro_batch": 2}),
        ("llama", {"micro_batch": 1}),
        ("llama", {"micro_batch": 2, "max_tokens": 200}),
        ("gemma2", {"micro_batch": 2, "drafts": 3}),
        ("qwen2-some-windows", {"micro_batch": 1, "max_tokens": 200, "kl_normalization": "vocabulary"}),
        ("qwen3-tied", {"micro_batch": 2, "window": 5, "omega": 7.0}),
        ("mistral-window", {"micro_batch": 2, "omega": 0.0}),
    ],
)
def test_a_step_is_one_batch_however_it_is_split(
    name: str, changes: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    given = trajectories(seed=4, count=4)
    omega, vocabulary_mean = changes.get("omega", 1e3), "kl_normalization" in changes
    actual = first_step(family(name), given, tmp_path, **changes)
    drafts = changes.get("drafts", 1) if omega else 0
    window = changes.get("window", 256)
    chosen = chosen_by(TrajectoryCollator(PAD, drafts=drafts, window=window), given)
    exact, plain = (
        plain_loss(model, chosen, omega=omega, window=window, vocabulary_mean=vocabulary_mean)
        for model in (double(family(name)), family(name))
    )
    assert (actual.pair_count > 0) == (omega > 0)
    assert_close(actual, exact, plain)


def test_each_epoch_has_its_own_order_and_drafts(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = trajectories(seed=4, count=5)
    trainer = trainer_on(family("llama"), given, tmp_path, batch_size=2, steps=6)
    seen, inner = [], trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda m, i, **k: (seen.append(i), inner(m, i, **k))[1])
    trainer.train()
    places = [inputs["rows"].tolist() for inputs in seen]
    collator, drafts = TrajectoryCollator(PAD, drafts=1), set()
    for step, (rows, inputs) in enumerate(zip(places, seen, strict=True)):
        collator.set_epoch(step // 2)
        assert torch.equal(inputs["batch"]["input_ids"], collator([given[row] for row in rows])["input_ids"])
        drafts |= {(row, *collator.draw(given[row].id, 3)) for row in rows}
    assert len({(*places[first], *places[first + 1]) for first in (0, 2, 4)}) == 3
    assert len(drafts) > len({row for row, _ in drafts})


def test_evaluation_is_the_loss_over_all(family: Family, tmp_path: Path) -> None:
    """In batches of 2 of 5, the last of them smaller; both terms apart, drafts of the first epoch."""
    model, held = family("llama"), trajectories(seed=9, count=5)
    trainer = trainer_on(model, trajectories(1), tmp_path, evaluation=held, omega=3.0, drafts=2, batch_size=2)
    trainer.set_epoch(5)
    metrics = trainer.evaluate()
    exact = plain_loss(double(model), chosen_by(TrajectoryCollator(PAD, drafts=2), held), omega=3.0)
    for name in ("ar", "consistency", "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(getattr(exact, name)), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_ar"] == metrics["eval_ar"]


def test_fine_tuning_alone_still_evaluates_drafts(family: Family, tmp_path: Path) -> None:
    held = trajectories(seed=9, count=3)
    trainer = trainer_on(family("llama"), trajectories(1), tmp_path, evaluation=held, omega=0.0)
    exact = plain_loss(double(family("llama")), chosen_by(TrajectoryCollator(PAD, drafts=1), held))
    metrics = trainer.evaluate()
    assert metrics["eval_consistency"] == pytest.approx(float(exact.consistency), rel=1e-5)
    assert metrics["eval_loss"] == metrics["eval_ar"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-some-windows"])
def test_samples_are_plain_jacobi_steps(name: str, family: Family) -> None:
    model, given, window = family(name), trajectories(seed=2, count=3), 14
    refined = refine_samples(model, given, Vocabulary(101, frozenset([EOS]), PAD), window=window)
    for sample, trajectory in zip(refined, given, strict=True):
        prompt, before = list(trajectory.prompt_ids), fitted(trajectory.responses[0], window)
        for step in range(1, max(STEPS) + 1):
            logits = model(input_ids=torch.tensor([prompt + before]), use_cache=False).logits[0]
            after = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            if step in STEPS:
                assert sample.after[step] == (after[: after.index(EOS)] if EOS in after else after)
                assert sample.changed[step] == sum(a != b for a, b in zip(before, after, strict=True))
            before = after


def test_autocast_reaches_the_backbone_and_not_the_loss(family: Family, tmp_path: Path) -> None:
    seen: dict[bool, list[torch.dtype]] = {True: [], False: []}
    for bf16 in (True, False):
        model = family("llama")
        layer: Any = model.get_decoder().layers[0].mlp.up_proj
        layer.register_forward_hook(lambda _m, _i, out, bf16=bf16: seen[bf16].append(out.dtype))
        trainer = trainer_on(model, trajectories(1), tmp_path, evaluation=trajectories(3), bf16=bf16, samples=1)
        losses: list[torch.dtype] = []
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = lambda loss, kept=losses, inner=backward: (kept.append(loss.dtype), inner(loss))
        trainer.train()  # with an evaluation at its end
        assert losses == [torch.float32]
        assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert len(seen[True]) == len(seen[False]) == 1 + 1 + max(STEPS)
    assert set(seen[True]) == {torch.bfloat16}
    assert set(seen[False]) == {torch.float32}


def test_loss_falls_on_a_few_rows(family: Family, tmp_path: Path) -> None:
    options = {"steps": 40, "lr": 3e-3, "max_grad_norm": 1.0, "omega": 5.0}
    trainer = trainer_on(family("llama"), trajectories(seed=6, count=4), tmp_path, **options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    first, last = lines[0], lines[-1]
    assert last["ar"] < first["ar"] / 2
    assert last["consistency"] < first["consistency"] / 2
    assert last["loss"] < first["loss"] / 2
