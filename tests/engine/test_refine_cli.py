"""The batch job, as ``main(argv)`` and as a process: rows in, rows out, exit status."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine import RefineOptions, Refiner, refine
from engine.options import DEFAULT_CONDITION

MAX_NEW = 12
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OUTPUT_FIELDS = {"id", "index", "text", "steps", "converged", "forward_tokens", "finish_reason", "error"}
GOOD: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Name a colour", "draft": "red or blue", "source": {"file": "x", "line": 3}},
    {"prompt": "Say hello", "draft": ""},
    {"id": 7, "messages": [{"role": "user", "content": "What is 1+1?"}], "draft": "two \u2028\u00e4"},
    {"id": "ids", "prompt_ids": [5, 6, 7], "draft_ids": [8, 9, 10], "seed": "carried, not used"},
    {"id": "plain", "prompt": "No draft at all", "note": None},
]
BAD: list[bytes] = [
    b'{"prompt": "broken"',
    b"[1, 2]",
    b"{}",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "two", "prompt_ids": [1]}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "nan", "x": NaN}',
    b'{"prompt": "big", "x": 1e999}',
    b'{"prompt_ids": [99999999]}',
    b'{"prompt_ids": []}',
    b'{"messages": [{"role": "assistant", "content": "x"}]}',
    b'{"prompt": "half a pair \\ud800"}',
    b'{"id": [1], "prompt": "x"}',
    b'{"messages": ' + b"[" * 985 + b"]" * 985 + b"}",
    b"[" * 100000,
    b"null",
    b"\x00",
]


@pytest.fixture(scope="session")
def cli_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and a tokenizer whose tokens are the bytes."""
    folder = tmp_path_factory.mktemp("cli_model")
    special = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cli_refiner(cli_model: Path) -> Iterator[Refiner]:
    with Refiner.from_pretrained(cli_model) as refiner:
        yield refiner


def lines(rows: Sequence[dict[str, Any] | bytes]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parse(output: bytes) -> list[dict[str, Any]]:
    assert output.endswith(b"\n") or not output
    return [json.loads(line) for line in output.split(b"\n")[:-1]]


def run(cli_model: Path, tmp_path: Path, content: bytes, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and rows of ``main`` for an input."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    arguments = ["--model", str(cli_model), "--input", str(source), "--output", str(target)]
    status = refine.main([*arguments, "--max-new-tokens", str(MAX_NEW), *options])
    return status, parse(target.read_bytes())


def command(cli_model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "engine.refine", "--model", str(cli_model), *options]


def expected(refiner: Refiner, **options: Any) -> list[dict[str, Any]]:
    """What the output must hold for GOOD, from ``Refiner.refine``."""
    names = ("id", "prompt", "messages", "prompt_ids", "draft", "draft_ids")
    requests = [{name: row[name] for name in names if name in row} for row in GOOD]
    results = refiner.refine(requests, RefineOptions(max_new_tokens=MAX_NEW, **options))
    rows = []
    for row, result in zip(GOOD, results, strict=True):
        carried = {name: value for name, value in row.items() if name not in names}
        own = {name: getattr(result, name) for name in OUTPUT_FIELDS - {"error"}}
        rows.append({**carried, **own, "error": None})
    return rows


def test_good_rows_equal_refine_called_directly(cli_model: Path, cli_refiner: Refiner, tmp_path: Path) -> None:
    assert run(cli_model, tmp_path, lines(GOOD)) == (0, expected(cli_refiner))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--steps 2", {"steps": 2}),
        ("--keep-prefix 3", {"keep_prefix": 3}),
        ("--window 2 --no-realign", {"window": 2, "realign": False}),
        ("--window auto", {"window": "auto"}),
        ("--temperature 0.8 --top-p 0.9 --seed 5", {"temperature": 0.8, "top_p": 0.9, "seed": 5}),
    ],
)
def test_options_reach_the_engine(
    cli_model: Path, cli_refiner: Refiner, tmp_path: Path, arguments: str, options: dict[str, Any]
) -> None:
    status, rows = run(cli_model, tmp_path, lines(GOOD), *arguments.split())
    assert status == 0
    compared = ("id", "text", "converged", "finish_reason")
    want = expected(cli_refiner, **options)
    assert [[row[name] for name in compared] for row in rows] == [[row[name] for name in compared] for row in want]


@pytest.mark.parametrize(("value", "template"), [([], DEFAULT_CONDITION), (["{draft} for {prompt}"],) * 2])
def test_condition_with_and_without_a_value(
    cli_model: Path, cli_refiner: Refiner, tmp_path: Path, value: list[str], template: str | list[str]
) -> None:
    template = template if isinstance(template, str) else template[0]
    status, rows = run(cli_model, tmp_path, lines(GOOD[:1]), "--condition", *value)
    options = RefineOptions(max_new_tokens=MAX_NEW, condition=template)
    request = {name: GOOD[0][name] for name in ("prompt", "draft")}
    assert (status, rows[0]["text"]) == (0, cli_refiner.refine([request], options)[0].text)


def test_model_options_reach_the_engine(cli_model: Path, cli_refiner: Refiner, tmp_path: Path) -> None:
    arguments = (
        "--backend hf --dtype float32 --device cpu --max-batch-tokens 64 --kv-cache-tokens 512 --max-batch-size 2"
    )
    status, rows = run(cli_model, tmp_path, lines(GOOD), *arguments.split())
    assert status == 0
    assert [row["index"] for row in rows] == list(range(len(GOOD)))
    status, rows = run(cli_model, tmp_path, lines(GOOD), "--kv-cache-tokens", "32", "--max-new-tokens", "40")
    assert (status, rows[0]["error"]["type"]) == (3, "RequestTooLong")


def test_token_ids_on_request(cli_model: Path, cli_refiner: Refiner, tmp_path: Path) -> None:
    _, rows = run(cli_model, tmp_path, lines(GOOD[:1]), "--token-ids")
    assert set(rows[0]) == OUTPUT_FIELDS | {"source", "token_ids"}
    request = {name: GOOD[0][name] for name in ("prompt", "draft")}
    direct = cli_refiner.refine([request], RefineOptions(max_new_tokens=MAX_NEW))[0]
    assert rows[0]["token_ids"] == direct.token_ids


def test_bad_rows_keep_their_place_and_change_no_other_row(
    cli_model: Path, cli_refiner: Refiner, tmp_path: Path
) -> None:
    mixed: list[dict[str, Any] | bytes] = []
    for i, bad in enumerate(BAD):
        mixed += [GOOD[i % len(GOOD)], bad]
    # with window auto steps and forward_tokens depend on how many rows run at once
    status, rows = run(cli_model, tmp_path, lines(mixed), "--window", "4")
    assert status == 3
    assert [row["index"] for row in rows] == list(range(len(mixed)))
    want = expected(cli_refiner, window=4)
    for i, (good, refused) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        reference = want[i % len(GOOD)]
        identity = {"index": 2 * i, "id": 2 * i if i % len(GOOD) == 1 else reference["id"]}
        assert good == {**reference, **identity}
        assert refused["error"]["type"] == "InvalidRequest", BAD[i][:80]
        assert refused["error"]["message"]
        assert (refused["text"], refused["steps"], refused["finish_reason"]) == (None, 0, "error")


def test_what_an_error_row_says(cli_model: Path, tmp_path: Path) -> None:
    bad = [b"", b'{"prompt": "x",', b"  \r", b'{"id": "b", "draft": "no prompt", "kept": [1]}']
    status, rows = run(cli_model, tmp_path, lines(bad))
    assert status == 3
    assert [(row["id"], row["index"]) for row in rows] == [(0, 0), ("b", 1)]
    assert rows[0]["error"]["message"].startswith("line 2 is not valid JSON: ")
    assert rows[1]["kept"] == [1]
    assert "prompt_ids" in rows[1]["error"]["message"]


def test_carried_fields_come_back_as_they_were(cli_model: Path, tmp_path: Path) -> None:
    carried = {"metadata": {"a": [1.5, None, "\u00e4"]}, "half": "\ud800", "seed": -1, "nested": [[{}]], "text": "old"}
    status, rows = run(cli_model, tmp_path, lines([{**GOOD[1], **carried}]))
    assert status == 0
    assert {name: rows[0][name] for name in carried if name != "text"} == {
        k: v for k, v in carried.items() if k != "text"
    }
    assert rows[0]["text"] != "old"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_no_rows(cli_model: Path, tmp_path: Path, content: bytes) -> None:
    assert run(cli_model, tmp_path, content) == (0, [])


def test_byte_order_mark_windows_line_ends_and_no_last_line_end(cli_model: Path, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines(GOOD).replace(b"\n", b"\r\n").rstrip()
    status, rows = run(cli_model, tmp_path, content)
    assert (status, len(rows)) == (0, len(GOOD))


def test_output_is_replaced_only_once_the_model_is_there(cli_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(b'{"old": true}\n')
    assert run(tmp_path / "missing", tmp_path, lines(GOOD)) == (2, [{"old": True}])
    status, rows = run(cli_model, tmp_path, lines(GOOD))
    assert (status, len(rows)) == (0, len(GOOD))


@pytest.mark.parametrize(
    "arguments",
    [
        "--unknown 1",
        "--step 1",
        "--window wide",
        "--steps two",
    ],
)
def test_options_that_argparse_refuses(cli_model: Path, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        refine.main(["--model", str(cli_model), "--input", "x", "--output", "y", *arguments.split()])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "--steps 0",
        "--temperature -1",
        "--top-p 0",
        "--condition draft",
        "--dtype int8",
        "--backend fast",
        "--max-batch-size 0",
        "--device nowhere",
        "--input missing.jsonl",
        "--output missing/folder/out.jsonl",
        "--output .",
        "--model /missing",
    ],
)
def test_options_that_are_wrong_end_with_one_line(
    cli_model: Path,
    tmp_path: Path,
    arguments: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(lines(GOOD))
    required = ["--model", str(cli_model), "--input", "in.jsonl", "--output", "out.jsonl"]
    assert refine.main([*required, *arguments.split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("engine.refine: error: ")
    assert errors.count("\n") == 1


def test_unsupported_model(cli_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in cli_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert run(folder, tmp_path, lines(GOOD), "--backend", "lean")[0] == 2
    assert "relu" in capsys.readouterr().err


def test_output_must_not_be_the_input(cli_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD))
    assert refine.main(["--model", str(cli_model), "--input", str(file), "--output", str(file)]) == 2
    assert file.read_bytes() == lines(GOOD)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(cli_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(GOOD))
    assert refine.main(["--model", str(cli_model), "--input", str(source), "--output", "/dev/full"]) == 1
    assert "No space left" in capsys.readouterr().err


def test_summary_and_progress_lines(
    cli_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(refine, "FLUSH_SECONDS", 0.0)
    status, rows = run(cli_model, tmp_path, lines([*GOOD, b"{"]))
    errors = capsys.readouterr().err.splitlines()
    assert (status, len(rows)) == (3, len(GOOD) + 1)
    assert len(errors) == len(GOOD) + 2
    assert errors[-1].startswith(f"engine.refine: {len(GOOD) + 1} rows, 1 errors, ")
    for measure in ("tokens/s", "steps per answer", "token-forwards per output token"):
        assert measure in errors[-1]


def test_lines_larger_than_the_buffer(cli_refiner: Refiner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "BUFFER_BYTES", 64)
    rows = [{"prompt": "x", "long": "y" * size} for size in (1, 200, 3)]
    target = io.BytesIO()
    refine.refine_file(cli_refiner, io.BytesIO(lines(rows)), target, RefineOptions(max_new_tokens=2), False)
    assert [len(row["long"]) for row in parse(target.getvalue())] == [1, 200, 3]


def test_reads_no_further_ahead_than_the_engine_works(cli_refiner: Refiner) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield lines(GOOD[:1])

    results = cli_refiner.stream(map(refine.to_request, refine.read_jsonl(endless())), RefineOptions(max_new_tokens=2))
    with contextlib.closing(results):  # type: ignore[type-var]
        next(results)
    assert taken < 200


def test_importing_the_module_and_help_read_no_model() -> None:
    code = "import engine.refine, threading; assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_standard_input_and_output(cli_model: Path, cli_refiner: Refiner) -> None:
    arguments = ["--input", "-", "--output", "-", "--max-new-tokens", str(MAX_NEW)]
    done = subprocess.run(command(cli_model, *arguments), input=lines(GOOD), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert parse(done.stdout) == expected(cli_refiner)


def test_process_status_of_bad_rows_and_options(cli_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"{\n")
    files = ["--input", str(source), "--output", str(target)]
    assert subprocess.run(command(cli_model, *files), capture_output=True, timeout=300).returncode == 3
    done = subprocess.run(command(cli_model, *files, "--unknown"), capture_output=True, timeout=300)
    assert done.returncode == 2
    assert b"--unknown" in done.stderr


def test_reader_of_the_output_goes_away(cli_model: Path) -> None:
    arguments = command(cli_model, "--input", "-", "--output", "-", "--max-new-tokens", "2")
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(lines(GOOD), timeout=300)
    assert process.returncode == 1
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_ctrl_c_leaves_the_finished_rows_as_whole_lines(cli_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    rows = [{"id": f"row {i}", "prompt": "go on", "pad": "x" * 5000} for i in range(100_000)]
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(rows))
    arguments = command(cli_model, "--input", str(source), "--output", str(target), "--max-new-tokens", "2")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (target.exists() and target.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    done = parse(target.read_bytes())
    assert 0 < len(done) < len(rows)
    assert [row["id"] for row in done] == [row["id"] for row in rows[: len(done)]]
    assert "interrupted" in errors
    assert f"{len(done)} rows" in errors
    assert "Traceback" not in errors


class Kept:
    """A refiner that stays open for the next example."""

    def __init__(self, refiner: Refiner) -> None:
        self.stream = refiner.stream

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *error: object) -> None:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
field_values = json_values | st.lists(st.integers(-1, 300), max_size=4)
field_names = st.sampled_from(
    "id prompt messages prompt_ids draft draft_ids seed metadata index text error other".split()
)
row_lines = st.dictionaries(field_names, field_values, max_size=4).map(lambda row: json.dumps(row).encode())
cut_lines = st.tuples(row_lines, st.integers(0, 40)).map(lambda pair: pair[0][: pair[1]])
any_lines = st.one_of(row_lines, cut_lines, json_values.map(lambda v: json.dumps(v).encode()), st.binary(max_size=30))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(any_lines.map(lambda line: line.replace(b"\n", b" ")), max_size=8))
def test_every_line_yields_one_row(content: list[bytes], cli_refiner: Refiner, tmp_path: Path) -> None:
    with mock.patch.object(Refiner, "from_pretrained", autospec=True, return_value=Kept(cli_refiner)):
        status, rows = run(tmp_path, tmp_path, b"".join(line + b"\n" for line in content), "--max-new-tokens", "3")
    assert len(rows) == sum(bool(line.strip()) for line in content)
    assert [row["index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert set(row) >= OUTPUT_FIELDS
        if row["error"] is None:
            assert isinstance(row["text"], str)
        else:
            assert row["error"]["type"] in ("InvalidRequest", "RequestTooLong")
            assert row["error"]["message"]
    assert status == (3 if any(row["error"] for row in rows) else 0)
