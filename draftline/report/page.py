"""One self-contained HTML page: the card with its plots inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from markdown_it import MarkdownIt

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.6 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #22262d; background: #f5f6f8;
  margin: 0; }
main { max-width: 960px; margin: 2rem auto; padding: 2rem 2.5rem; background: #fff; border: 1px solid #e3e6ea;
  border-radius: 10px; }
h1 { margin-top: 0; font-size: 1.8rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; border-bottom: 1px solid #e3e6ea;
  padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e3e6ea; text-align: left; white-space: nowrap; }
th { background: #f5f6f8; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f5f6f8; padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: 13px; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; }
"""


def render_page(card: str, images: Mapping[str, bytes], *, title: str) -> str:
    """The card as a page that needs no other file and loads nothing.

    Args:
        card: Markdown; HTML within it is shown as text, not run.
        images: PNG bytes by the name the card uses.
        title: Of the page.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = str(markdown.render(card))
    for name, data in images.items():
        encoded = base64.b64encode(data).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{encoded}"')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
