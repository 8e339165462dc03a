"""Draws, packing and padding of the collator."""

import pickle
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from engine import InvalidTrajectory, Trajectory, TrajectoryCollator
from engine.training import lay_out
from tests.engine.training.references import chosen_by, trajectories

PAD = 3


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(st.integers(0, 99), st.integers(1, 6), st.integers(0, 3), st.one_of(st.none(), st.integers(120, 400)))
def test_a_batch_is_its_layouts(seed: int, count: int, drafts: int, max_tokens: int | None) -> None:
    """Every trajectory lies in one row in one piece, with the rows of the loss at their tokens, and all else is padding."""
    given_ones = trajectories(seed, count)
    collator = TrajectoryCollator(PAD, drafts=drafts, max_tokens=max_tokens, seed=seed, pad_to_multiple=8)
    batch = collator(given_ones)
    rows, length = batch["input_ids"].shape
    assert length % 8 == 0
    order = [int(i) for i in batch["trajectory_ids"].flatten().unique_consecutive() if i >= 0]
    assert order == list(range(count))
    # labels come in the order of the layouts, which packing may change
    expected = [
        lay_out(prompt, target, chosen, pad_id=PAD) for prompt, target, chosen in chosen_by(collator, given_ones)
    ]
    by_tokens = {tuple(layout.input_ids): layout for layout in expected}
    labels, drafts_seen = 0, 0
    for index in range(count):
        places = (batch["trajectory_ids"].flatten() == index).nonzero().flatten()
        start, end = int(places[0]), int(places[-1]) + 1
        assert start // length == (end - 1) // length
        layout = by_tokens[tuple(batch["input_ids"].flatten()[start:end].tolist())]
        assert batch["position_ids"].flatten()[start:end].tolist() == layout.position_ids
        assert batch["response_ids"].flatten()[start:end].tolist() == layout.response_ids
        mine = slice(labels, labels + len(layout.labels))
        assert batch["labels"][mine].tolist() == layout.labels
        assert (batch["target_rows"][mine] - start).tolist() == layout.target_rows
        paired = slice(drafts_seen, drafts_seen + len(layout.draft_rows))
        assert (batch["draft_rows"][paired] - start).tolist() == layout.draft_rows
        assert (batch["pair_index"][paired] - labels).tolist() == layout.pair_index
        labels, drafts_seen = mine.stop, paired.stop
    assert labels == len(batch["labels"]) == int(batch["label_count"])
    assert drafts_seen == len(batch["draft_rows"]) == int(batch["pair_count"])
    padding = batch["trajectory_ids"] == -1
    assert int((~padding).sum()) == sum(len(layout.input_ids) for layout in expected)
    assert (batch["input_ids"][padding] == PAD).all()
    assert rows == count if max_tokens is None else int((~padding).sum(1).max()) <= max_tokens


def test_first_fit() -> None:
    made = [Trajectory(id=i, prompt_ids=[9] * n, responses=[[5]]) for i, n in enumerate([6, 5, 3, 2])]
    batch = TrajectoryCollator(PAD, max_tokens=10)(made)
    assert (batch["input_ids"] == 9).sum(1).tolist() == [6 + 2, 5 + 3]
    assert batch["input_ids"].shape == (2, 10)


def test_draws_are_uniform_without_repetition() -> None:
    collator = TrajectoryCollator(PAD, drafts=2, seed=5)
    draws = []
    for epoch in range(3000):
        collator.set_epoch(epoch)
        draws.append(tuple(collator.draw("x", 5)))
    counts = Counter(draws)
    assert len(counts) == 10
    assert all(len(set(pair)) == 2 for pair in counts)
    assert all(abs(number - 300) < 5 * 17 for number in counts.values())  # five standard deviations


def test_draws_depend_on_seed_epoch_and_id_alone() -> None:
    given_ones = trajectories(1, count=6, responses=6)
    collator = TrajectoryCollator(PAD, drafts=2, seed=1)
    before = chosen_by(collator, given_ones)
    torch.manual_seed(99)
    random.seed(99)
    again = pickle.loads(pickle.dumps(collator))  # as a worker gets it
    assert chosen_by(again, given_ones[::-1]) == before[::-1]
    again.set_epoch(1)
    assert chosen_by(again, given_ones) != before
    assert chosen_by(TrajectoryCollator(PAD, drafts=2, seed=2), given_ones) != before
    assert TrajectoryCollator(PAD, drafts=2, seed=7).draw("an id", 6) == [3, 4]  # for ever


def test_as_many_drafts_as_there_are() -> None:
    assert TrajectoryCollator(PAD, drafts=9).draw("x", 4) == [0, 1, 2, 3]
    assert TrajectoryCollator(PAD, drafts=0).draw("x", 4) == []
    batch = TrajectoryCollator(PAD, drafts=2)([Trajectory(id=0, prompt_ids=[5], responses=[[7, 2]])])
    assert batch["input_ids"].tolist() == [[5, 7, 2]]
    assert batch["draft_rows"].shape == (0,)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(workers: int) -> None:
    given_ones = trajectories(2, count=6)
    collator = TrajectoryCollator(PAD, drafts=2, max_tokens=256)
    loader = DataLoader(given_ones, batch_size=3, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
    batches = list(loader)
    assert len(batches) == 2
    assert same(batches[0], collator(given_ones[:3]))
    assert same(batches[1], collator(given_ones[3:]))


def test_accelerate_passes_a_batch_on() -> None:
    accelerate = pytest.importorskip("accelerate")
    given_ones = trajectories(2, count=4)
    collator = TrajectoryCollator(PAD, drafts=2, max_tokens=256)
    loader = accelerate.Accelerator(cpu=True).prepare(
        DataLoader(given_ones, batch_size=2, collate_fn=collator)  # type: ignore[arg-type]
    )
    batches = list(loader)
    assert [same(batch, collator(part)) for batch, part in zip(batches, (given_ones[:2], given_ones[2:]), strict=True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_id": -1}, "pad_id must be an integer >= 0, got -1"),
        ({"pad_id": None}, "pad_id must be an integer >= 0, got None"),
        ({"drafts": -1}, "drafts must be an integer >= 0"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"pad_to_multiple": 0}, "pad_to_multiple must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryCollator(**{"pad_id": PAD, **options})


def test_a_trajectory_that_does_not_fit() -> None:
    made = Trajectory(id="long", prompt_ids=[5] * 30, responses=[[6, 7, 8], [7, 8, 2]])
    with pytest.raises(
        InvalidTrajectory, match=r"'long' has 36 tokens \(30 of its prompt\), a row holds max_tokens=35"
    ):
        TrajectoryCollator(PAD, max_tokens=35)([made])
    assert TrajectoryCollator(PAD, max_tokens=36)([made])["input_ids"].shape == (1, 36)


def test_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="at least one trajectory"):
        TrajectoryCollator(PAD)([])
