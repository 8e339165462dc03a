"""A page as one HTML file, its pictures inside it."""

import base64
import html
import mimetypes
import os
import re
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2129; background: #fff }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #d5d8dd; padding: .3rem .7rem; text-align: left; vertical-align: top }
th { background: #f3f4f6 } code { background: #f3f4f6; padding: 0 .2rem } img { max-width: 100% } em { color: #5b6470 }
@media (prefers-color-scheme: dark) {
  body { color: #e4e6ea; background: #16181d } th, code { background: #24272e } th, td { border-color: #3a3f49 }
  em { color: #a4acb8 } a { color: #8ab4ff } img { background: #fff }
}
"""


def standalone(page: Path, folder: Path) -> str:
    """The Markdown file as HTML, to lie in ``folder``, that needs no other file; links to files beside the page stay links."""
    from markdown_it import MarkdownIt  # of the extra "bench"

    body = MarkdownIt("commonmark").enable("table").render(page.read_text())
    body = re.sub(r'src="([^":]+)"', lambda found: f'src="{data_url(page.parent / found[1])}"', body)
    body = re.sub(r"<(h[2-6])>(.*?)</h", lambda found: f'<{found[1]} id="{anchor(found[2])}">{found[2]}</h', body)
    beside = os.path.relpath(page.parent, folder)
    body = re.sub(r'href="([^":#][^":]*)"', lambda found: f'href="{beside}/{found[1]}"', body)
    title = re.search(r"<h1>(.*?)</h1>", body)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title[1] if title else page.stem}</title>\n<style>{STYLE}</style>\n{body}</html>\n"
    )


def anchor(heading: str) -> str:
    """As GitHub names it."""
    text = html.unescape(re.sub(r"<.*?>", "", heading)).lower()
    return re.sub(r"[^\w -]", "", text).replace(" ", "-")


def data_url(picture: Path) -> str:
    kind = mimetypes.guess_type(picture.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
