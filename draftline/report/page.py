"""One self-contained HTML page: the card with its plots inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape

from markdown_it import MarkdownIt

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.6 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #22262d; background: #f5f6f8;
  margin: 0; }
main { max-width: 1020px; margin: 2rem auto; padding: 2rem 2.5rem; background: #fff; border: 1px solid #e3e6ea;
  border-radius: 10px; }
h1 { margin-top: 0; font-size: 1.8rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; border-bottom: 1px solid #e3e6ea;
  padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid #e3e6ea; text-align: left; white-space: nowrap; }
th { background: #f5f6f8; font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.3; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f5f6f8; padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 13px; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 1.6rem; }
.tile { border: 1px solid #e3e6ea; border-radius: 8px; padding: .6rem .8rem; background: #fafbfc; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; color: #0072b2; }
.tile span { display: block; font-size: .8rem; line-height: 1.35; color: #5b616b; }
details { border-top: 1px solid #e3e6ea; margin-top: 1.4rem; padding-top: .4rem; }
details h2 { display: inline; border: 0; margin: 0; }
summary { cursor: pointer; padding: .4rem 0; }
@media (max-width: 640px) { main { margin: 0; padding: 1rem; border: 0; border-radius: 0; } }
"""


FOLDED = ("Data", "Licence", "Provenance", "Spec")
"""Sections that are there to be looked up, closed until asked for."""

Tile = tuple[str, str]
"""A figure as text, and what it is."""


def render_page(card: str, images: Mapping[str, bytes], *, title: str, tiles: Sequence[Tile] = ()) -> str:
    """The card as a page that needs no other file, loads nothing and runs no script.

    So it also shows in a sandboxed frame, as Kubeflow and MLflow put it.

    Args:
        card: Markdown; HTML within it is shown as text, not run.
        images: PNG bytes by the name the card uses.
        title: Of the page.
        tiles: Headline figures, below the heading.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = str(markdown.render(card))
    for name, data in images.items():
        encoded = base64.b64encode(data).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{encoded}"')
    body = _with_tiles(_folded(body), tiles)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _folded(body: str) -> str:
    head, *sections = re.split(r"(?=<h2>)", body)
    for place, section in enumerate(sections):
        found = re.match(r"<h2>(.*?)</h2>", section)
        if found and found.group(1) in FOLDED:
            rest = section[found.end() :]
            sections[place] = f"<details>\n<summary>{found.group(0)}</summary>{rest}</details>\n"
    return head + "".join(sections)


def _with_tiles(body: str, tiles: Sequence[Tile]) -> str:
    if not tiles:
        return body
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    return body.replace("</h1>", f'</h1>\n<div class="tiles">{shown}</div>', 1)
