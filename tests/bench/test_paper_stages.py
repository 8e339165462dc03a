"""The stages behind the paper's tables: what is trained on, what is answered, scored and kept."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from bench.reproduction.data import HELD_OUT
from bench.reproduction.paper import answers as answering
from bench.reproduction.paper import data, reward, stage
from bench.reproduction.paper.answers import REAL, Plan, plans
from bench.reproduction.paper.measure import Fluency, repeated
from bench.reproduction.paper.models import kept_layers, package_folder, prune, save
from bench.reproduction.paper.results import read, update
from engine import RefineOptions, Refiner
from engine.options import DEFAULT_CONDITION
from engine.refiner import DEFAULT_CHECKPOINT
from engine.training.layout import rank
from engine.trajectories.dataset import load

ROOT = Path(__file__).parents[2]
WORDS = "a small refiner reads the draft of an answer and writes it again with fewer mistakes".split()


def rows(count: int) -> list[dict[str, Any]]:
    """As the public files have them; the answers of the last model in REAL are longest and best."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        responses = [
            {
                "model": name,
                "text": " ".join(rng.choices(WORDS, k=4 + 6 * place)),
                "reward": place / 7 + rng.random() / 10,
            }
            for place, name in enumerate(REAL)
        ]
        made.append({"prompt_id": f"p{number}", "prompt": f"Question {number}?", "responses": responses})
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(HELD_OUT + 6)))
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    data.prepare(folder / "responses.jsonl", tokenizer, folder / "data", limit=12, prompts=4)
    return folder


def test_held_out_prompts_are_in_no_training_file(prepared: Path) -> None:
    held_out = {row["prompt_id"] for row in lines(prepared / "data/held_out.jsonl")}
    assert held_out == {f"p{number}" for number in range(6, 6 + HELD_OUT)}
    for name, count in (("all", 6), ("train", 4), ("conditioned", 4)):
        kept = lines(prepared / f"data/{name}.jsonl")
        assert len(kept) == count
        assert not held_out & {row["prompt_id"] for row in kept}


def test_cut_responses_have_no_end_to_learn(prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    whole = {row["prompt_id"]: row["responses"] for row in rows(HELD_OUT + 6)}
    ends = set()
    trajectories = load(str(prepared / "data/train.jsonl"), tokenizer)
    for row, trajectory in zip(lines(prepared / "data/train.jsonl"), trajectories, strict=True):
        for response, ids, uncut in zip(row["responses"], trajectory.responses, whole[row["prompt_id"]], strict=True):
            truncated = response.get("truncated", False)
            assert uncut["text"].startswith(response["text"])
            assert truncated == (uncut["text"] != response["text"])
            assert (ids[-1] == tokenizer.eos_token_id) != truncated
            ends.add(truncated)
    assert ends == {True, False}


def test_a_shown_draft_is_also_the_one_in_the_answer(prepared: Path) -> None:
    plain = {row["prompt_id"]: row for row in lines(prepared / "data/train.jsonl")}
    for row in lines(prepared / "data/conditioned.jsonl"):
        before = plain[row["prompt_id"]]
        draft, best = row["responses"]
        assert row["prompt"] == DEFAULT_CONDITION.format(prompt=before["prompt"], draft=draft["text"])
        assert best["reward"] == max(response["reward"] for response in before["responses"]) > draft["reward"]


def test_half_a_character_is_cut_off() -> None:
    class Bytes:
        """Stands for a tokenizer of bytes."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    assert data.cut("naïve", 3, Bytes()) == ("na", True)  # type: ignore[arg-type]
    assert data.cut("naïve", 4, Bytes()) == ("naï", True)  # type: ignore[arg-type]
    assert data.cut("naïve", 6, Bytes()) == ("naïve", False)  # type: ignore[arg-type]


def test_a_pruned_model_is_the_whole_one_without_the_layers(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32).eval()
    count = whole.config.num_hidden_layers
    keep = count - 2
    prune(Path(DEFAULT_CHECKPOINT), keep, tmp_path)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[place] for place in kept_layers(count, keep)])
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert pruned.config.num_hidden_layers == keep
        torch.testing.assert_close(pruned(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)
    assert kept_layers(30, 24) == [*range(14), *range(20, 30)]  # the block in the function's words
    assert kept_layers(30, 30) == list(range(30))
    with pytest.raises(ValueError, match="2 to 30, got 31"):
        kept_layers(30, 31)


def test_a_checkpoint_with_missing_weights_is_not_written(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
    weights = model.state_dict()
    weights.pop("model.norm.weight")
    with pytest.raises(SystemExit, match=r"model\.norm\.weight"):
        save(model, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package"):
        package_folder("no_such_package")


def test_preferences_are_those_of_the_judge_against_a_common_reference() -> None:
    wanted = reward.preferences(torch.tensor([0.8, 0.5, 0.0, 0.999999]))
    assert wanted[0, 1].item() == pytest.approx(0.8)  # against what is as good as the reference
    odds = 4 / math.exp(-reward.CLIP)
    assert wanted[0, 2].item() == pytest.approx(odds / (1 + odds), rel=1e-6)
    assert torch.allclose(wanted + wanted.T, torch.ones(4, 4))
    scores, rewards = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.9, 0.2, 0.4])
    terms = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p = reward.preferences(rewards)[i, j].item()
        predicted = 1 / (1 + math.exp(scores[j].item() - scores[i].item()))
        terms.append(-p * math.log(predicted) - (1 - p) * math.log(1 - predicted))
    assert reward.pair_loss(scores, rewards).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def tiny_encoder(folder: Path) -> Path:
    """A random BERT with a vocabulary of WORDS."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(WORDS))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def judged(count: int, seed: int) -> list[dict[str, Any]]:
    """Answers whose reward is their share of one word."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        responses = []
        for name in REAL[:4]:
            words = [*rng.choices(WORDS, k=rng.randint(3, 9)), *["refiner"] * rng.randint(0, 6)]
            rng.shuffle(words)
            responses.append({"model": name, "text": " ".join(words), "reward": words.count("refiner") / len(words)})
        made.append({"prompt_id": number, "prompt": "reads it again", "responses": responses})
    return made


def test_a_reward_model_learns_what_the_judge_prefers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "LR", 3e-3)
    known, held_out = judged(64, 0), judged(12, 1)
    reward.train(list(known), tiny_encoder(tmp_path / "encoder"), tmp_path / "out", epochs=6, device="cpu")
    model = reward.load(tmp_path / "out")
    columns = reward.pairs(held_out, known, model)
    right = [a * b > 0 for a, b in zip(columns["judge"], columns["model"], strict=True)]
    assert sum(right) > 0.85 * len(right)
    # the scores are those of the checkpoint's own forward pass on prompt and answer, one at a time
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts = [response["text"] for response in held_out[0]["responses"]]
    ids = [tokenizer(held_out[0]["prompt"], text)["input_ids"] for text in texts]
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor([each])).logits.item() for each in ids]
    assert reward.score(model, [held_out[0]["prompt"]] * 4, texts) == pytest.approx(expected, abs=2e-4)


def test_pairs_know_lengths_authors_and_whether_the_best_author_is_one() -> None:
    class Longest:
        def score(self, pending: Sequence[Any]) -> list[float]:
            return [float(len(response.text)) for _, response in pending]

    known = [
        {"responses": [{"model": "x", "reward": 0.9}, {"model": "y", "reward": 0.1}, {"model": "z", "reward": 0.5}]}
    ]
    texts = {"x": ("abc", 0.2), "y": ("abcde", 0.4), "z": ("ab", 0.4)}
    held_out = [{"prompt": "?", "responses": [{"model": m, "text": t, "reward": r} for m, (t, r) in texts.items()]}]
    columns = reward.pairs(held_out, known, Longest())  # type: ignore[arg-type]
    assert columns == {
        "prompt": [0, 0], "judge": [-0.2, -0.2], "model": [-2.0, 1.0], "length": [-2, 1], "author": [0.8, 0.4],
        "top": [True, True],
    }  # fmt: skip  # y and z are equal for the judge: no pair


def test_trl_gets_no_end_behind_a_cut_response(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from bench.reproduction.paper import preference

    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)
    pairs = [preference.pair(row, tokenizer) for row in lines(prepared / "data/train.jsonl")]
    assert {pair["chosen_cut"] for pair in pairs} == {True}  # the best are the longest here
    assert {pair["rejected_cut"] for pair in pairs} == {False}
    for method in ("dpo", "simpo"):
        model = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
        trainer = preference.make_trainer(
            method, model, tokenizer, pairs, output_dir=str(tmp_path), use_cpu=True, max_length=512
        )
        for columns, trajectory in zip(
            trainer.train_dataset, load(str(prepared / "data/train.jsonl"), tokenizer), strict=True
        ):
            worst, *_, best = rank(trajectory)
            for side, expected in (("chosen", best), ("rejected", worst)):
                if method == "dpo":
                    assert columns["prompt_ids"] == list(trajectory.prompt_ids)
                    assert columns[f"{side}_ids"] == expected
                else:
                    assert columns[f"{side}_input_ids"] == [*trajectory.prompt_ids, *expected]
                    assert [label for label in columns[f"{side}_labels"] if label != -100] == expected


def test_drafts_are_answered_before_they_are_refined() -> None:
    names = [plan.name for plan in plans()]
    assert len(set(names)) == len(names)
    for place, plan in enumerate(plans()):
        assert plan.draft is None or plan.draft in REAL or plan.draft in names[:place]


def test_controls_replace_drafts_and_nothing_else(prepared: Path) -> None:
    held_out = lines(prepared / "data/held_out.jsonl")[:3]
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_CHECKPOINT)

    def of(control: str | None) -> list[str] | None:
        return answering.drafts(Plan("x", "y", REAL[0], control=control), held_out, prepared, tokenizer, 5)

    own = [row["responses"][0]["text"] for row in held_out]
    assert of(None) == own
    assert of("shuffled") == [own[1], own[2], own[0]]
    made = of("random")
    assert made is not None
    assert not set(made) & set(own)
    assert answering.drafts(Plan("x", "y", "base"), held_out, prepared, tokenizer, 5) is None


def test_answers_are_the_engines_and_are_not_made_twice(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        Plan("base", answering.SHIPPED),
        Plan("one step", answering.SHIPPED, REAL[5], steps=1),
        Plan("seen", answering.SHIPPED, "base", condition=True),
        Plan("no checkpoint", "nowhere"),
    ]
    monkeypatch.setattr(answering, "plans", lambda: iter(made))
    monkeypatch.setattr(sys, "argv", ["answers", "--folder", str(prepared), "--limit", "8", "--prompts", "2"])
    answering.main()
    held_out = lines(prepared / "data/held_out.jsonl")[:2]
    files = {path.stem: lines(path) for path in (prepared / "answers").glob("*.jsonl")}
    assert set(files) == {"base", "one step", "seen"}
    with Refiner.from_pretrained() as refiner:
        for row, alone, once, seen in zip(held_out, files["base"], files["one step"], files["seen"], strict=True):
            (expected,) = refiner.refine([{"prompt": row["prompt"]}], RefineOptions(max_new_tokens=8))
            assert alone["text"] == expected.text
            draft = row["responses"][5]["text"]
            options = RefineOptions(max_new_tokens=8, block_size=8, steps=1)
            (expected,) = refiner.refine([{"prompt": row["prompt"], "draft": draft}], options)
            assert (once["text"], once["draft"]) == (expected.text, draft)
            prompt = DEFAULT_CONDITION.format(prompt=row["prompt"], draft=alone["text"])
            (expected,) = refiner.refine([{"prompt": prompt}], RefineOptions(max_new_tokens=8))
            assert seen["text"] == expected.text
    times = {path: path.stat().st_mtime_ns for path in (prepared / "answers").iterdir()}
    answering.main()
    assert times == {path: path.stat().st_mtime_ns for path in (prepared / "answers").iterdir()}


def test_fluency_is_the_models_own_loss_of_the_answer() -> None:
    fluency = Fluency(Path(DEFAULT_CHECKPOINT))
    tokenizer = fluency.tokenizer
    chat = [{"role": "user", "content": "Question?"}]
    head = tokenizer(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), add_special_tokens=False
    )
    ids = head["input_ids"] + tokenizer("the draft of an answer", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(head["input_ids"]) + ids[len(head["input_ids"]) :]])
    with torch.no_grad():
        expected = fluency.model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    assert fluency.nats("Question?", "the draft of an answer") == pytest.approx(expected, abs=2e-4)
    assert fluency.nats("Question?", "") is None


def test_repeated_trigrams_are_counted() -> None:
    assert repeated("a b c d e") == 0.0
    assert repeated("a b c a b c a b c") == pytest.approx(4 / 7, abs=1e-4)  # of seven trigrams three differ
    assert repeated("a b") == 0.0


def test_sections_are_kept_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    update(path, "answers/a + b, 4 steps", {"reward": [1.0]})
    update(path, "answers/c", {"reward": [2.0]})
    update(path, "reward_model", {"judge": []})
    update(path, "answers/c", {"reward": [3.0]})
    assert read(path) == {
        "answers": {"a + b, 4 steps": {"reward": [1.0]}, "c": {"reward": [3.0]}},
        "reward_model": {"judge": []},
    }


def test_a_stage_is_timed_and_its_failure_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    for status in (3, 0):
        command = ["stage", "--results", str(path), "some", sys.executable, "-c", f"raise SystemExit({status})"]
        monkeypatch.setattr(sys, "argv", command)
        if status:
            with pytest.raises(SystemExit) as caught:
                stage.main()
            assert caught.value.code == status
            assert not path.exists()
        else:
            stage.main()
    assert set(read(path)["seconds"]["some"]) == {"clock", "processor"}


def test_what_was_made_from_older_files_is_made_again(tmp_path: Path) -> None:
    made, source = tmp_path / "made", tmp_path / "source"
    source.write_text("")
    assert not answering.current(made, source)
    made.write_text("")
    assert answering.current(made, source)
    os.utime(source, ns=(made.stat().st_mtime_ns + 1,) * 2)
    assert not answering.current(made, source)


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    """Of the settings it was begun with: models of a quick run would be taken for those of the whole one."""
    (tmp_path / "responses.jsonl").write_text("{}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings").write_text("limit 24, quick 1\n")
    command = ["sh", str(ROOT / "bench/reproduction/paper.sh"), "responses.jsonl", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run holds a run of: limit 24, quick 1; this one is: limit 96, prompts 240" in done.stderr
    assert "Give another folder" in done.stderr
