"""What the site adds to the pages: links out of docs/ go to the repository; the gallery is read from examples/.

The repository's address stands in pyproject.toml alone.
"""

import ast
import re
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import tomllib

ROOT = Path(__file__).resolve().parents[1]


HOME = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    if page.file.src_path == "gallery.md":
        markdown = markdown.replace("<!-- examples -->", gallery())

    def absolute(match: re.Match) -> str:
        target = match[1]
        if target.startswith("../"):
            return f"]({HOME}/blob/main/{target[3:]})"
        return f"]({HOME}/blob/main/docs/{target})" if (ROOT / "docs" / target).is_dir() else match[0]

    return re.sub(r"\]\(([^)\s#]+)\)", absolute, markdown)


def gallery() -> str:
    """A table of the examples: each one's name and the first paragraph of what it says of itself."""
    rows = ["| example | what it shows |", "|---|---|"]
    for folder in ("examples", "examples/benchmarks", "examples/experiments"):
        for path in sorted((ROOT / folder).glob("*.py")):
            says = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
            says = " ".join(says.split()).replace("|", "\\|").replace("<", "&lt;")
            name = path.relative_to(ROOT).as_posix()
            rows.append(f"| [{name}](../{name}) | {says} |")
    return "\n".join(rows)
