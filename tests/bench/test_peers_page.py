"""How peers are measured, and what the page and the picture make of it."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.measure import RESULTS
from bench.peers import figures
from bench.peers.__main__ import batch_plan, limits, parse, prompts_of, read_rows
from bench.peers.answer import Answer, Cost
from bench.peers.catalogue import ARGS_CANDIDATES, CONVERGED, CORRECTOR, REFINER, REFINER_BEST_OF
from bench.peers.fluency import of_real_answers
from bench.peers.join import join
from bench.peers.measure import COLUMNS, measure
from bench.peers.plot import draw, lines, plot
from bench.peers.table import against_search, beaten, latencies, page, rewards
from engine import Request
from engine.evaluate.statistics import paired_bootstrap

COMMITTED = RESULTS / "peers.json"


class Fixed:
    """A peer that answers with one token, and notes when it was asked for what."""

    def __init__(self, name: str, token: int, log: list[str], largest: int | None = None) -> None:
        self.takes_draft, self.largest_batch = name == "DiffPO", largest
        self._name, self._token, self._log = name, token, log

    def answer(self, requests: Sequence[Request], drafts: Sequence[Answer]) -> list[Answer]:
        self._log.append(f"{self._name} {requests[0].seed} {len(requests)} {len(drafts)}")
        cost = Cost(draft=0.5, refinement=float(self._token), token_forwards=9, sequential_steps=4, reward_tokens=2)
        return [Answer(token_ids=[self._token], text="", cost=cost) for _ in requests]


class ByPlace:
    """Judges an answer by its prompt and token."""

    def judge(self, requests: Sequence[Request], answers: Sequence[Answer]) -> list[float]:
        return [10 * (r.seed or 0) + a.token_ids[0] for r, a in zip(requests, answers, strict=True)]


class ByWords:
    """Nats per token of a text are its number of words; it notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def nats(self, prompt: str, text: str) -> float | None:
        self.asked.append((prompt, text))
        return float(len(text.split())) if text else None


def settings(**changes: object) -> dict[str, object]:
    """What a run says of itself."""
    return {
        "machine": {"threads": 1},
        "settings": {
            "models": {"base": "b", "refiner": "r", "reward_model": "w", "corrector": None},
            "prompts": 6, "tokens": 8, "rounds": 1, "dtype": "float32", "temperature": 0.7, "candidates": 5,
        } | changes,
    }  # fmt: skip


def of_methods(scores: dict[str, float], nats: dict[str, float], prompts: int = 8, **changes: object) -> dict[str, Any]:
    """A run at batch 1 in which all answers of a method get the same reward, and about the same nats per token."""
    methods = {}
    for name, score in scores.items():
        columns: dict[str, list[Any]] = {column: [0] * prompts for column in COLUMNS}
        columns |= {"turn": list(range(prompts)), "prompt": list(range(prompts)), "cpu": [1.0] * prompts}
        columns |= {"score": [score] * prompts, "draft": [1.0] * prompts, "same": [None] * prompts}
        columns["nats"] = [nats[name] + 0.02 * prompt if name in nats else None for prompt in range(prompts)]
        methods[name] = {"batch 1": columns}
    real = {"prompt": list(range(prompts)), "nats": [2.0 + 0.02 * prompt for prompt in range(prompts)]}
    run = {"methods": methods, "loads": {"batch 1": [0.5] * prompts}, "left_out": 0, "real": {"alpaca-7b": real}}
    return run | settings(**changes)


def small_run(log: list[str], **changes: object) -> dict[str, object]:
    peers = {
        REFINER: Fixed("refiner", 2, log),
        CONVERGED: Fixed("DiffPO", 2, log),
        "best of 4": Fixed("best", 4, log, 1),
    }
    requests = [Request(prompt="p", seed=number) for number in range(6)]
    options = {"batches": {1: 2, 2: 4}, "rounds": 1, "limits": {CONVERGED: 3}, "record": lambda results: None} | changes
    return measure(Fixed("base", 1, log), peers, requests, ByPlace(), **options)  # type: ignore[arg-type]


def test_peers_take_turns_and_get_what_they_can_take() -> None:
    log: list[str] = []
    saved: list[str] = []
    results = small_run(log, record=lambda found: saved.append(json.dumps(found)))
    assert log == [
        "base 0 1 0", "base 0 1 0", "refiner 0 1 1", "DiffPO 0 1 1", "best 0 1 1",  # the first one is not timed
        "base 0 2 0", "base 0 2 0", "refiner 0 2 2", "DiffPO 0 2 2",  # "best" takes one at a time
        "base 1 1 0", "base 1 1 0", "DiffPO 1 1 1", "best 1 1 1", "refiner 1 1 1",  # the order has moved on by one
        "base 2 2 0", "base 2 2 0", "refiner 2 2 2",  # DiffPO may have three prompts
    ]  # fmt: skip
    assert [json.loads(text)["left_out"] for text in saved] == [3, 2, 1, 0]
    assert json.loads(saved[-1]) == json.loads(json.dumps(results))
    methods = results["methods"]
    assert methods["best of 4"].keys() == {"batch 1"}
    assert set(methods[REFINER]["batch 1"]) == set(COLUMNS)
    found = methods[CONVERGED]["batch 2"]
    assert found["prompt"] == [0, 1]
    assert found["score"] == [2, 12]
    assert found["same"] == [True, True]
    assert (found["draft"], found["refinement"], found["reward"]) == ([0.5, 0.5], [2.0, 2.0], [0.0, 0.0])
    assert (found["token_forwards"], found["sequential_steps"], found["reward_tokens"]) == ([9, 9], [4, 4], [2, 2])
    assert methods["best of 4"]["batch 1"]["same"] == [None, None]
    assert len(results["loads"]["batch 2"]) == 2
    assert results["left_out"] == 0
    late = small_run([], minutes=-1)
    assert (late["methods"], late["left_out"]) == ({}, 4)


def test_cpu_time_is_of_the_batch_and_of_its_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    methods = small_run([], batches={2: 4})["methods"]
    assert {name: found["batch 2"]["cpu"] for name, found in methods.items()} == {
        "base": [1] * 4, REFINER: [1] * 4, CONVERGED: [2] * 2,
    }  # fmt: skip


def test_answers_get_their_nats_per_token_once() -> None:
    words = ByWords()
    found = small_run([], fluency=words)["methods"]
    assert {value for of_size in found.values() for value in of_size["batch 1"]["nats"]} == {None}
    assert words.asked == [("p", "")]
    none = small_run([])["methods"]
    assert none[REFINER]["batch 2"]["nats"] == [None] * 4


def test_real_answers_are_cut_like_those_of_peers() -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
            return {"input_ids": text.split()}

        def decode(self, words: list[str]) -> str:
            return " ".join(words)

    responses = [{"model": model, "text": "one two three four", "reward": 0.5} for model in ("alpaca-7b", "another")]
    rows = [{"prompt": "p", "responses": responses}, {"prompt": "q", "responses": responses}]
    words = ByWords()
    found = of_real_answers(rows, words, Words(), 3)  # type: ignore[arg-type]
    assert found == {"alpaca-7b": {"prompt": [0, 1], "nats": [3.0, 3.0]}}
    assert words.asked == [("p", "one two three"), ("q", "one two three")]
    assert of_real_answers([{"prompt": "p"}], words, Words(), 3) == {}  # type: ignore[arg-type]


def test_broken_text_is_marked_and_no_contender() -> None:
    scores = {"base": 0.0, "best of 4": 1.0, REFINER: 2.0, "DiffPO, 1 step": 1.5, "DiffPO, 4 steps": 1.9}
    nats = {"base": 1.0, "best of 4": 1.0, REFINER: 1.5, "DiffPO, 1 step": 5.0, "DiffPO, 4 steps": 2.0}
    results = of_methods(scores, nats)
    assert "| DiffPO, 1 step (broken text) | 8 | 1.500 (1.500 to 1.500) |" in rewards(results)
    assert "| DiffPO, 4 steps | 8 |" in rewards(results)
    assert "| 1.07 (1.04 to 1.10) |" in rewards(results)
    assert "DiffPO, 4 steps | best of 4" in against_search(results)
    assert "1 step" not in against_search(results)
    assert "than: base; best of 4; DiffPO, 4 steps. " in beaten(results)
    text = page(results)
    assert "the same length: alpaca-7b 2.07." in text
    assert "A hollow point that no line joins is broken text." in text
    few = of_methods(scores, nats, prompts=5)
    assert "(broken text)" not in rewards(few)  # too few for an interval
    none = results | {"real": {}}
    assert "(broken text)" not in rewards(none)
    assert "no real models' answers to hold them against" in page(none)
    broken = of_methods(scores, nats | {REFINER: 5.0})
    assert beaten(broken) == f"The text of *{REFINER}* is broken: its reward is held against no other's."


def test_broken_text_is_hollow_and_on_no_curve() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    names = ["base", "DiffPO, 1 step", "DiffPO, 4 steps", CONVERGED, REFINER, REFINER_BEST_OF]
    results = of_methods(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0) | {"DiffPO, 1 step": 5.0})
    panel = figure.subplots()
    draw(results, "batch 1", panel)
    drawn = {bars.get_label(): bars.lines[0] for bars in panel.containers}
    assert set(drawn) == {
        "base", "refiner alone", REFINER_BEST_OF, "DiffPO, by steps", "DiffPO, by steps (broken text)",
    }  # fmt: skip
    hollow, curve = drawn["DiffPO, by steps (broken text)"], drawn["DiffPO, by steps"]
    assert (hollow.get_markerfacecolor(), hollow.get_linestyle(), len(hollow.get_xdata())) == ("none", "None", 1)
    assert (curve.get_markerfacecolor(), curve.get_linestyle(), len(curve.get_xdata())) == (curve.get_color(), "-", 2)


def test_search_on_top_of_the_refiner_is_search() -> None:
    results = of_methods({"base": 0.0, REFINER: 1.0, REFINER_BEST_OF: 2.0, CONVERGED: 1.0}, {})
    assert f"| {CONVERGED} | {REFINER_BEST_OF} | 8 | -1.000 (-1.000 to -1.000) |" in against_search(results)
    assert lines(results)[REFINER_BEST_OF] == [REFINER_BEST_OF]


def test_a_corrector_that_was_not_trained_is_called_so() -> None:
    results = of_methods({"base": 0.0, REFINER: 1.0, CORRECTOR: 0.5}, {})
    text = page(results)
    assert "| untrained corrector, token by token | 8 |" in rewards(results)
    assert "Aligner-style" not in text
    assert "in *untrained corrector*, where the refiner reads it in its prompt, for which it was not trained" in text
    assert lines(results)["untrained corrector"] == [CORRECTOR]
    assert "corrector" not in beaten(results)
    models = {"base": "b", "refiner": "r", "reward_model": "w", "corrector": "c"}
    trained = of_methods({"base": 0.0, REFINER: 1.0, CORRECTOR: 0.5}, {}, models=models)
    assert "in *Aligner-style*, where another refiner, c, reads it in its prompt." in page(trained)
    assert lines(trained)["Aligner-style"] == [CORRECTOR]
    assert f"than: base; {CORRECTOR}. " in beaten(trained)
    assert "untrained" not in page(trained)


def test_the_page_has_the_note_and_says_what_args_tried() -> None:
    results = of_methods({"base": 0.0, REFINER: 1.0}, {}, candidates=ARGS_CANDIDATES, development=True)
    assert "Note of the run: beside others." in page(results | {"note": "beside others"})
    assert "Note of the run" not in page(results)
    assert "ARGS tries 10 tokens a step. " in page(results)
    assert "; 6 development prompts, " in page(results)
    other = page(of_methods({"base": 0.0, REFINER: 1.0}, {}, candidates=5))
    assert "ARGS tries 5 tokens a step (its authors' default is 10)." in other
    assert "; 6 held-out prompts, " in other


def test_methods_are_beaten_where_both_were_measured() -> None:
    results = of_methods({"base": 0.0, "best of 4": 0.5, "best of 16": 0.5, REFINER: 1.0}, {})
    results["loads"]["batch 2"] = [0.5]
    for name in ("base", REFINER):
        results["methods"][name]["batch 2"] = results["methods"][name]["batch 1"]
    apart = results["methods"]["best of 16"]
    apart["batch 4"] = apart.pop("batch 1")  # measured at no size together with the refiner
    assert "both were measured (named where it is not all of them) than: base; best of 4 (batch 1). " in beaten(results)


def test_the_same_prompt_measured_twice_is_one_pair() -> None:
    one = of_methods({"base": 0.0, REFINER: 1.0}, {}, prompts=5)
    joined = join([one, one])
    columns = joined["methods"]["base"]["batch 1"]
    columns["cpu"] = [1.0, 2.0, 3.0, 4.0, 5.0] * 2
    found = figures.ratio(joined, "base", REFINER, "batch 1", cpu=True)
    assert found is not None
    assert (found.cases, found.prompts) == (10, 5)
    assert "(" not in latencies(joined, "batch 1").splitlines()[2]  # no interval of five


def test_figures_are_of_pairs() -> None:
    results = small_run([], batches={1: 5}, limits={"best of 4": 4}, rounds=2)
    columns = results["methods"]["best of 4"]["batch 1"]
    columns["refinement"] = [4.0, 9.5, 4.5, 1.5, 2.0, 7.0, 2.0, 2.0]
    assert figures.scores(results, "best of 4") == {0: 4, 1: 14, 2: 24, 3: 34}
    gain = figures.difference(results, "best of 4", REFINER)
    assert (gain.mean, gain.low, gain.high, gain.prompts) == (2, 2, 2, 4)
    ratio = figures.ratio(results, "best of 4", REFINER, "batch 1")
    expected = [math.log((value + 0.5) / 2.5) for value in columns["refinement"]]
    wanted = paired_bootstrap(expected, [0, 1, 2, 3] * 2)
    assert ratio is not None
    for got, value in zip((ratio.mean, ratio.low, ratio.high), (wanted.mean, wanted.low, wanted.high), strict=True):
        assert got == pytest.approx(math.exp(value))
    assert figures.ratio(results, "best of 4", REFINER, "batch 8") is None
    for name, seconds in ((REFINER, 2.0), ("best of 4", 3.0)):
        found = results["methods"][name]["batch 1"]
        found["cpu"] = [seconds] * len(found["prompt"])
    of_cpu = figures.ratio(results, "best of 4", REFINER, "batch 1", cpu=True)
    assert of_cpu is not None
    assert of_cpu.low == pytest.approx(1.5)
    assert of_cpu.high == pytest.approx(1.5)


def test_tables_say_what_the_results_say(tmp_path: Path) -> None:
    results = small_run([], batches={1: 6, 2: 4}, limits={}) | settings()
    for name, measured in results["methods"].items():
        for found in measured.values():
            found["cpu"] = [3.0 if name == "base" else 4.0] * len(found["prompt"])
    assert rewards(results).splitlines()[2:4] == [
        "| base | 6 | 26.000 (12.667 to 39.333) |  | -1.000 (-1.000 to -1.000) |  | 1.0 |",
        "| refiner, token by token | 6 | 27.000 (13.667 to 40.333) | +1.000 (+1.000 to +1.000) |  |  | 1.0 |",
    ]
    lines_of_two = latencies(results, "batch 2").splitlines()
    assert lines_of_two[2] == "| base | 4 | 1.50 | 1.50 | 0.50 + 1.00 + 0.00 | 0.60 | 3.00 | 0.75 | 9 | 4 | 2 |  |"
    assert lines_of_two[-1].startswith("| DiffPO, converged | 4 | 2.50 | 2.50 |")
    assert lines_of_two[-1].endswith("| 4 of 4 |")
    assert "best of 4" in latencies(results, "batch 1")
    assert "best of 4" not in latencies(results, "batch 2")
    text = page(results)
    worse = text.split("(named where it is not all of them) than: ")[1]
    assert worse.startswith("none. ")  # the base model's reward is lower, and so is its time
    for found in results["methods"]["base"].values():
        found["cpu"] = [5.0] * len(found["cpu"])
    assert "than: base. The interval of the difference in reward excludes zero for: base." in page(results)
    assert "All answers that must have the same tokens have them." in text
    assert "| DiffPO, converged | best of 4 | 6 | -2.000 (-2.000 to -2.000) |" in text
    assert "for which it was not trained" in text
    results["settings"]["models"]["corrector"] = "c"
    assert "another refiner, c, reads it in its prompt" in page(results)
    results["methods"][CONVERGED]["batch 1"]["same"][0] = False
    assert "Answers with other tokens than they must have: {'DiffPO, converged': 1}." in page(results)
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert lines(results)["DiffPO, by steps"] == [CONVERGED]


def test_runs_are_joined_if_their_settings_are_the_same() -> None:
    parts = [small_run([], batches={1: 2}), small_run([], batches={1: 1, 2: 4})]
    for number, part in enumerate(parts):
        part |= {"settings": {"tokens": 8}, "machine": {"load_before": number}}
    joined = join(parts)
    found = joined["methods"][REFINER]
    assert found["batch 1"]["turn"] == [0, 1, 2]
    assert found["batch 1"]["prompt"] == [0, 1, 0]
    assert found["batch 2"] == parts[1]["methods"][REFINER]["batch 2"]
    assert {batch: len(loads) for batch, loads in joined["loads"].items()} == {"batch 1": 3, "batch 2": 2}
    assert joined["machine"] == {"load_before": 0}
    assert joined["machines"] == [{"load_before": 0}, {"load_before": 1}]
    assert parts[0]["methods"][REFINER]["batch 1"]["turn"] == [0, 1]
    assert joined["left_out"] == 0
    parts[0]["left_out"], parts[1]["left_out"] = 3, 4
    assert join(parts)["left_out"] == 7
    for name in ("threads", "cpu"):
        parts[1]["machine"][name] = 2
        with pytest.raises(ValueError, match=f"same {name}, got None and 2"):
            join(parts)
        del parts[1]["machine"][name]
    for different in ({"tokens": 9}, {"tokens": 8, "development": True}):
        parts[1]["settings"] = different
        with pytest.raises(ValueError, match="same settings"):
            join(parts)


def test_the_command_line(tmp_path: Path) -> None:
    assert batch_plan("1:8,8:16,32", 32) == {1: 8, 8: 16, 32: 32}
    assert batch_plan("4:9", 6) == {4: 6}
    assert limits(["ARGS=8", "refiner, l=2"], ["base", "ARGS, weight 1", "refiner, lookahead"]) == {
        "ARGS, weight 1": 8,
        "refiner, lookahead": 2,
    }
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{number}"}) + "\n" for number in range(100)))
    assert [(one.prompt, one.seed) for one in prompts_of(read_rows(data, 3))] == [("60", 0), ("61", 1), ("62", 2)]
    assert read_rows(data, 2, development=True) == [{"prompt": "20"}, {"prompt": "21"}]
    needed = ["--base", "b", "--refiner", "r", "--reward-model", "w", "--data", "d"]
    assert parse(needed).args_candidates == ARGS_CANDIDATES == 10
    with pytest.raises(SystemExit):
        parse(["--base", "b"])


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    assert COMMITTED.with_suffix(".md").read_text() == page(json.loads(COMMITTED.read_text())), (
        "run python -m bench.peers.table"
    )
