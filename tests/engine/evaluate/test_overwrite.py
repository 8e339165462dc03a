"""What --overwrite drops, what it keeps, and how it goes on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.evaluate.command import main
from engine.job.output import Claim
from tests.engine.evaluate import scorers
from tests.engine.evaluate.helpers import evaluate, questions, read
from tests.engine.job.stub import finish, start

FEW = ("--reward-at-steps", "none")


def refined(out: Path, name: str = "given") -> bytes:
    """With its timings: no two runs write the same."""
    return (out / "work" / f"{name}.refined.jsonl").read_bytes()


def test_refined_answers_do_not_depend_on_the_scorer(tmp_path: Path) -> None:
    rows = questions(3)
    _, out = evaluate(tmp_path, rows, *FEW)
    before, rewards = refined(out), [row["reward"] for row in read(out / "given.jsonl")]
    assert evaluate(tmp_path, rows, *FEW, "--overwrite", scorer="failing")[0] == 0
    assert refined(out) == before
    assert [row["reward"] for row in read(out / "given.jsonl")] != rewards
    assert evaluate(tmp_path, rows, *FEW, "--overwrite", "--seed", "5")[0] == 0
    assert refined(out) != before  # other options


def test_refined_answers_that_cannot_be_read_are_done_again(tmp_path: Path) -> None:
    rows = questions(3)
    _, out = evaluate(tmp_path, rows, *FEW)
    path = out / "work" / "given.refined.jsonl"
    path.write_bytes(b"damaged\n" + refined(out))
    assert evaluate(tmp_path, rows, *FEW)[0] == 2
    assert evaluate(tmp_path, rows, *FEW, "--overwrite")[0] == 0
    assert len(read(path)) == len(rows)


def test_nothing_of_the_old_evaluation_is_left(tmp_path: Path) -> None:
    rows = questions(3)
    _, out = evaluate(tmp_path, rows, "--controls", "alone", command="controls")
    (out / "judges").mkdir()
    (out / "judges" / "old.jsonl").write_text(json.dumps({"index": 0, "preference": 1.0}) + "\n")
    (out / "work" / "notes.txt").write_text("somebody's own")
    assert evaluate(tmp_path, rows[1:], *FEW, "--overwrite")[0] == 0
    assert not list((out / "judges").iterdir())
    assert not list((out / "work").glob("alone.*"))
    assert not (out / "alone.jsonl").exists()
    assert (out / "work" / "notes.txt").exists()


def test_what_another_process_writes_is_not_dropped(tmp_path: Path) -> None:
    rows = questions(3)
    _, out = evaluate(tmp_path, rows, *FEW)
    before = (out / "given.jsonl").read_bytes()
    with Claim(out / "work" / "drafts.scores.jsonl"):
        assert evaluate(tmp_path, rows, *FEW, "--overwrite")[0] == 2
    assert (out / "given.jsonl").read_bytes() == before


def test_an_overwriting_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    rows = questions(40)
    _, out = evaluate(tmp_path, rows, *FEW)
    (out / "judges").mkdir()
    (out / "judges" / "old.jsonl").write_text("")
    (out / "work" / "alone.refined.jsonl").write_text("")

    def run(limit: int | None, asked: Path) -> int:
        os.environ[scorers.ASKED] = str(asked)
        if limit:
            os.environ[scorers.KILL_AFTER] = str(limit)
        return evaluate(tmp_path, rows, *FEW, "--overwrite")[0]

    log = tmp_path / "log"
    assert finish(start(lambda: run(100, tmp_path / "first"), log)) == -signal.SIGKILL
    assert json.loads((out / "results.json").read_text())["overwriting"] is True
    assert not (out / "judges" / "old.jsonl").exists()
    assert not (out / "work" / "alone.refined.jsonl").exists()
    before = refined(out)
    assert finish(start(lambda: run(None, tmp_path / "second"), log)) == 0, log.read_text()
    assert refined(out) == before
    asked = [(tmp_path / name).read_text().splitlines() for name in ("first", "second")]
    assert len(set(asked[0]) & set(asked[1])) <= 32  # what was under way: one group
    assert "overwriting" not in json.loads((out / "results.json").read_text())
    assert finish(start(lambda: run(None, tmp_path / "third"), log)) == 0
    assert len((tmp_path / "third").read_text().splitlines()) == 2 * len(rows)  # anew: nothing was under way


def test_every_variant_says_what_it_was_measured_with(tmp_path: Path) -> None:
    rows = questions(6)
    _, out = evaluate(tmp_path, rows, *FEW, "--max-batch-size", "2")
    assert main(["report", str(out)]) == 0
    assert "Not all of it was measured" not in (out / "report.md").read_text()
    evaluate(tmp_path, rows, "--controls", "alone", "--max-batch-size", "3", command="controls")
    assert main(["report", str(out)]) == 0
    variants: dict[str, Any] = json.loads((out / "results.json").read_text())["variants"]
    sizes = {name: [run["max_batch_size"] for run in one["runs"]] for name, one in variants.items()}
    assert sizes == {"given": ["2"], "alone": ["3"]}
    text = (out / "report.md").read_text()
    assert "with up to 2 answers at once" in text
    assert "Not all of it was measured on the same setup" in text
    assert "alone: dtype float32, device cpu, max_batch_size 3" in text


def test_rows_of_two_setups_name_both(tmp_path: Path) -> None:
    rows = questions(5, ("one",))
    rows[2]["prompt"] = "A large question?"
    options = ("--max-new-tokens", "64", "--kv-cache-tokens")
    assert evaluate(tmp_path, rows, *FEW, *options, "500")[0] == 3
    status, out = evaluate(tmp_path, rows, *FEW, *options, "5000", "--retry-errors")
    assert status == 0
    runs = json.loads((out / "results.json").read_text())["variants"]["given"]["runs"]
    assert [run["kv_cache_tokens"] for run in runs] == ["500", "5000"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_is_done_again_by_overwrite(tmp_path: Path, overwrite: bool) -> None:
    rows = questions(5, ("one",))
    rows[2]["prompt"] = "A large question?"
    options = ("--max-new-tokens", "64", "--kv-cache-tokens")
    assert evaluate(tmp_path, rows, *FEW, *options, "500")[0] == 3
    again = ("--overwrite",) if overwrite else ()
    assert evaluate(tmp_path, rows, *FEW, *options, "5000", *again)[0] == (0 if overwrite else 3)
