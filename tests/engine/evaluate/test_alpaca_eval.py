"""The public AlpacaEval package reads what is exported, and counts given preferences as we do. Skipped without the package
(it needs pandas, scikit-learn and others): ``pip install alpaca-eval``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.evaluate.command import main
from engine.evaluate.statistics import length_controlled_win_rate
from tests.engine.evaluate.helpers import evaluate, questions, read

alpaca_eval = pytest.importorskip("alpaca_eval", reason="the package alpaca-eval is not installed")
COUNT = 30


def given_preferences(base: list[dict[str, Any]], refined: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A judge's file of annotations: 1 .. 2, sure or not."""
    rng = np.random.default_rng(0)
    return [
        {
            "instruction": one["instruction"],
            "output_1": one["output"],
            "output_2": other["output"],
            "annotator": "given",
            "preference": round(1 + float(rng.random()), 3),
        }
        for one, other in zip(base, refined, strict=True)
    ]


@pytest.fixture
def judged(tmp_path: Path) -> dict[str, Any]:
    """Exported answers put through ``alpaca_eval.evaluate``: its own annotator, which finds every verdict in its cache."""
    _, out = evaluate(tmp_path, questions(COUNT, ("one",)), "--reward-at-steps", "none")
    assert main(["export", str(out), "--format", "alpaca_eval"]) == 0
    files = {name: out / "alpaca_eval" / f"{name}.json" for name in ("one", "one+refined")}
    cache = tmp_path / "cache.json"
    cache.write_text(json.dumps(given_preferences(*(json.loads(path.read_text()) for path in files.values()))))
    config = tmp_path / "given" / "configs.yaml"
    config.parent.mkdir()
    (config.parent / "prompt.txt").write_text("<|im_start|>user\n{instruction}{output_1}{output_2}<|im_end|>")
    config.write_text(
        f"given:\n  prompt_template: {config.parent / 'prompt.txt'}\n  fn_completions: openai_completions\n"
        "  completions_kwargs: {model_name: none}\n  fn_completion_parser: ranking_parser\n"
    )
    leaderboard, annotations = alpaca_eval.evaluate(
        model_outputs=str(files["one+refined"]), reference_outputs=str(files["one"]), annotators_config=str(config),
        precomputed_leaderboard=None, output_path=str(tmp_path / "alpaca"), is_return_instead_of_print=True,
        fn_metric="get_winrate", sort_by="win_rate", caching_path=str(cache),
    )  # fmt: skip
    return {"out": out, "leaderboard": leaderboard, "annotations": annotations, "folder": tmp_path}


def test_every_exported_answer_is_read_and_every_verdict_comes_back(judged: dict[str, Any]) -> None:
    row = judged["leaderboard"].loc["one+refined"]
    assert row["n_total"] == COUNT
    written = judged["folder"] / "alpaca" / "given" / "annotations.json"
    written = written if written.exists() else next((judged["folder"] / "alpaca").rglob("annotations.json"))
    arguments = ["import", str(judged["out"]), "--format", "alpaca_eval", "--input", str(written), "--name", "judge"]
    assert main(arguments) == 0
    verdicts = read(judged["out"] / "judges" / "judge.jsonl")
    assert [verdict["index"] for verdict in verdicts] == list(range(COUNT))
    assert 100 * np.mean([verdict["preference"] for verdict in verdicts]) == pytest.approx(row["win_rate"], abs=1e-9)
    assert main(["report", str(judged["out"])]) == 0
    shown = json.loads((judged["out"] / "results.json").read_text())["figures"]["judges"]["judge"]
    assert 100 * shown["win_rate"]["mean"] == pytest.approx(row["win_rate"], abs=1e-9)


@pytest.mark.parametrize("difficulty", [False, True])
def test_length_control_is_theirs_where_the_model_is_the_same(
    judged: dict[str, Any], difficulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their GLM without baselines to be pulled to and without a penalty; the difficulties it downloads are drawn here."""
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    frame = pd.DataFrame(judged["annotations"]).reset_index(drop=True)
    frame["index"] = range(len(frame))
    rng = np.random.default_rng(1)
    lengths = rng.integers(20, 900, (2, len(frame)))  # the stub's differ too little
    frame["output_1"], frame["output_2"] = (["x" * int(n) for n in row] for row in lengths)
    hard = rng.normal(size=len(frame))
    table = judged["folder"] / "difficulty.csv"
    pd.DataFrame({"model": "m", "index": range(len(frame)), "instruction_difficulty": hard}).to_csv(table, index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **options: str(table))
    name = "length_controlled_noreg" if difficulty else "length_controlled_minimal"
    info = {**glm_winrate.GLM_INFO[name], "kwargs": {"n_splits": 0, "C": 1e6, "tol": 1e-8, "max_iter": 10000}}
    theirs = glm_winrate.get_length_controlled_winrate(frame, glm_name=name, save_weights_dir=None, glm_info=info)
    ours = length_controlled_win_rate(
        frame["preference"] - 1, lengths[1], lengths[0], difficulty=hard if difficulty else None, draws=2
    )
    # their data name the side by characters of output_1 less output_2, and liblinear stops early
    assert 100 * ours.mean == pytest.approx(theirs["length_controlled_winrate"], abs=0.02)
