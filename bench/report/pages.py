"""The pages: Jinja templates filled from the results."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.measure import RESULTS
from bench.plan import parse, plan
from bench.report import engine_tables, suite_tables, tables
from bench.report.results import Results, about, listing
from bench.reproduction import table as reproduction
from engine.refiner import DEFAULT_CHECKPOINT

ROOT = Path(__file__).parents[2]
TEMPLATES = Path(__file__).parent / "templates"


Make = Callable[[Results], str]


def of(name: str, make: Callable[[Any], str]) -> Make:
    """What ``make`` says of one file."""
    return lambda results: make(results[name])


TABLES: dict[str, Make] = {
    "headlines": engine_tables.headlines,
    "refinement": of("cpu", engine_tables.refinement),
    "refinement-work": of("cpu", engine_tables.refinement_work),
    "suite": of("suite", suite_tables.suite),
    "suite-full": of("suite_full", suite_tables.suite),
    "suite-slower": of("suite", suite_tables.slower),
    "scaling": of("scaling", suite_tables.scaling),
    "consistency-loss": of("consistency_loss_cpu", tables.consistency_loss),
    "consistency-loss-sparse": of("consistency_loss_cpu", tables.sparse_loss),
    "consistency-loss-accuracy": of("consistency_loss_cpu", tables.accuracy),
    "training-step": of("train_step_cpu", tables.training_step),
    "reproduction": of("reproduction", reproduction.summary),
    "correctors": of("reproduction", lambda found: reproduction.correctors(found["correctors"]).rstrip()),
    "serving": of("serve", tables.serving),
    "batching": of("batching", tables.batching),
    "gpu": lambda results: tables.on_gpus(results.folder),
    "plan": lambda results: plan(parse([]), results),
    "triton": lambda results: engine_tables.triton_kernels(results.folder),
    "files": listing,
}


def stated(text: str, file: str) -> str:
    """``text``, which has to stand in a committed file: the way a figure that no results file holds gets into prose.

    Raises ValueError if it does not stand there.
    """
    if text not in (ROOT / file).read_text():
        raise ValueError(f"{file} does not say {text!r} any more: say in the template what it says now")
    return text


def included(results: Results, name: str) -> str:
    """The Markdown beside a results file, its headings one level below those of the page."""
    text = (results.folder / f"{name}.md").read_text().strip()
    return re.sub(
        r"^(#+ )", lambda heading: "##" + heading[1] if heading[1] == "# " else "#" + heading[1], text, flags=re.M
    )


def fill(template: str, results: Results) -> str:
    """The text of a template. Raises what the results lack: KeyError, jinja2.UndefinedError."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {
        "r": results,
        "table": lambda name: TABLES[name](results),
        "about": partial(about, results),
        "included": partial(included, results),
        "stated": stated,
        "span": engine_tables.span,
        "identical": engine_tables.identical,
        "language_model": engine_tables.subjects(results["cpu"])[-1],
        "exists": lambda name: (results.folder / name).exists(),
    }
    environment.filters["memory_ratio"] = lambda peak: peak["one by one"] / peak["train_step, one by one"]
    environment.filters["times"] = engine_tables.times
    environment.filters["fixed"] = lambda value, digits=0: f"{value:,.{digits}f}"
    return environment.get_template(template).render()


def results_page(path: Path, results: Results) -> str:
    return fill("results.md", results)


def with_parts(path: Path, results: Results) -> str:
    """A page of which only parts are made: what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = path.read_text()
    for name in re.findall(r"<!-- /([\w-]+) -->", text):
        part = fill("measured.md", results).strip() if name == "measured" else TABLES[name](results)
        filled = f"<!-- {name} -->\n{part}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=filled: new, text, flags=re.DOTALL)
    return text


PAGES: dict[Path, Callable[[Path, Results], str]] = {
    RESULTS / "README.md": results_page,
    ROOT / "README.md": with_parts,
    DEFAULT_CHECKPOINT / "README.md": with_parts,
    ROOT / "examples" / "README.md": with_parts,
}
