"""The three kinds of scorers, and what the command does not load."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from engine.refiner import DEFAULT_CHECKPOINT
from engine.request import Request
from tests.engine.evaluate import scorers
from tests.engine.evaluate.helpers import evaluate, questions, read, write
from tests.engine.job.stub import answer

FEW = ("--reward-at-steps", "none")


def test_rewards_of_a_file_by_text_and_by_name(tmp_path: Path) -> None:
    rows = questions(3, ("one",))
    given = []
    for number, row in enumerate(rows):
        refined = answer(Request(prompt=row["prompt"], draft=row["draft"]))
        given += [{"prompt": row["prompt"], "text": row["draft"], "reward": float(number)}]
        given += [{"prompt": row["prompt"], "text": refined, "reward": 2.0 * number}]
    given[-1] = {"prompt": rows[-1]["prompt"], "model": "one+refined", "reward": 9.0}
    path = write(tmp_path / "rewards.jsonl", given)
    status, out = evaluate(tmp_path, rows, *FEW, "--rewards", path, scorer=None)
    assert status == 0
    made = read(out / "given.jsonl")
    assert [row["base_reward"] for row in made] == [0.0, 1.0, 2.0]
    assert [row["reward"] for row in made] == [0.0, 2.0, 9.0]
    assert [row["preference"] for row in made] == [0.5, 1.0, 1.0]


def test_a_reward_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rows = questions(2, ("one",))
    rows.append({**rows[0], "draft": "too long for it " * 40})
    status, out = evaluate(
        tmp_path, rows, *FEW, "--reward-model", tmp_path / "rm", "--scorer-batch-size", "3", scorer=None
    )
    assert status == 3
    made = read(out / "given.jsonl")
    assert made[2]["error"]["type"] == "NoReward"
    for row in made[:2]:
        for text, reward in ((row["drafts"][0], row["base_reward"]), (row["answers"][0], row["reward"])):
            chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits.item() == pytest.approx(reward, abs=1e-5)


def test_the_command_line_and_the_statistics_load_no_torch() -> None:
    code = (
        "import sys, engine.evaluate.command, engine.evaluate.statistics, engine.evaluate.report; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def by_model(path: Path, prompts: list[str], *models: str) -> Path:
    """A reward for every prompt and model's name."""
    rows = [{"prompt": prompt, "model": model, "reward": 1.0} for prompt in prompts for model in models]
    return write(path, rows)


def test_a_reward_by_name_is_of_no_other_variant(tmp_path: Path) -> None:
    rows = questions(3, ("one",))
    path = by_model(tmp_path / "rewards.jsonl", [row["prompt"] for row in rows], "one", "one+refined")
    status, out = evaluate(
        tmp_path, rows, *FEW, "--controls", "alone", "--rewards", path, command="controls", scorer=None
    )
    assert status == 3
    assert [row["reward"] for row in read(out / "given.jsonl")] == [1.0] * 3
    assert [row["error"]["type"] for row in read(out / "alone.jsonl")] == ["NoReward"] * 3


@pytest.mark.parametrize("kind", ["cut draft", "turns"])
def test_a_reward_by_name_is_of_the_whole_answer(tmp_path: Path, kind: str) -> None:
    row = {"id": 7, "turns": ["First?"], "drafts": ["one two three"], "model": "one"}
    if kind == "turns":
        row |= {"turns": ["First?", "Second?"], "drafts": ["one", "two"]}
    given = [{"prompt_id": 7, "model": name, "reward": 1.0} for name in ("one", "one+refined")]
    path = write(tmp_path / "rewards.jsonl", given)
    _, out = evaluate(tmp_path, [row], *FEW, "--rewards", path, scorer=None, cut=lambda text: (text[:7], len(text) > 7))
    (made,) = read(out / "given.jsonl")
    assert made["base_reward"] is None
    assert made["error"]["type"] == "NoReward"


def test_the_number_of_a_row_is_no_id(tmp_path: Path) -> None:
    rows = questions(2, ("one",))
    refined = [answer(Request(prompt=row["prompt"], draft=row["draft"])) for row in rows]
    given = [{"prompt_id": 1, "model": name, "reward": -5.0} for name in ("one", "one+refined")]
    given += [{"prompt": rows[0]["prompt"], "text": text, "reward": 1.0} for text in (rows[0]["draft"], refined[0])]
    path = write(tmp_path / "rewards.jsonl", given)
    assert evaluate(tmp_path, rows, *FEW, "--rewards", path, scorer=None)[0] == 3
    first, second = read(tmp_path / "out" / "given.jsonl")
    assert (first["base_reward"], first["reward"]) == (1.0, 1.0)
    assert (second["base_reward"], second["reward"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--callable", "math:no_such_function"], "module:function"),
        (["--rewards", "rewards.jsonl"], "holds no reward"),
        (["--reward-model", "rm", "--scorer-device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--reward-model", "rm"], "got 3 labels"),
    ],
)
def test_a_scorer_that_cannot_work_costs_no_work(
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rewards.jsonl", [{"prompt": "Q?", "model": "one", "reward": None}])
    config = LlamaConfig(num_labels=3, vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(tmp_path / "rm")
    rows = questions(2, ("one",))
    status, out = evaluate(tmp_path, rows, *FEW, *options, scorer=None)
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert evaluate(tmp_path, rows, *FEW)[0] == 0  # what was right goes on there


def test_an_answer_without_a_reward_is_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    monkeypatch.setenv(scorers.LATE, str(there))
    rows = [*questions(2, ("one",)), {"prompt": "A late question?", "draft": "x"}]
    assert evaluate(tmp_path, rows, *FEW, scorer="later")[0] == 3
    there.touch()
    assert evaluate(tmp_path, rows, *FEW, scorer="later")[0] == 3
    status, out = evaluate(tmp_path, rows, *FEW, "--retry-errors", scorer="later")
    assert status == 0
    assert [row["base_reward"] for row in read(out / "given.jsonl")] == [float(len(row["draft"])) for row in rows]
