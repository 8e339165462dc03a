"""Tables and pages: the same sections as Markdown and as one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } th { background: #f5f5f5; }
.note { background: #fff7e0; border-left: 4px solid #e0a800; padding: .4rem .8rem; margin: .5rem 0; }
img { max-width: 100%; } pre { white-space: pre-wrap; background: #f8f8f8; padding: .6rem; font-size: 12.5px; margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .who { font-size: 12px; color: #555; margin-top: .6rem; }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with both answers."""

    title: str
    prompt: str
    base: str
    refined: str


@dataclass(slots=True)
class Section:
    """One part of a report."""

    title: str
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    """What a reader must know before believing the table."""
    text: list[str] = field(default_factory=list)
    picture: str | None = None
    """File name of a PNG beside the report."""
    examples: list[Example] = field(default_factory=list)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split("\n"))


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report without its examples, which are in the rows."""
    parts = [f"# {title}\n"]
    for section in sections:
        if section.examples and not section.table:
            continue
        parts.append(f"## {section.title}\n")
        parts += [f"{text}\n" for text in section.text]
        if section.table:
            parts.append(markdown(section.table.head, section.table.rows))
        parts += [f"- {note}" for note in section.notes]
        if section.notes:
            parts.append("")
        if section.picture:
            parts.append(f"![{section.title}]({section.picture})\n")
    return "\n".join(parts)


def as_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """One file: pictures of ``folder`` stand in it, nothing is loaded from elsewhere. All texts are escaped."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(text)}</p>" for text in section.text]
        if section.table:
            body.append(_html_table(section.table))
        body += [f'<div class="note">{html.escape(note)}</div>' for note in section.notes]
        if section.picture:
            data = base64.b64encode((folder / section.picture).read_bytes()).decode()
            body.append(f'<p><img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}"></p>')
        body += [_html_example(example) for example in section.examples]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _html_example(example: Example) -> str:
    def pre(text: str) -> str:
        return f"<pre>{html.escape(text)}</pre>"

    return (
        f'<div class="who">{html.escape(example.title)}</div>{pre(example.prompt)}<div class="pair">'
        f'<div><div class="who">base</div>{pre(example.base)}</div>'
        f'<div><div class="who">refined</div>{pre(example.refined)}</div></div>'
    )
