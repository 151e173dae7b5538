"""A self-contained HTML page of numbers, figures and tables: what report writes."""

import base64
import html
import io
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from .._version import __version__
from ..exits.files import atomic_write


class Page:
    """A page with everything inside it; what is added comes one below the other, and every text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def add_text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def add_numbers(self, numbers: Sequence[tuple[str, str]]) -> None:
        """(number, what it is) side by side."""
        cells = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in numbers)
        self.parts.append(f'<div class="numbers">{cells}</div>')

    def add_figure(self, title: str, figure: Any, caption: str) -> None:
        """A matplotlib figure as a PNG inside the page."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        picture = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(
            f"<h2>{html.escape(title)}</h2><figure><img alt='{html.escape(title)}' "
            f"src='data:image/png;base64,{picture}'><figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def add_table(self, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        """A head row and rows as long; the first column to the left."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = line(head, "th") + "".join(line(row, "td") for row in rows)
        self.parts.append(f"<div class='wide'><table>{body}</table></div><p class='caption'>{html.escape(caption)}</p>")

    def write(self, path: str | os.PathLike) -> None:
        """Whole or not at all."""
        made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        with atomic_write(path) as file:
            file.write(
                "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
                "<meta name='viewport' content='width=device-width, initial-scale=1'>"
                f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
                f"<h1>{html.escape(self.title)}</h1>{''.join(self.parts)}"
                f"<footer>exit-plugins {__version__}, {made}</footer></body></html>\n"
            )


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-top:1px solid #ddd;padding-top:1rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.numbers div{flex:1 1 9rem;background:#f4f6f8;border-radius:6px;padding:.7rem 1rem}
.numbers b{display:block;font-size:1.5rem}.numbers span{font-size:.85rem;color:#555}
figure{margin:0}img{max-width:100%;height:auto}figcaption,.caption,footer{font-size:.85rem;color:#555}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:.8rem 0 .2rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e5e5e5;white-space:nowrap}
th:first-child,td:first-child{text-align:left}footer{margin-top:3rem}
"""
