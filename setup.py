"""What pyproject.toml cannot say: a long description whose links and pictures work away from the repository."""

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from setuptools import setup

HERE = Path(__file__).parent
HOME = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]


def absolute(match: re.Match) -> str:
    """A link or picture of the README, to where the repository lies."""
    picture, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    return f"{picture}[{text}]({HOME}/{'raw' if picture else 'blob'}/main/{target})"


readme = (HERE / "README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, readme),
    long_description_content_type="text/markdown",
)
