"""Rewards from models, files and functions: kept, given again, resumed, refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    RobertaConfig,
)
from transformers.models.llama import modeling_llama

from engine.refiner import DEFAULT_CHECKPOINT
from tests.engine.trajectories.helpers import call, read, row, write

ROWS = [
    row(0, ("a", "short", None), ("b", "a rather longer answer, with a comma", 9.0)),
    row(1, ("a", "one", None), ("b", "", None), ("c", "three three", None)),
    row(2),
]

# imports what ArmoRM does, and refuses as it does
REMOTE = """
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward

@dataclass
class Out(ModelOutput):
    logits: torch.Tensor = None
    score: torch.Tensor = None

class Gated(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.heads = torch.nn.Linear(config.hidden_size, 4)
        self.post_init()

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None):
        if attention_mask.sum(1).max() > 50:
            raise ValueError("Token pattern not found in the list.")
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]
        return Out(logits=self.heads(last), score=attention_mask.sum(1).float())
"""


def save_tokenizer(folder: Path, **changes: object) -> None:
    AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT, **changes).save_pretrained(folder)


def config(**changes: object) -> LlamaConfig:
    vocabulary = len(AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT))
    return LlamaConfig(**{
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 1, "initializer_range": 0.5, **changes,
    })  # fmt: skip


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForSequenceClassification(config()).save_pretrained(tmp_path / "rm")
    save_tokenizer(tmp_path / "rm")
    return tmp_path / "rm"


def score(folder: Path, *options: object, rows: list[object] | None = None) -> tuple[int, list[dict[str, object]]]:
    write(folder / "in.jsonl", ROWS if rows is None else rows)  # type: ignore[arg-type]
    status = call("score", "--input", folder / "in.jsonl", "--output", folder / "scored.jsonl", *options)
    return status, read(folder / "scored.jsonl") if (folder / "scored.jsonl").exists() else []


def rewards(rows: list[dict[str, object]]) -> list[list[float | None]]:
    return [[r["reward"] for r in made["responses"]] for made in rows]  # type: ignore[attr-defined]


@pytest.mark.parametrize("pad", ["<|pad|>", "<|end|>"])
def test_a_sequence_classifier(tmp_path: Path, reward_model: Path, pad: str) -> None:
    """Each reward is the logit at the last token of the chat, whatever shares the batch and whichever token pads."""
    save_tokenizer(reward_model, pad_token=pad)
    status, made = score(tmp_path, "--reward-model", reward_model)
    assert status == 0
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    for before, after in zip(ROWS, made, strict=True):
        for old, new in zip(before["responses"], after["responses"], strict=True):  # type: ignore[call-overload]
            if old["reward"] is not None or not old["text"]:
                assert new["reward"] == old["reward"]
                continue
            chat = [{"role": "user", "content": before["prompt"]}, {"role": "assistant", "content": old["text"]}]
            ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
                assert new["reward"] == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-4)


def test_again_and_too_long(tmp_path: Path, reward_model: Path) -> None:
    long = [*ROWS, row(3, ("a", "word " * 100, 1.0))]
    status, made = score(tmp_path, "--reward-model", reward_model, "--again", rows=long)
    assert status == 0
    assert rewards(made)[0][1] != 9.0
    assert rewards(made)[3] == [None]
    assert [(r["index"], r["error"]) for r in made] == [(i, None) for i in range(4)]


@pytest.fixture
def armorm(tmp_path: Path) -> Path:
    """A reward model of ArmoRM's kind."""
    folder, made = tmp_path / "armo", config(num_labels=4, max_position_embeddings=256)
    made.auto_map = {"AutoModelForSequenceClassification": "modeling_gated.Gated"}
    made.save_pretrained(folder)
    parts = {"model": LlamaModel(made), "heads": torch.nn.Linear(made.hidden_size, 4)}
    weights = {f"{part}.{name}": w for part, module in parts.items() for name, w in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "modeling_gated.py").write_text(REMOTE)
    save_tokenizer(folder)
    return folder


def test_a_model_with_a_score_of_its_own_needs_trust(
    tmp_path: Path, armorm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat that it refuses costs its row."""
    rows = [*ROWS, row(3, ("a", "word " * 60, None)), row(4, ("a", "short", None))]
    assert score(tmp_path, "--reward-model", armorm, rows=rows)[0] == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    status, made = score(tmp_path, "--reward-model", armorm, "--trust-remote-code", rows=rows)
    assert status == 3
    assert rewards(made)[0][0] == float(rewards(made)[0][0] or 0.5)
    assert rewards(made)[1][2] > rewards(made)[1][0]  # type: ignore[operator]
    refused = [r["error"] for r in made]
    assert refused[:3] == [None, None, None]
    assert refused[3]["message"] == "the reward model refuses this chat: Token pattern not found in the list."  # type: ignore[index]
    assert (refused[4], rewards(made)[4]) == (None, rewards(made)[0][:1])
    assert not hasattr(modeling_llama, "LLAMA_INPUTS_DOCSTRING")


def test_code_for_another_transformers(tmp_path: Path, armorm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (armorm / "modeling_gated.py").write_text("from transformers import NoLongerThere\n")
    assert score(tmp_path, "--reward-model", armorm, "--trust-remote-code")[0] == 1
    assert "brings code that does not run with this transformers" in capsys.readouterr().err


def test_several_labels_are_no_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForSequenceClassification(config(num_labels=3)).save_pretrained(tmp_path / "rm")
    save_tokenizer(tmp_path / "rm")
    assert score(tmp_path, "--reward-model", tmp_path / "rm")[0] == 1
    assert "one number per text" in capsys.readouterr().err


def test_rewards_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = [
        {"prompt_id": "p0", "model": "a", "reward": 1},
        {"prompt": "Question  1?", "text": "three three ", "reward": 3},
        row(1, ("else", "one", 2.0)),
        {"prompt_id": "p1", "reward": 4},
        {"prompt_id": "p1", "model": "a", "reward": "high"},
        b"[1]",
    ]
    status, made = score(tmp_path, "--rewards", write(tmp_path / "known.jsonl", known))
    assert status == 0
    assert rewards(made) == [[1.0, 9.0], [2.0, None, 3.0], []]
    told = capsys.readouterr().err
    assert all(f"known.jsonl, row {i}: " in told for i in (3, 4, 5))


def test_a_text_says_more_than_a_name(tmp_path: Path) -> None:
    known = [
        {"prompt_id": "p0", "model": "a", "reward": 1},
        {"prompt": "Question 0?", "text": "short", "reward": 2},
    ]
    _, made = score(tmp_path, "--rewards", write(tmp_path / "known.jsonl", known))
    assert rewards(made)[0] == [2.0, 9.0]


CONFIGS = {"RoBERTa": RobertaConfig, "GPT2": GPT2Config}


@pytest.mark.parametrize(
    ("kind", "max_length", "status"), [("RoBERTa", None, 0), ("RoBERTa", 13, 0), ("GPT2", None, 0), ("GPT2", 13, 3)]
)
def test_a_text_longer_than_the_positions_costs_itself(
    tmp_path: Path, kind: str, max_length: int | None, status: int
) -> None:
    """RoBERTa's begin behind the padding: 12 of them hold 10 tokens. Of GPT2's more may be asked for than there are."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "rm")
    changes = {"GPT2": {"n_positions": 10}}.get(kind, {"max_position_embeddings": 12})
    made = CONFIGS[kind](
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=1, **changes,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path / "rm")
    counts = {n: len(tokenizer("Question 1?", "a" + " a" * n)["input_ids"]) for n in range(12)}
    fits, exceeds = (next(n for n, count in counts.items() if count == wanted) for wanted in (10, 11))
    rows = [row(1, ("m", "a" + " a" * fits, None)), row(1, ("m", "a" + " a" * exceeds, None))]
    options = ("--max-length", max_length) if max_length else ()
    found, scored = score(tmp_path, "--reward-model", tmp_path / "rm", *options, rows=rows)
    assert found == status
    assert isinstance(rewards(scored)[0][0], float)
    assert rewards(scored)[1] == [None]
    if status:
        assert scored[1]["error"]["type"] == "ScoringFailed"  # type: ignore[index]
        assert "--max-length" in scored[1]["error"]["message"]  # type: ignore[index]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_does_not_fit_into_memory_goes_text_by_text(
    tmp_path: Path, reward_model: Path, kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(i, ("a", text, None)) for i, text in enumerate(("one", "two", "three and many more words", "four"))]
    status, wanted = score(tmp_path, "--reward-model", reward_model, "--batch-size", "1", rows=rows)
    assert status == 0
    longest = 0
    forward = LlamaForSequenceClassification.forward

    def small(self: LlamaForSequenceClassification, *, input_ids: torch.Tensor, **options: torch.Tensor) -> object:
        nonlocal longest
        longest = max(longest, input_ids.shape[1])
        if len(input_ids) > 1 or input_ids.shape[1] == longest:
            raise kind("out of memory: tried to allocate much")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", small)
    (tmp_path / "scored.jsonl").unlink()
    (tmp_path / "scored.jsonl.job").unlink()
    status, made = score(tmp_path, "--reward-model", reward_model, rows=rows)
    assert status == 3
    failed = [one["error"] and one["error"]["type"] for one in made]  # type: ignore[index]
    assert failed == [None, None, "ScoringFailed", None]
    assert "does not fit into memory" in made[2]["error"]["message"]  # type: ignore[index]
    for i in (0, 1, 3):
        assert rewards(made)[i] == pytest.approx(rewards(wanted)[i], abs=1e-6)


def test_a_device_that_is_not_there(tmp_path: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(tmp_path, "--reward-model", reward_model, "--device", "cuda:99")[0] == 2
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewarding.py").write_text(
        "import time\n"
        "def length(prompt, texts):\n"
        "    return [len(text) for text in texts]\n"
        "def stuck(prompt, texts):\n"
        "    if prompt == 'Question 100?':\n"
        "        time.sleep(600)\n"
        "    return length(prompt, texts)\n"
        "def picky(prompt, texts):\n"
        "    if '1' in prompt:\n"
        "        raise RuntimeError('no ones')\n"
        "    return [float('nan') if '3' in prompt else 0.5] * len(texts)\n"
        "def few(prompt, texts):\n"
        "    return []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("rewarding", None)


@pytest.mark.usefixtures("functions")
def test_a_function(tmp_path: Path) -> None:
    status, made = score(tmp_path, "--callable", "rewarding:length")
    assert (status, rewards(made)) == (0, [[5.0, 9.0], [3.0, None, 11.0], []])
    before = (tmp_path / "scored.jsonl").read_bytes()
    assert score(tmp_path, "--callable", "rewarding:length")[0] == 0
    assert score(tmp_path, "--callable", "rewarding:few")[0] == 2
    assert (tmp_path / "scored.jsonl").read_bytes() == before


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("name", ["rewarding", "rewarding:nothing", "no_such_module:f", "json:decoder", ":f"])
def test_a_function_must_be_there(tmp_path: Path, name: str) -> None:
    assert score(tmp_path, "--callable", name)[0] == 2


@pytest.mark.usefixtures("functions")
def test_failures_cost_their_row_only(tmp_path: Path) -> None:
    rows = [row(i, ("a", f"text {i}", None)) for i in range(5)]
    status, made = score(tmp_path, "--callable", "rewarding:picky", rows=[*rows, b"{", *rows])
    assert status == 3
    failed = [made[i]["error"]["type"] if made[i]["error"] else None for i in range(11)]  # type: ignore[index]
    one = [None, "ScoringFailed", None, "ScoringFailed", None]
    assert failed == [*one, "InvalidTrajectory", *one]
    assert [r["index"] for r in made] == list(range(11))
    assert made[0]["responses"] == [{"model": "a", "text": "text 0", "reward": 0.5}]
    assert call("inspect", tmp_path / "scored.jsonl") == 3
    assert score(tmp_path, "--callable", "rewarding:few", "--overwrite")[0] == 3


@pytest.mark.usefixtures("functions")
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, ("a", "x" * (i % 7), None), ("b", "y" * (i % 5 + 7), None)) for i in range(200)]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "scored.jsonl"
    command = [sys.executable, "-m", "engine.trajectories", "score", "--input", str(source), "--output", str(out)]
    command += ["--callable", "rewarding:stuck"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=Path(__file__).parents[3],
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b"\n") < 96):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_bytes().count(b"\n") == 96  # whole groups in front of the row it was stuck in
    sys.modules.pop("rewarding", None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with out.open("ab") as file:
        file.write(b'{"torn')
    assert call(*command[3:]) == 0
    resumed = out.read_bytes()
    assert call(*command[3:], "--overwrite") == 0
    assert out.read_bytes() == resumed
    assert [made["index"] for made in read(out)] == list(range(200))
