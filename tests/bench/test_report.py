"""The pages show the committed results, all of them, and no figure that is not from them."""

import json
import re
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from bench.measure import command
from bench.report.html import standalone
from bench.report.pages import PAGES, ROOT, TEMPLATES, fill, included, stated, with_parts
from bench.report.results import SOURCES, UNUSED, Results, about, listing
from bench.report.tables import batching, consistency_loss, serving, sparse_loss, training_step

PAGE = Results().folder / "README.md"
NAMES = re.compile(r"\b(b?float\d+|135M|sm_\d+)")
"""Digits that are part of a name."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.parent.name))
def test_pages_show_the_committed_results(path: Path) -> None:
    assert PAGES[path](path, Results()) == path.read_text(), "run make report"


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.md")), ids=lambda path: path.name)
def test_no_figure_is_typed(template: Path) -> None:
    text = template.read_text()
    for filled_or_code in (r"\{\{.*?\}\}", r"\{%.*?%\}", r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(filled_or_code, "", text, flags=re.DOTALL)
    text = NAMES.sub("", text)
    typed = [line for line in text.splitlines() if re.search(r"\d", line)]
    assert not typed, "take it from the results, or name with stated() the file that says it"


def test_readme_measured_is_all_made() -> None:
    section = re.search(r"^## Measured\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    assert re.fullmatch(r"\s*<!-- measured -->.*<!-- /measured -->\s*", section[1], re.DOTALL)


def test_every_result_is_shown_or_said_not_to_be() -> None:
    results, text = Results(), PAGE.read_text()
    assert not SOURCES.keys() & UNUSED.keys()
    assert set(results) <= SOURCES.keys() | UNUSED.keys(), (
        "say in bench/report/results.py where it is shown, or why not"
    )
    assert {name for name, source in SOURCES.items() if not source.optional} <= set(results)
    for name in set(results) & SOURCES.keys():
        start = text.index(f"## {SOURCES[name].section}\n")
        section = text[start : text.find("\n## ", start)]
        assert f"*[{name}.json]({name}.json). Hardware: " in section
    for folder in (path.parent.name for path in results.folder.glob("*/*.json")):
        assert f"[{folder}/]({folder})" in text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (results.folder / picture).exists()


def test_a_run_says_what_it_noted_and_what_it_did_not(tmp_path: Path) -> None:
    machine = {
        "cpu": "C",
        "cores": 2,
        "threads": 1,
        "torch": "2.13",
        "triton": None,
        "load_before": 0.123,
        "commit": "abc",
    }
    (tmp_path / "job.json").write_text(json.dumps({"machine": machine, "note": "others ran"}))
    assert about(Results(tmp_path), "job") == (
        "*[job.json](job.json). Hardware: C, 2 cores, threads: 1; versions: torch 2.13; load: 0.12 before;"
        " spread: not recorded: one run; command: `python -m bench.bench_job`, its arguments not recorded; commit: abc;"
        " date: not recorded.*"
        " Note of the run: others ran."
    )
    (tmp_path / "job.json").write_text(json.dumps({"machine": {"command": "python -m bench.bench_job --rows 5"}}))
    assert "Hardware: not recorded" in about(Results(tmp_path), "job")
    assert "command: `python -m bench.bench_job --rows 5`; commit" in about(Results(tmp_path), "job")


def test_a_command_names_files_without_their_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "--drafts", "/some/folder/d.jsonl", "--out=/a/b.json", "bench/suite", "a note"]
    )
    assert command().endswith(" --drafts d.jsonl --out=b.json bench/suite 'a note'")


def with_links_to(results: Results, folder: Path) -> Results:
    """A folder that shows the same results, and has room for more."""
    for path in results.folder.iterdir():
        (folder / path.name).symlink_to(path)
    return Results(folder)


def test_results_that_may_be_missing_have_their_section_when_they_are_there(tmp_path: Path) -> None:
    results = with_links_to(Results(), tmp_path)
    for name in ("peers.json", "peers.md", "peers.png"):
        (tmp_path / name).unlink(missing_ok=True)
    assert "## Other systems" not in fill("results.md", results)
    (tmp_path / "peers.json").write_text(json.dumps({"machine": {"cpu": "C"}}))
    assert "Hardware: C;" in (text := fill("results.md", results))
    assert "Its tables are not made yet." in text
    (tmp_path / "peers.md").write_text("# Peers\n\n| a |\n| --- |\n| 1 |\n\n## More\n")
    text = fill("results.md", results)
    assert "## Other systems\n\n*[peers.json](peers.json). Hardware: C;" in text
    assert "### Peers\n\n| a |" in text
    assert "### More" in text
    assert "| [peers.json](peers.json) | Other systems |" in listing(results)
    assert "peers.png" not in text
    (tmp_path / "peers.png").write_bytes(b"")
    assert "![Other systems](peers.png)" in fill("results.md", results)


def test_what_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text("{}")
    with pytest.raises((UndefinedError, KeyError)):
        fill("measured.md", Results(tmp_path))
    with pytest.raises(KeyError, match=r"serve\.json is not there"):
        Results(tmp_path)["serve"]
    with pytest.raises(FileNotFoundError):
        included(Results(tmp_path), "peers")
    with pytest.raises(ValueError, match="does not say '7 wonders'"):
        stated("7 wonders", "LICENSE")
    assert stated("Apache License", "LICENSE") == "Apache License"


def test_the_page_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "page.md").write_text(
        "# Title & more\n\n| a |\n| --- |\n| 1 |\n\n![shown](a.png) [other](b.json)"
        " [below](#paper-s-tables)\n\n## Paper s, `tables`\n"
    )
    html = standalone(tmp_path / "page.md", tmp_path / "build")
    assert "<title>Title &amp; more</title>" in html
    assert '<img src="data:image/png;base64,cGljdHVyZQ=="' in html
    assert "<td>1</td>" in html
    assert '<a href="../b.json">' in html
    whole = standalone(PAGE, ROOT / "build")
    for link in re.findall(r'href="([^"]*)"', whole):
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in whole
        else:
            assert ":" in link or (ROOT / "build" / link.split("#")[0]).resolve().exists(), link
    pictures = re.findall(r'src="([^"]{0,40})', whole)
    assert pictures
    assert all(source.startswith("data:image/png;base64,") for source in pictures)


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
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- consistency-loss -->\nold\n<!-- /consistency-loss -->\nafter")
    made = with_parts(page, Results(tmp_path)).splitlines()
    assert made[0] == "before"
    assert made[-3:] == [loss[0], "<!-- /consistency-loss -->", "after"]


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
