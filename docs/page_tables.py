"""Pages whose tables are made from files, and whose prose is written by hand.

A page marks where a table goes; who makes the tables writes what stands between the marks, and nothing else:

    <!-- table: NAME -->
    ...
    <!-- /table -->
"""

import re
from collections.abc import Callable, Iterable, Sequence

_MARKED = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- /table -->$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!--\s*/?table\b")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: str, make: Callable[[str], str]) -> str:
    """The page's text with ``make(NAME)`` between every pair of marks.

    Raises:
        ValueError: a mark lacks its other half, is misspelt, or is not alone on its line.
    """
    found = list(_MARKED.finditer(page))
    # Whatever looks like a mark is half of a pair, or a table would silently keep the figures of another day.
    if len(_MARK.findall(page)) != 2 * len(found):
        raise ValueError(
            f"{len(found)} tables are marked by {len(_MARK.findall(page))} marks: each table stands between "
            "a line '<!-- table: NAME -->' and a line '<!-- /table -->'."
        )
    return _MARKED.sub(lambda mark: f"<!-- table: {mark[1]} -->\n\n{make(mark[1])}\n\n<!-- /table -->", page)
