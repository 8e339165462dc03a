"""The report: one file that needs nothing else, with every figure, and whatever a text holds."""

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.evaluate.command import main
from engine.evaluate.figures import figures
from engine.evaluate.results import Results
from tests.engine.evaluate.helpers import evaluate, questions

HOSTILE = '<script>alert("x")</script> | </pre><img src="http://example.org/x.png">'


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = questions(12)
    rows[3] = {**rows[3], "draft": HOSTILE + "e" * 40, "category": HOSTILE}
    tmp_path = tmp_path_factory.mktemp("report")
    _, folder = evaluate(tmp_path, rows, "--controls", "alone,steps", "--reward-at-steps", "2", command="controls")
    assert main(["report", str(folder)]) == 0
    return folder


def test_the_page_needs_nothing_else(out: Path) -> None:
    page = Page((out / "report.html").read_text())
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == len(list(out.glob("*.png"))) == 4
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in sources)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    assert HOSTILE in page.text  # as text


def test_figures_stand_in_both_forms(out: Path) -> None:
    main_figures = figures(Results.read(out))["variants"]["given"]
    page, text = Page((out / "report.html").read_text()).text, (out / "report.md").read_text()
    for name in ("difference", "base_reward", "reward"):
        one = main_figures[name]
        shown = f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
        assert shown in page
        assert shown in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    heads = [i for i, line in enumerate(tables) if "---" in line and set(line) <= set("|- ")]
    for start, end in zip(heads, [*[head - 1 for head in heads[1:]], len(tables)], strict=True):
        assert len(set(columns[start - 1 : end])) == 1  # a | in a category adds no column


def test_the_same_files_make_the_same_report(out: Path) -> None:
    before = {name: (out / name).read_bytes() for name in ("report.md", "report.html", "results.json")}
    assert main(["report", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in before} == before


def test_without_matplotlib_there_are_tables(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(out, tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(out)]) == 0
    assert "no plots: they need matplotlib" in capsys.readouterr().err
    assert "data:image" not in (out / "report.html").read_text()
    assert "Base against refined" in (out / "report.md").read_text()


def test_a_few_prompts_have_no_interval(tmp_path: Path) -> None:
    rows = [*questions(8, ("many",)), *questions(5, ("few",))]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    assert main(["report", str(out)]) == 0
    lines = (out / "report.md").read_text().splitlines()
    few, many = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("few", "many"))
    assert " to " not in few
    assert few.count("(–)") == 5
    assert many.count(" to ") == 5


def test_what_misleads_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "draft": "e", "reward": 1.0} for i in range(12)]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    assert main(["report", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "Only 12 prompts" in text
    assert "The refined answer is longer in 12 of 12 cases" in text
    assert "The scorer is a Python function" in text
    assert "The base model's time is not in the input" in text


@pytest.mark.parametrize(("answer", "side"), [("e", None), ("e", "shorter"), ("much longer", "longer")])
def test_lengths_of_one_side_are_said_as_they_are(
    tmp_path: Path, answer: str, side: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal lengths are neither."""
    monkeypatch.setattr("tests.engine.job.stub.answer", lambda value: answer)
    drafts = ["e" if side is None and i else "e" * (i % 3 + 2) for i in range(40)]
    rows = [{"prompt": f"Question {i}?", "draft": draft} for i, draft in enumerate(drafts)]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    assert main(["report", str(out)]) == 0
    text = (out / "report.md").read_text()
    if side is None:
        assert "equal lengths are outside" not in text
    else:
        assert f"The refined answer is {side} in 40 of 40 cases" in text


def test_a_dollar_is_no_formula(tmp_path: Path) -> None:
    rows = [{**row, "category": "price $5_$"} for row in questions(8, ("one",))]
    _, out = evaluate(tmp_path, rows, "--reward-at-steps", "none")
    assert main(["report", str(out)]) == 0
    assert (out / "categories.png").exists()
    assert "price $5_$" in (out / "report.md").read_text()


def test_a_plot_that_fails_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> bool:
        raise ValueError("cannot be drawn")

    monkeypatch.setattr("engine.evaluate.plots._categories", fail)
    _, out = evaluate(tmp_path, questions(8), "--reward-at-steps", "none")
    assert main(["report", str(out)]) == 0
    assert "no categories.png: ValueError: cannot be drawn" in capsys.readouterr().err
    assert {path.name for path in out.glob("*.png")} == {"lengths.png"}
    assert (out / "report.html").exists()


def test_nothing_to_draw_is_no_missing_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path, [{"prompt": "no draft"}], "--reward-at-steps", "none")[0] == 3
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "matplotlib" not in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [5, 6])
def test_intervals_of_a_few_prompts_are_not_drawn(
    tmp_path: Path, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    for name in ("fill_between", "axhspan"):
        monkeypatch.setattr(Axes, name, lambda *arguments, name=name, **options: drawn.append(name))
    _, out = evaluate(tmp_path, questions(prompts), "--reward-at-steps", "1")
    assert main(["report", str(out)]) == 0
    assert (out / "steps.png").exists()
    assert drawn == ([] if prompts == 5 else ["fill_between", "axhspan"])
