"""The three kinds of scorers, and what the command does not load."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from engine.refiner import DEFAULT_CHECKPOINT
from engine.request import Request
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
