"""The record beside an output: what is in it, and what makes it another one."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import RefineOptions, Refiner
from engine.job.output import difference
from engine.job.settings import SAMPLE_BYTES, WHOLE_BYTES, checkpoint_digest, job_settings
from engine.job.source import Source
from engine.refine import LOAD_DEFAULTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something shaped like a checkpoint."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (path / "README.md").write_text("words")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' * 5)
    return path


def settings(rows: Path, folder: Path, load: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    switches = {name: changes.pop(name, default) for name, default in (("token_ids", False), ("ordered", True))}
    options = RefineOptions(**changes)
    return job_settings(Source.open(str(rows)), None, folder, {**LOAD_DEFAULTS, **(load or {})}, options, **switches)


def test_the_command_has_the_defaults_of_from_pretrained() -> None:
    parameters = inspect.signature(Refiner.from_pretrained).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert defaults == {**LOAD_DEFAULTS, "trust_remote_code": False}


def test_the_record_is_json(rows: Path, folder: Path) -> None:
    record = settings(rows, folder, condition="{prompt}{draft}é")
    assert json.loads(json.dumps(record)) == record


def test_a_moved_input_and_model_are_the_same(rows: Path, folder: Path, tmp_path: Path) -> None:
    before = settings(rows, folder)
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(rows, other / "renamed.jsonl")
    shutil.copytree(folder, other / "model")
    (other / "model" / "README.md").write_text("other words")
    assert difference(before, settings(other / "renamed.jsonl", other / "model")) is None


@pytest.mark.parametrize(
    ("load", "changes", "named"),
    [
        ({"dtype": "bfloat16"}, {}, "model dtype 'float32', now 'bfloat16'"),
        ({"device": "cuda:1"}, {}, "model device 'cpu', now 'cuda'"),
        ({"backend": "hf"}, {}, "model backend 'auto', now 'hf'"),
        ({}, {"steps": 3}, "options steps None, now 3"),
        ({}, {"window": 4}, "options window 'auto', now 4"),
        ({}, {"seed": 1}, "options seed 0, now 1"),
        ({}, {"token_ids": True}, "output token_ids False, now True"),
        ({}, {"ordered": False}, "output order 'input', now 'as finished'"),
    ],
)
def test_a_change_is_named(load: dict[str, Any], changes: dict[str, Any], named: str, rows: Path, folder: Path) -> None:
    assert difference(settings(rows, folder), settings(rows, folder, load, **changes)) == named


def test_every_refine_option_counts(rows: Path, folder: Path) -> None:
    recorded = set(settings(rows, folder)["options"])
    assert recorded == {name for name in RefineOptions.__dataclass_fields__ if name != "concurrency"}


def test_capacity_does_not_count(rows: Path, folder: Path) -> None:
    load = {"max_batch_tokens": 7, "kv_cache_tokens": 300, "max_batch_size": 2}
    assert difference(settings(rows, folder), settings(rows, folder, load)) is None


@pytest.mark.parametrize(
    ("load", "max_new_tokens", "expected"),
    [
        ({}, 256, 5),  # the rows there are
        ({"max_batch_size": 3}, 256, 3),
        ({"kv_cache_tokens": 512}, 256, 2),
        ({"kv_cache_tokens": 32}, 256, 1),
    ],
)
def test_windows_are_planned_for_what_can_run_at_once(
    load: dict[str, Any], max_new_tokens: int, expected: int, rows: Path, folder: Path
) -> None:
    assert settings(rows, folder, load, max_new_tokens=max_new_tokens)["plan"] == {"concurrency": expected}


def test_another_input_is_another_job(rows: Path, folder: Path) -> None:
    before = settings(rows, folder)
    rows.write_text(rows.read_text().replace("a", "b", 1))
    assert difference(before, settings(rows, folder)) == "another content of the input"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_changed_byte_of_a_small_file_is_another_model(name: str, folder: Path) -> None:
    before = checkpoint_digest(folder)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    assert checkpoint_digest(folder) != before


def test_a_large_file_is_sampled_from_end_to_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = WHOLE_BYTES + 12345
    path.write_bytes(bytes(size))
    seen = {checkpoint_digest(folder)}
    for start in (0, size // 2, size - SAMPLE_BYTES):
        data = bytearray(size)
        data[start : start + 2 * SAMPLE_BYTES] = b"\1" * min(2 * SAMPLE_BYTES, size - start)
        path.write_bytes(data)
        seen.add(checkpoint_digest(folder))
    path.write_bytes(bytes(size + 1))
    seen.add(checkpoint_digest(folder))
    assert len(seen) == 5
