"""The command: options, exit status, what it refuses, help, standard input and output."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import Refiner, refine
from engine.options import DEFAULT_CONDITION
from tests.engine.job.helpers import GOOD, MAX_NEW, call, command, expected, lines, parse, planned, run, timeless


def test_good_rows_equal_refine_called_directly(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    status, rows = run(model, tmp_path, lines(GOOD))
    assert (status, timeless(rows)) == (0, expected(refiner, GOOD, planned(len(GOOD))))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--steps 2", {"steps": 2}),
        ("--steps 1 --block-size 5", {"steps": 1, "block_size": 5}),
        ("--keep-prefix 3", {"keep_prefix": 3}),
        ("--max-new-tokens 5", {"max_new_tokens": 5}),
        ("--window 2 --no-realign", {"window": 2, "realign": False}),
        ("--window auto", {"window": "auto"}),
        ("--temperature 0.8 --top-p 0.9 --seed 5", {"temperature": 0.8, "top_p": 0.9, "seed": 5}),
    ],
)
def test_options_reach_the_engine(
    model: Path, refiner: Refiner, tmp_path: Path, arguments: str, options: dict[str, Any]
) -> None:
    status, rows = run(model, tmp_path, lines(GOOD), *arguments.split())
    assert (status, timeless(rows)) == (0, expected(refiner, GOOD, planned(len(GOOD), **options)))


@pytest.mark.parametrize(
    ("value", "template"), [([], DEFAULT_CONDITION), (["{draft} for {prompt}"], "{draft} for {prompt}")]
)
def test_condition_with_and_without_a_value(
    model: Path, refiner: Refiner, tmp_path: Path, value: list[str], template: str
) -> None:
    status, rows = run(model, tmp_path, lines(GOOD[:1]), "--condition", *value)
    assert (status, timeless(rows)) == (0, expected(refiner, GOOD[:1], planned(1, condition=template)))


def test_token_ids_on_request(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    _, rows = run(model, tmp_path, lines(GOOD), "--token-ids")
    assert timeless(rows) == expected(refiner, GOOD, planned(len(GOOD)), token_ids=True)


def test_model_options_reach_the_engine(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    arguments = (
        "--backend hf --dtype float32 --device cpu --max-batch-tokens 64 --kv-cache-tokens 512 --max-batch-size 2"
    )
    status, rows = run(model, tmp_path, lines(GOOD), *arguments.split())
    assert status == 0
    assert [row["index"] for row in rows] == list(range(len(GOOD)))


def test_size_of_the_cache_reaches_the_engine(model: Path, tmp_path: Path) -> None:
    status, rows = run(model, tmp_path, lines(GOOD), "--kv-cache-tokens", "32", "--max-new-tokens", "40")
    assert status == 3
    assert {row["error"]["type"] for row in rows} == {"RequestTooLong"}
    assert "kv_cache_tokens" in rows[0]["error"]["message"]


@pytest.mark.parametrize("size", ["1", "3"])
def test_how_much_runs_at_once_changes_no_answer(model: Path, refiner: Refiner, tmp_path: Path, size: str) -> None:
    _, rows = run(model, tmp_path, lines(GOOD), "--max-batch-size", size)
    answers = [{name: row[name] for name in ("text", "converged", "finish_reason")} for row in rows]
    direct = expected(refiner, GOOD, planned(len(GOOD)))
    assert answers == [{name: row[name] for name in answers[0]} for row in direct]


@pytest.mark.parametrize(
    "arguments",
    ["--unknown 1", "--step 1", "--window wide", "--steps two", "--on-error skip", "--grace soon"],
)
def test_options_that_argparse_refuses(model: Path, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        refine.main(["--model", str(model), "--input", "x", "--output", "y", *arguments.split()])
    assert stopped.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("left_out", ["--input", "--output"])
def test_input_and_output_must_be_given(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        refine.main([word for name in ("--input", "--output") if name != left_out for word in (name, "x.jsonl")])
    assert stopped.value.code == 2
    assert left_out in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--steps 0", "steps must be an integer >= 1 or None, got 0"),
        ("--temperature -1", "got -1.0"),
        ("--top-p 0", "got 0.0"),
        ("--condition draft", "'draft'"),
        ("--dtype int8", "'int8'"),
        ("--backend fast", "'fast'"),
        ("--max-batch-size 0", "got 0"),
        ("--device nowhere", "nowhere"),
        ("--input missing.jsonl", "missing.jsonl"),
        ("--input .", "Is a directory"),
        ("--input in.parquet", "in.parquet is not a Parquet file"),
        ("--output missing/folder/out.jsonl", "missing/folder/out.jsonl"),
        ("--output .", "must be a file"),
        ("--output out.parquet", "got the name 'out.parquet': use .jsonl"),
        ("--output in.jsonl", "is the input"),
        ("--model /missing", "/missing"),
        ("--questions missing.jsonl", "missing.jsonl"),
        ("--data-parallel", "RANK"),
    ],
)
def test_options_that_are_wrong_end_with_one_line_and_leave_no_trace(
    model: Path,
    tmp_path: Path,
    arguments: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("in.jsonl").write_bytes(lines(GOOD))
    Path("in.parquet").write_bytes(b"PAR1 nothing PAR1")
    required = ["--model", str(model), "--input", "in.jsonl", "--output", "out.jsonl"]
    assert refine.main([*required, *arguments.split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("engine.refine: error: ")
    assert says in errors
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.parquet"]
    assert Path("in.jsonl").read_bytes() == lines(GOOD)


@pytest.mark.parametrize("before", [None, b"", b'{"old": true}\n'])
def test_model_that_cannot_be_loaded_leaves_everything_as_it_was(
    model: Path, tmp_path: Path, before: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    target = tmp_path / "out.jsonl"
    if before is not None:
        target.write_bytes(before)
    overwrite = ["--overwrite"] * bool(before)
    assert run(folder, tmp_path, lines(GOOD), "--backend", "lean", *overwrite)[0] == 2
    assert "relu" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} - {"out.jsonl"} == {"model", "in.jsonl"}
    assert (target.read_bytes() if target.exists() else None) == before


def test_output_of_something_else_is_refused_and_replaced_only_on_request(
    model: Path, refiner: Refiner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_bytes(b'{"old": true}\n')
    assert run(model, tmp_path, lines(GOOD)) == (2, [{"old": True}])
    assert "--overwrite" in capsys.readouterr().err
    assert run(tmp_path / "missing", tmp_path, lines(GOOD), "--overwrite") == (2, [{"old": True}])
    status, rows = run(model, tmp_path, lines(GOOD), "--overwrite")
    assert (status, timeless(rows)) == (0, expected(refiner, GOOD, planned(len(GOOD))))
    capsys.readouterr()
    done = target.read_bytes()
    assert call(model, tmp_path / "in.jsonl", target, "--seed", "1") == 2
    assert "options seed 0, now 1" in capsys.readouterr().err
    assert target.read_bytes() == done


def test_error_of_the_program_itself_is_shown_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def broken(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("a defect")
        return 1

    monkeypatch.setattr("engine.job.report.Statistics.add", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run(model, tmp_path, lines(GOOD))
    assert [row["index"] for row in parse((tmp_path / "out.jsonl").read_bytes())] == [0, 1, 2]


def test_stop_at_the_first_error(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"id": "the bad one", "prompt": 5}
    status, rows = run(model, tmp_path, lines([*GOOD[:2], bad, *GOOD[2:]]), "--on-error", "stop")
    assert (status, [row["index"] for row in rows]) == (3, [0, 1])
    errors = capsys.readouterr().err
    assert "stopped at row 2 (id 'the bad one'): InvalidRequest: prompt must be a string, got int" in errors


def test_rows_as_they_finish(model: Path, refiner: Refiner, tmp_path: Path) -> None:
    rows = [{"prompt": "a long answer"}, {"prompt_ids": [3], "draft": 1}, *GOOD]
    status, done = run(model, tmp_path, lines(rows), "--unordered", "--window", "2")
    assert status == 3
    assert done[0]["index"] == 1  # an error is there at once
    want = expected(refiner, [rows[0], *GOOD], planned(len(rows), window=2))
    for row, place in zip(want, [0, *range(2, len(rows))], strict=True):
        row["id"], row["index"] = (place if row["id"] == row["index"] else row["id"]), place
    finished = sorted(timeless(done), key=lambda row: row["index"])
    assert [row for row in finished if not row["error"]] == want


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_standard_output(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(GOOD))
    real = os.dup(1)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), 1)
    try:
        status = call(model, source, Path("-"))
    finally:
        os.dup2(real, 1)
        os.close(real)
    assert status == 1
    assert "No space left" in capfd.readouterr().err


def test_help_and_importing_read_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, threading, engine.refine; assert threading.active_count() == 1\n"
        "engine.refine.main(['--help'])"
    )  # fmt: skip
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--input", "--output", "--on-error", "--retry-errors", "prompt_ids", "choices", "exit status", "130"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 128


def test_every_option_is_explained_with_its_default() -> None:
    parser = refine.build_parser()
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, True, "==SUPPRESS=="):
            assert str(action.default) in (action.help % vars(action)), action.option_strings


def test_standard_input_and_output(model: Path, refiner: Refiner) -> None:
    arguments = ["--input", "-", "--output", "-", "--max-new-tokens", str(MAX_NEW)]
    done = subprocess.run(command(model, *arguments), input=lines([*GOOD, b"{"]), capture_output=True, timeout=300)
    assert done.returncode == 3, done.stderr.decode()
    rows = parse(done.stdout)
    assert timeless(rows[:-1]) == expected(refiner, GOOD, planned(None))
    assert rows[-1]["error"]["message"].startswith(f"line {len(GOOD) + 1} is not valid JSON: ")


def test_reader_of_the_output_goes_away(model: Path) -> None:
    arguments = command(model, "--input", "-", "--output", "-", "--max-new-tokens", "2")
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(lines(GOOD), timeout=300)
    assert process.returncode == 1
    assert b"Broken pipe" in errors
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors
