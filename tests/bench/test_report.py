"""The READMEs' tables are those of the committed results."""

import json
from pathlib import Path

import pytest

from bench.report import PAGES, TABLES, batching, consistency_loss, render, serving, sparse_loss, training_step


def test_readmes_show_the_committed_results() -> None:
    texts = [page.read_text() for page in PAGES]
    assert [render(text) for text in texts] == texts, "run python -m bench.report --write"
    assert sum(text.count(f"<!-- /{name} -->") for text in texts for name in TABLES) == len(TABLES)


def test_tables_say_what_the_results_say(tmp_path: Path) -> None:
    dense = {
        "shape": [512, 1024, 32000], "median_seconds": {"eager": 2.0, "compile": 1.5, "ours": 1.0}, "ours/eager": 0.5,
        "ours/compile": 0.6667, "ours beyond gradients / eager": 0.1,
    }  # fmt: skip
    errors = {name: {"target": 1e-3, "draft": 2e-3, "head": 3e-3} for name in ("eager", "compile", "ours, sparse 0.01")}
    seconds = {"eager": 2.0, "compile": 1.5, "ours, sparse 0.01": 0.75}
    states = {"median_seconds": seconds, "gradient errors": errors, "ours, sparse 0.01/compile": 0.51}
    results = {"machine": {}, "accuracy": {}, "bf16-32k-softcap": dense, "states-fp32": states}
    loss = consistency_loss(results).splitlines()[2:]
    assert loss == ["| 512 × 1,024 × 32,000 | bfloat16, soft-cap | 1.00 s | 0.50 | 0.67 | 0.100 |"]
    assert sparse_loss(results).splitlines()[2:] == [
        "| float32 | eager | 2.00 s | 1.33 | 1.0e-03 | 2.0e-03 | 3.0e-03 |",
        "| float32 | torch.compile | 1.50 s | 1.00 | 1.0e-03 | 2.0e-03 | 3.0e-03 |",
        "| float32 | sparse 0.01 | 0.75 s | 0.51 | 1.0e-03 | 2.0e-03 | 3.0e-03 |",
    ]
    assert sparse_loss({"bf16-32k-softcap": dense}) == "Not measured."
    (tmp_path / "consistency_loss_cpu.json").write_text(json.dumps(results))
    text = "before\n<!-- consistency-loss -->\nold\n<!-- /consistency-loss -->\nafter"
    assert render(text, tmp_path).splitlines()[-3:] == [loss[0], "<!-- /consistency-loss -->", "after"]
    with pytest.raises(FileNotFoundError):
        render(text, tmp_path / "absent")


def test_the_table_of_training_steps() -> None:
    row = {
        "model": "tiny", "dtype": "float32", "drafts": 3,
        "seconds": {"train_step": 9.0, "train_step, one by one": 0.456},
        "ratios": {"train_step": {"padded": [7.0, 8.0, 9.0]}, "train_step, one by one": {"padded": [0.984, 1.0, 1.25]}},
    }  # fmt: skip
    header, _, line = training_step({"rows": [row]}).splitlines()
    assert header == "| model | dtype | drafts | train_step | padded / |"
    assert line == "| tiny | float32 | 3 | 0.46 s | 1.00 (0.98 to 1.25) |"
    assert training_step({"rows": []}) == "Not measured."


def test_the_table_of_loads() -> None:
    found = {
        "sent": 1234, "answers/s": 41.6, "latency ms": {"p50": 1540.0, "p99": 2500.0}, "shed": 0, "lost": 0,
        "wrong answers": 0, "other errors": {}, "shed told after ms": None, "MiB resident": [],
    }  # fmt: skip
    over = found | {
        "shed": 500, "shed told after ms": {"p50": 0.84, "p99": 19.4}, "lost": 1, "wrong answers": 2, "other errors": {"E": 3},
        "MiB resident": [548.1, 554.4],
    }  # fmt: skip
    beside = {"64 clients": {"throughput, served / one process": 0.934, "p50 ms, served - one process": 61.04}}
    results = {"closed loop": found, "load 3": over, "sent in all": 2468, "against the engine in one process": beside}
    lines = serving(results).splitlines()[2:]
    assert lines == [
        "| closed loop | 1,234 | 42 | 1.5 s, 2.5 s | 0 |  | 0 |  |",
        "| 3 × capacity | 1,234 | 42 | 1.5 s, 2.5 s | 500 | 0.8 ms, 19 ms | 6 | 554 MiB |",
        "",
        "Beside an AsyncRefiner in the clients' own process, 64 clients: 0.93 of its answers/s, 61.0 ms later at the median.",
    ]


def test_the_table_of_batching() -> None:
    seconds = {"continuous": [1.0, 2.0, 4.0], "static": [1.1, 2.6, 4.8], "static, sorted": [1.0, 1.8, 4.4]}
    found = {
        "answers/s": {"continuous": 9.04}, "seconds": seconds,
        "static / continuous": 1.2, "static, sorted / continuous": 1.0,
    }  # fmt: skip
    assert batching({"machine": {}, "batch 8": found}).splitlines()[2:] == [
        "| 8 | 9.0 | 1.20 (1.10 to 1.30) | 1.00 (0.90 to 1.10) |"
    ]
