"""What comes out of a run: a refiner that loads, LoRA merged or not, a log; and in which batches it learned."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from engine import RefineOptions, Refiner
from engine.refiner import DEFAULT_CHECKPOINT
from engine.training import trainer as trainer_module
from engine.training.checkpoint import checkpoints
from engine.training.data import EpochBatches, padded_shares, thinned
from tests.engine.training.runs import assert_same, log_of, make_model, optimizer_state, run, small_run, weights


@pytest.mark.parametrize("tied", [True, False])
def test_the_refiner_loads(tied: bool, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tied=tied)
    sampling = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=2, pad_token_id=3)
    fields = {
        **json.loads(sampling.to_json_string()),
        "do_sample": False,
    }  # as some are published: not savable as it is
    (base / "generation_config.json").write_text(json.dumps(fields))
    settings = small_run(tmp_path / "run", model=str(base), steps=2, epochs=1.0)
    assert run(settings) == 0
    folder = Path(settings["output"], "model")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert ("lm_head.weight" in weights(folder)) is not tied
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == 2
    tokenizer, came = (AutoTokenizer.from_pretrained(path) for path in (folder, DEFAULT_CHECKPOINT))
    assert tokenizer.chat_template == came.chat_template
    assert tokenizer.model_max_length == came.model_max_length
    with Refiner.from_pretrained(folder) as refiner:
        [result] = refiner.refine([{"prompt_ids": [7, 8, 9], "draft_ids": [5, 6]}], RefineOptions(max_new_tokens=12))
    expected = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    assert result.token_ids == expected


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lr": 1e-2}], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_refiner_is_saved_in_another_dtype(dtype: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The same training, each weight rounded once; checkpoints as before."""
    exact, rounded = (small_run(tmp_path, output=str(tmp_path / name), **changes) for name in ("exact", "rounded"))
    assert run(exact) == 0
    assert run({**rounded, "save_dtype": dtype}) == 0
    trained, saved = (weights(tmp_path / name / "model") for name in ("exact", "rounded"))
    assert_same(saved, {name: value.to(getattr(torch, dtype)) for name, value in trained.items()})
    optimizers = [optimizer_state(tmp_path / name / "checkpoint-9") for name in ("exact", "rounded")]
    assert_same(*optimizers)
    assert json.loads((tmp_path / "rounded" / "model" / "config.json").read_text())["dtype"] == dtype
    with Refiner.from_pretrained(tmp_path / "rounded" / "model") as refiner:
        [result] = refiner.refine([{"prompt_ids": [7, 8, 9], "draft_ids": [5, 6]}], RefineOptions(max_new_tokens=4))
    assert result.error is None


def test_weights_beyond_float16_are_not_saved_as_infinity(tmp_path: Path, capfd: Any) -> None:
    settings = small_run(tmp_path, steps=1, epochs=1.0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"])
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-5)
        model.model.norm.weight[0] = 1e5  # float16 ends at 65504
    model.save_pretrained(settings["model"])
    assert run({**settings, "save_dtype": "float16"}) == 1
    said = capfd.readouterr().err
    assert "save_dtype=float16 cannot hold the weights of model.norm.weight" in said
    assert not Path(settings["output"], "model").exists()
    assert run({**settings, "save_dtype": "bfloat16"}) == 0
    assert weights(Path(settings["output"], "model"))["model.norm.weight"][0].isfinite()


def test_lora(tmp_path: Path) -> None:
    """Adapters alone are trained, kept and gone on from; the refiner is the base with them added."""
    settings = small_run(
        tmp_path, lora_rank=2, lora_alpha=6, lora_dropout=0.2, lora_targets=["q_proj", "down_proj"], lr=1e-2
    )
    output, base = Path(settings["output"]), Path(settings["model"])
    before = weights(base)
    assert run(settings) == 0
    assert not (output / "checkpoint-9" / "model.safetensors").exists()
    assert_same(weights(base), before)
    after = weights(output / "model")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    merged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "checkpoint-9")
    for name, value in merged.merge_and_unload().state_dict().items():
        if name in after:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    trained = sum(len(group["params"]) for group in optimizer_state(output / "checkpoint-9")["param_groups"])
    assert trained == 2 * 2 * 2
    Refiner.from_pretrained(output / "model").close()


def test_lora_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lora_rank": 2, "lora_dropout": 0.2, "save_every": 4}
    whole, broken = (small_run(tmp_path, output=str(tmp_path / name), **changes) for name in ("whole", "broken"))
    assert run(whole) == 0

    def fail(*_: Any) -> None:
        raise OSError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RefinerTrainer, "save_refiner", fail)
        patch.setattr(trainer_module, "remove_old", lambda *_: (_ for _ in ()).throw(OSError("cut")))
        assert run(broken) == 1
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["checkpoint-4"]
    assert run(broken) == 0
    assert_same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "broken" / "model"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")


TRACKER = """
logged = []

class SummaryWriter:
    def __init__(self, **options):
        self.folder = options["log_dir"]

    def add_text(self, *_):
        pass

    def add_scalar(self, tag, value, step):
        logged.append((tag, step, value))

    def flush(self):
        pass

    def close(self):
        pass
"""


def test_a_tracker_gets_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through transformers' own integration, with a stand-in for the package that it writes to."""
    package = tmp_path / "packages" / "tensorboardX"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(package.parent)
    # what transformers would take where there are both
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = small_run(tmp_path, report_to="tensorboard", steps=2, epochs=1.0, log_every=1)
    assert run(settings) == 0
    logged = {(tag, step): value for tag, step, value in sys.modules.pop("tensorboardX").logged}
    names = [(name, "train/") for name in ("loss", "ar", "consistency", "learning_rate", "grad_norm")]
    names += [(name, "eval/") for name in ("eval_loss", "eval_ar", "eval_consistency")]
    lines = log_of(Path(settings["output"]))
    found = [
        (logged[prefix + name.removeprefix("eval_"), line["step"]], line[name])
        for line in lines
        for name, prefix in names
        if name in line
    ]
    assert len(found) == 2 * 5 + 3
    assert all(told == kept for told, kept in found)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(processes: int) -> None:
    alone = EpochBatches(22, 4, 4, seed=7, process=0, processes=1)
    shared = [EpochBatches(22, 4, 1, seed=7, process=r, processes=processes) for r in range(processes)]
    seen = []
    for epoch in range(2):
        for batches in (alone, *shared):
            batches.set_epoch(epoch)
        micro = 4 // processes
        parts = [list(batches) for batches in shared]
        assert all(len(part) == len(batches) == 5 * micro for part, batches in zip(parts, shared, strict=True))
        for step, batch in enumerate(alone):
            mine = [place for part in parts for one in part[step * micro : (step + 1) * micro] for place in one]
            assert sorted(mine) == sorted(batch)
            assert len(set(batch)) == 4
        seen.append([place for batch in alone for place in batch])
        assert len(set(seen[-1])) == 20
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("count", "size", "processes"), [(5, 2, 1), (5, 2, 2), (1, 4, 3), (8, 2, 2), (7, 3, 2)])
def test_evaluation_counts_every_row_once_in_equally_many_batches(count: int, size: int, processes: int) -> None:
    shares = [list(padded_shares(count, size, process=r, processes=processes)) for r in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(place for share in shares for places, counts in share if counts for place in places) == list(
        range(count)
    )
    assert all(places for share in shares for places, _ in share)


def test_of_many_responses_some_are_kept() -> None:
    ranked = [[index] for index in range(11)]
    assert thinned(ranked, 6) == [[0], [2], [4], [6], [8], [10]]
    assert thinned(ranked, 1) == [[10]]
    assert thinned(ranked, 2) == [[0], [10]]
    assert thinned(ranked, 11) == thinned(ranked, 99) == ranked
