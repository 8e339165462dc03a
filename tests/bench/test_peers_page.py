"""How peers are measured, and what the page and the picture make of it."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.measure import RESULTS
from bench.peers import figures
from bench.peers.__main__ import batch_plan, limits, parse, read_prompts
from bench.peers.answer import Answer, Cost
from bench.peers.catalogue import CONVERGED, REFINER
from bench.peers.join import join
from bench.peers.measure import COLUMNS, measure
from bench.peers.plot import lines, plot
from bench.peers.table import latencies, page, rewards
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


def small_run(log: list[str], **changes: object) -> dict[str, object]:
    peers = {
        REFINER: Fixed("refiner", 2, log),
        CONVERGED: Fixed("DiffPO", 2, log),
        "best of 4": Fixed("best", 4, log, 1),
    }
    requests = [Request(prompt="p", seed=number) for number in range(5)]
    options = {"batches": {1: 2, 2: 4}, "rounds": 1, "limits": {CONVERGED: 3}, "record": lambda results: None} | changes
    return measure(Fixed("base", 1, log), peers, requests, ByPlace(), **options)  # type: ignore[arg-type]


def test_peers_take_turns_and_get_what_they_can_take() -> None:
    log: list[str] = []
    saved: list[str] = []
    results = small_run(log, record=lambda found: saved.append(json.dumps(found)))
    assert log == [
        "base 0 1 0", "refiner 0 1 1", "DiffPO 0 1 1", "best 0 1 1",
        "base 0 2 0", "refiner 0 2 2", "DiffPO 0 2 2",  # "best" takes one at a time
        "base 1 1 0", "DiffPO 1 1 1", "best 1 1 1", "refiner 1 1 1",  # the order has moved on by one
        "base 2 2 0", "refiner 2 2 2",  # DiffPO may have three prompts
    ]  # fmt: skip
    assert len(saved) == 4
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


def test_figures_are_of_pairs() -> None:
    results = small_run([], batches={1: 5}, limits={"best of 4": 4}, rounds=2)
    columns = results["methods"]["best of 4"]["batch 1"]
    columns["refinement"] = [4.0, 9.5, 4.5, 1.5, 2.0, 7.0, 2.0, 2.0]
    assert figures.scores(results, "best of 4") == {0: 4, 1: 14, 2: 24, 3: 34}
    gain = figures.difference(results, "best of 4", REFINER)
    assert (gain.mean, gain.low, gain.high, gain.prompts) == (2, 2, 2, 4)
    ratio = figures.ratio(results, "best of 4", REFINER, "batch 1")
    expected = [math.log((value + 0.5) / 2.5) for value in columns["refinement"]]
    wanted = paired_bootstrap(expected)
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
    results = small_run([], batches={1: 5, 2: 4}, limits={})
    for name, measured in results["methods"].items():
        for found in measured.values():
            found["cpu"] = [3.0 if name == "base" else 4.0] * len(found["prompt"])
    assert rewards(results).splitlines()[2:4] == [
        "| base | 5 | 21.000 (9.000 to 33.000) |  | -1.000 (-1.000 to -1.000) | 1.0 |",
        "| refiner, token by token | 5 | 22.000 (10.000 to 34.000) | +1.000 (+1.000 to +1.000) |  | 1.0 |",
    ]
    lines_of_two = latencies(results, "batch 2").splitlines()
    assert lines_of_two[2] == "| base | 4 | 1.50 | 1.50 | 0.50 + 1.00 + 0.00 | 0.60 | 3.00 | 0.75 | 9 | 4 | 2 |  |"
    assert lines_of_two[-1].startswith("| DiffPO, converged | 4 | 2.50 | 2.50 |")
    assert lines_of_two[-1].endswith("| 4 of 4 |")
    assert "best of 4" in latencies(results, "batch 1")
    assert "best of 4" not in latencies(results, "batch 2")
    results |= {
        "machine": {"threads": 1},
        "settings": {
            "models": {"base": "b", "refiner": "r", "reward_model": "w", "corrector": None},
            "prompts": 5, "tokens": 8, "rounds": 1, "dtype": "float32", "temperature": 0.7, "candidates": 5,
        }
    }  # fmt: skip
    text = page(results)
    worse = text.split("at every batch size than: ")[1]
    assert worse.startswith("none. ")  # the base model's reward is lower, and so is its time
    for found in results["methods"]["base"].values():
        found["cpu"] = [5.0] * len(found["cpu"])
    assert "batch size than: base. The interval of the difference in reward excludes zero for: base." in page(results)
    assert "All answers that must have the same tokens have them." in text
    assert "| DiffPO, converged | best of 4 | 5 | -2.000 (-2.000 to -2.000) |" in text
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
    parts[1]["settings"] = {"tokens": 9}
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
    assert [request.prompt for request in read_prompts(data, 3)] == ["60", "61", "62"]
    assert [request.prompt for request in read_prompts(data, 2, development=True)] == ["20", "21"]
    with pytest.raises(SystemExit):
        parse(["--base", "b"])


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    assert COMMITTED.with_suffix(".md").read_text() == page(json.loads(COMMITTED.read_text())), (
        "run python -m bench.peers.table"
    )
