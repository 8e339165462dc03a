"""From a file to token ids; tables; the way from a build to a training batch."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.refiner import DEFAULT_CHECKPOINT
from engine.training import TrajectoryCollator, rank
from engine.trajectories import BadRow, TrajectoryRow, load, read_rows
from engine.trajectories.dataset import turn_ends
from engine.trajectories.summary import Summary, ranked
from tests.engine.trajectories.helpers import DATA, call, read, row, write

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real trajectories are not beside this checkout")
TIED = row(
    0, ("a", "first", 1.0), ("b", "second!", 1.0), ("c", "unscored", None), ("d", "least", 0.0), ("e", "  ", 5.0),
    ("f", "first ", 3.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)


def test_tokens_are_those_of_the_chat(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [TIED, {**row(1, ("a", "cut", 1.0)), "messages": [{"role": "user", "content": "in a chat"}]}]
    rows[1]["responses"][0]["truncated"] = True
    made = list(load(str(write(tmp_path / "t.jsonl", rows)), tokenizer))
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id}
    assert tokenizer.decode(made[0].prompt_ids) == "<|user|>Question 0?<|end|><|assistant|>"
    assert [tokenizer.decode(ids) for ids in made[0].responses] == [
        "first<|end|>", "second!<|end|>", "unscored<|end|>", "least<|end|>", ""
    ]  # fmt: skip
    assert made[0].rewards == [1.0, 1.0, None, 0.0, 5.0]
    assert [tokenizer.decode(ids) for ids in rank(made[0])] == ["least<|end|>", "first<|end|>", "second!<|end|>"]
    assert tokenizer.decode(made[1].prompt_ids) == "<|user|>in a chat<|end|><|assistant|>"
    assert tokenizer.decode(made[1].responses[0]) == "cut"


def test_the_ranking_of_texts_is_that_of_training(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(write(tmp_path / "t.jsonl", [TIED]))
    (trajectory,), (texts,) = load(path, tokenizer), read_rows(path)
    assert isinstance(texts, TrajectoryRow)
    from engine.trajectories.schema import without_repeats

    expected = [response.text for response in ranked(without_repeats(texts))]
    assert [tokenizer.decode(ids[:-1]) for ids in rank(trajectory)] == expected == ["least", "first", "second!"]


def test_bad_rows_are_told_and_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write(tmp_path / "t.jsonl", [b"no", TIED, {"prompt": "p"}]))
    bad: list[BadRow] = []
    assert [made.id for made in load(path, tokenizer, on_bad=bad.append)] == ["p0"]
    assert [row.row for row in bad] == [0, 2]
    assert len(list(load(path, tokenizer))) == 1
    assert "row 2: responses must be a list" in caplog.text


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [TIED, row(1, ("a", "xx", 2.0), ("b", "yyy", 4.0)), row(2, ("a", "only", None)), b"no"]
    path = write(tmp_path / "t.jsonl", rows)
    assert call("inspect", path, "--json") == 3
    figures = json.loads(capsys.readouterr().out)
    assert figures["prompts"] == 3
    assert figures["models"]["a"] == {
        "responses": 3, "rewarded": 2, "mean_reward": 1.5, "reward_deviation": 0.5, "win_share": 0.0, "mean_length": 11 / 3
    }  # fmt: skip
    assert figures["models"]["b"]["win_share"] == 1.0
    assert [figures["levels"][level]["mean_reward"] for level in ("0", "1", "2")] == [1.0, 2.5, 1.0]
    assert figures["prompts_by_usable_responses"] == {"0": 1, "2": 1, "3": 1}
    assert (figures["prompts_with_ties"], figures["prompts_with_tied_best"]) == (1, 1)
    assert (figures["missing_rewards"], figures["repeated_responses"]) == (2, 1)
    assert figures["longest_is_best_share"] == 1.0
    # lengths 5, 7, 5 | 2, 3 and rewards 1, 1, 0 | 2, 4, each less its mean
    xx, xy, yy = 8 / 3 + 0.5, 2 / 3 + 1.0, 2 / 3 + 2.0
    assert figures["length_reward_correlation"] == pytest.approx(xy / (xx * yy) ** 0.5)
    # lengths in shares of the prompt's mean: 15/17, 21/17, 15/17 | 4/5, 6/5; bins end at 2**0.25 = 1.19 and 2**-0.25 = 0.84
    assert figures["reward_by_length"] == {
        "0.707": {"responses": 1, "reward_above_prompt": -1.0},
        "1": {"responses": 2, "reward_above_prompt": pytest.approx((1 / 3 - 2 / 3) / 2)},
        "1.41": {"responses": 2, "reward_above_prompt": pytest.approx((1 / 3 + 1.0) / 2)},
    }
    assert call("inspect", path) == 3
    assert "bad: " in capsys.readouterr().out


def test_a_file_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", write(tmp_path / "t.jsonl", [])) == 0
    assert "0 prompts" in capsys.readouterr().out
    assert call("inspect", tmp_path / "nothing.jsonl") == 2


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel each for models, levels, lengths and ties, of the figures in the tables."""
    drawn: list[Figure] = []
    inner = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (drawn.append(figure), inner(figure, *args)))
    path = write(tmp_path / "t.jsonl", [TIED, row(1, ("a", "xx", 2.0), ("b", "yyy", 4.0)), row(2, ("a", "z", None))])
    assert call("inspect", path, "--plot", tmp_path / "p.png") == 0
    models, levels, lengths, ties = drawn[0].axes
    assert [label.get_text() for label in models.get_yticklabels()] == ["d", "a", "b", "e"]  # worst first
    assert [bar.get_width() for bar in models.patches] == [0.0, 1.5, 2.5, 5.0]
    assert [bar.get_width() for bar in levels.patches] == [1.0, 2.5, 1.0]
    assert lengths.lines[0].get_ydata()[0] == -1.0
    assert [bar.get_width() for bar in ties.patches] == [1, 0, 1, 1]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert call("inspect", path, "--plot", path) == 2


def test_a_local_model_answers_and_what_it_says_can_be_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "Name a colour."}, {"prompt": "Say hello."}])
    outputs = []
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        arguments = ["--checkpoint", DEFAULT_CHECKPOINT, "--max-tokens", 8, "--temperature", 1]
        assert call("build", "--prompts", source, "--output", out, *arguments) == 0
        outputs.append(read(out))
    assert outputs[0] == outputs[1]
    assert [[r["model"] for r in made["responses"]] for made in outputs[0]] == [["refiner_checkpoint"]] * 2
    assert any(r.get("truncated") for made in outputs[0] for r in made["responses"])
    known = write(tmp_path / "known.jsonl", [
        {"prompt": made["prompt"], "model": "refiner_checkpoint", "reward": 1} for made in outputs[0]
    ])  # fmt: skip
    scored = tmp_path / "scored.jsonl"
    assert call("score", "--input", tmp_path / "0.jsonl", "--output", scored, "--rewards", known) == 0
    trajectories = list(load(str(scored), tokenizer))
    batch = TrajectoryCollator(pad_id=0, drafts=1)(trajectories)
    assert batch["label_count"] == sum(len(made.responses[0]) for made in trajectories)


@needs_data
def test_real_trajectories(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = list(read_rows(str(DATA)))
    summary = Summary.of(rows)
    assert (summary.prompts, summary.bad, summary.missing) == (605, [], 0)
    assert len(summary.models) == 6
    assert sum(sums.count for sums in summary.models.values()) + summary.repeated == 605 * 6
    head = DATA.open("rb")
    few = [json.loads(head.readline()) for _ in range(40)]
    head.close()
    for made, given in zip(load(str(DATA), tokenizer), few, strict=False):
        assert made.id == given["prompt_id"]
        best = rank(made)[-1]
        text = max(reversed(given["responses"]), key=lambda r: r["reward"])["text"]
        assert tokenizer.decode(best, skip_special_tokens=True).split() == text.split()
        assert best[-1] == tokenizer.eos_token_id


@needs_data
def test_real_trajectories_are_built_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert call("build", "--prompts", DATA, "--output", out) == 0
    given = read(DATA)
    for made, row_given in zip(read(out), given, strict=True):
        texts = {r["text"].strip(): None for r in row_given["responses"]}
        assert [r["text"].strip() for r in made["responses"]] == list(texts)
        assert (made["prompt_id"], made["source"]) == (row_given["prompt_id"], row_given["source"])
