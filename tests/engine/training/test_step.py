"""train_step against separate plain forwards: loss and every parameter's gradient, for all families and attentions."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel

from engine import TrajectoryCollator, train_step
from tests.engine.checkpoints import FAMILIES, PAD
from tests.engine.training.references import (
    assert_close,
    chosen_by,
    double,
    plain_loss,
    step,
    trajectories,
)

Family = Callable[..., PreTrainedModel]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flex_attention uncompiled: compiling takes a minute per model, and only uncompiled it has gradients on a CPU, once
    its check of the device is off."""
    if not hasattr(flex_attention, "_validate_device"):
        pytest.skip("this PyTorch does not let flex_attention take gradients on a CPU")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_separate_forwards(name: str, attention: str, drafts: int, family: Family) -> None:
    if attention == "sdpa" and name.startswith("gemma2"):
        pytest.skip("transformers' sdpa attention has no soft-cap")
    compare(family(name, attention), family(name, attention), drafts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("flex_on_cpu")
def test_flex_attention_equals_separate_forwards(name: str, family: Family) -> None:
    compare(family(name, "flex_attention"), family(name), drafts=2)


def compare(model: PreTrainedModel, plain: PreTrainedModel, drafts: int) -> None:
    collator = TrajectoryCollator(PAD, drafts=drafts, max_tokens=160, seed=drafts)
    given = trajectories(seed=drafts)
    actual = step(model, collator, given)
    chosen = chosen_by(collator, given)
    assert actual.pair_count > 20
    exact = plain_loss(double(plain), chosen)
    assert_close(actual, exact, plain_loss(plain, chosen))
    assert exact.consistency > 0.01


def test_in_float64(family: Family) -> None:
    """Where nothing rounds to float32 but the norms, the two ways agree far below float32's rounding of the whole."""
    model = family("llama").double()
    collator = TrajectoryCollator(PAD, drafts=3, max_tokens=200)
    given = trajectories(seed=8)
    actual, exact = step(model, collator, given), plain_loss(model, chosen_by(collator, given))
    torch.testing.assert_close(actual.loss, exact.loss, rtol=1e-6, atol=0)
    assert actual.loss.dtype is torch.float64
    for key, gradient in exact.gradients.items():
        torch.testing.assert_close(actual.gradients[key], gradient, rtol=0, atol=1e-6 * float(gradient.norm()))


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-some-windows", "gemma2"])
def test_packing_changes_nothing(name: str, family: Family) -> None:
    model = family(name)
    given = trajectories(seed=3, count=5)
    alone = TrajectoryCollator(PAD, drafts=2)
    packed = TrajectoryCollator(PAD, drafts=2, max_tokens=300, pad_to_multiple=7)
    assert packed(given)["input_ids"].shape[0] < alone(given)["input_ids"].shape[0] == 5
    chosen = chosen_by(alone, given)
    exact, plain = plain_loss(double(model), chosen), plain_loss(model, chosen)
    for collator in (alone, packed):
        assert_close(step(model, collator, given), exact, plain)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_window_cuts_the_target(window: int, family: Family) -> None:
    model = family("llama-tied")
    collator = TrajectoryCollator(PAD, drafts=3, window=window)
    given = trajectories(seed=4)
    actual, chosen = step(model, collator, given), chosen_by(collator, given)
    assert actual.label_count == window * len(given)
    exact = plain_loss(double(model), chosen, window=window)
    assert_close(actual, exact, plain_loss(model, chosen, window=window))


def test_options_reach_the_loss(family: Family) -> None:
    model = family("gemma2-untied")
    collator = TrajectoryCollator(PAD, drafts=2)
    given = trajectories(seed=5)
    chosen = chosen_by(collator, given)
    actual = step(model, collator, given, omega=3.0, kl_normalization="vocabulary")
    exact = plain_loss(double(model), chosen, omega=3.0, vocabulary_mean=True)
    assert_close(actual, exact, plain_loss(model, chosen, omega=3.0, vocabulary_mean=True))


def test_a_soft_cap_of_zero_in_the_config_is_none(family: Family) -> None:
    model, batch = family("gemma2"), TrajectoryCollator(PAD, drafts=1)(trajectories(seed=5))
    capped = train_step(model, batch, loss_impl="torch").loss
    model.config.final_logit_softcapping = None
    expected = train_step(model, batch, loss_impl="torch").loss
    model.config.final_logit_softcapping = 0.0
    assert train_step(model, batch, loss_impl="torch").loss == expected != capped


def test_a_trajectory_without_drafts_is_plain_fine_tuning(family: Family) -> None:
    model = family("qwen3")
    given = trajectories(seed=6)
    chosen = [(prompt, target, []) for prompt, target, _ in chosen_by(TrajectoryCollator(PAD), given)]
    actual = step(model, TrajectoryCollator(PAD, drafts=0), given)
    assert actual.pair_count == actual.consistency == 0
    assert_close(actual, plain_loss(double(model), chosen), plain_loss(model, chosen))


def test_stats_are_those_of_the_batch(family: Family) -> None:
    batch = TrajectoryCollator(PAD, drafts=2)(trajectories(seed=7))
    out = train_step(family("llama"), batch, return_stats=True, loss_impl="torch")
    assert out.stats is not None
    assert out.stats.lse.shape == (len(batch["labels"]) + len(batch["draft_rows"]),)
    assert out.stats.argmax_agrees.shape == batch["draft_rows"].shape
    assert train_step(family("llama"), batch, loss_impl="torch").stats is None
