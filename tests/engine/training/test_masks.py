"""The masks, against a rule that is spelled out for every pair of tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config

from engine import TrajectoryCollator, UnsupportedModel
from engine.training import attention_masks, visible
from engine.training.masks import layer_windows, mask_rule
from tests.engine.checkpoints import FAMILIES, PAD
from tests.engine.training.references import trajectories

Family = Callable[..., PreTrainedModel]


def batch_of(seed: int, **options: Any) -> Any:
    return TrajectoryCollator(PAD, drafts=2, max_tokens=120, **options)(trajectories(seed, count=4, longest=12))


@pytest.mark.parametrize("window", [None, 1, 4, 11, 1000])
def test_visible(window: int | None) -> None:
    batch = batch_of(1)
    seen = visible(batch, window)
    lists = {name: batch[name].tolist() for name in ("trajectory_ids", "response_ids", "position_ids")}
    rows, length = batch["input_ids"].shape
    assert rows > 1
    for b in range(rows):
        trajectory, response, position = (lists[name][b] for name in lists)
        for q in range(length):
            for k in range(length):
                allowed = q == k
                if trajectory[q] == trajectory[k] != -1 and position[k] <= position[q]:
                    allowed |= response[k] in (0, response[q]) and (
                        window is None or position[q] - position[k] < window
                    )
                assert seen[b, q, k] == allowed


def test_a_row_sees_as_many_keys_as_its_position_says() -> None:
    """Nothing of the context is missing and nothing doubled: position p sees p + 1 tokens, of p + 1 positions."""
    batch = batch_of(2)
    real = batch["trajectory_ids"] >= 0
    assert torch.equal(visible(batch).sum(-1)[real], (batch["position_ids"] + 1)[real])
    assert torch.equal(visible(batch, 5).sum(-1)[real], (batch["position_ids"] + 1).clamp_max(5)[real])
    assert (visible(batch).sum(-1)[~real] == 1).all()


@pytest.mark.parametrize("window", [None, 6])
def test_flex_rule(window: int | None) -> None:
    batch = batch_of(3)
    rows, length = batch["input_ids"].shape
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(mask_rule(batch, window)(b, torch.tensor(0), q, k), visible(batch, window))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_has_its_mask(name: str, family: Family) -> None:
    config = family(name).config
    batch = batch_of(4)
    masks = attention_masks(config, batch, torch.float32)
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if len(kinds) > 1:
        assert isinstance(masks, dict)
        assert masks.keys() == kinds
    given = masks if isinstance(masks, dict) else {"mask": masks}
    for kind, mask in given.items():
        windowed = kind == "sliding_attention" or kind == "mask"
        assert isinstance(mask, torch.Tensor)
        assert torch.equal(mask[:, 0] == 0, visible(batch, window if windowed else None))
        assert mask.dtype is torch.float32
        assert mask.isfinite().all()


def test_forms_of_the_mask() -> None:
    config, batch = LlamaConfig(), batch_of(5)
    rows, length = batch["input_ids"].shape
    config._attn_implementation = "sdpa"
    sdpa = attention_masks(config, batch, torch.bfloat16)
    assert isinstance(sdpa, torch.Tensor)
    assert (sdpa.dtype, sdpa.shape) == (torch.bool, (rows, 1, length, length))
    config._attn_implementation = "eager"
    eager = attention_masks(config, batch, torch.bfloat16)
    assert isinstance(eager, torch.Tensor)
    assert eager.dtype is torch.bfloat16
    assert torch.equal(eager == 0, sdpa)
    config._attn_implementation = "flex_attention"
    flex = attention_masks(config, batch, torch.bfloat16)
    assert isinstance(flex, BlockMask)
    assert flex.shape == (rows, 1, length, length)


def test_attention_that_takes_no_such_mask() -> None:
    config = LlamaConfig()
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match=r"'flash_attention_2'.*set_attn_implementation with one of 'sdpa'"):
        attention_masks(config, batch_of(6), torch.float32)


def test_kinds_of_layers() -> None:
    windows = layer_windows(Qwen2Config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]))
    assert windows.keys() == {"full_attention", "sliding_attention"}
    assert windows["full_attention"] is None
    config = LlamaConfig()
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModel, match="layers of type chunked_attention"):
        layer_windows(config)
