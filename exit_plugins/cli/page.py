"""The page of report: one HTML file with its data, style and script inside, which asks nobody for anything."""

import html
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from .._version import __version__
from ..exits.files import atomic_write

__all__ = ["write_page"]


def write_page(path: str | os.PathLike[str], title: str, intro: str, note: str | None, data: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Args:
        title, intro: what it is about.
        note: a warning above everything, or None.
        data: what page.js draws; numbers must be finite, None stands for those that are not known.
    """
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    # Inside a script element only its end, and the beginning of a comment, mean something: neither may stand in a text.
    stored = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    values = {
        "title": html.escape(title),
        "intro": html.escape(intro),
        "note": f'<p class="note">{html.escape(note)}</p>' if note else "",
        "footer": html.escape(f"exit-plugins {__version__}, {made}"),
        "style": _part("page.css"),
        "script": _part("page.js"),
        "data": stored,
    }
    text = _part("page.html")
    head, *pieces = text.split("{{")
    page = [head]
    for piece in pieces:  # once through the template, so that no value is taken for a place in it
        name, _, rest = piece.partition("}}")
        page += [values[name], rest]
    with atomic_write(path) as file:
        file.write("".join(page))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip()
