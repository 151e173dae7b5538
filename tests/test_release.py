"""What stands in several places stands there alike: the version, the Pythons, the lowest versions."""

import re
import sys
from pathlib import Path

import pytest

import exit_plugins

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from lowest import lowest, project  # noqa: E402

WORKFLOW, CONSTRAINTS = ROOT / ".github" / "workflows" / "tests.yml", ROOT / ".github" / "lowest.txt"
# What stands by itself for others to build on; the rest are tools and doors whose lowest versions are not tried.
TRIED_EXTRAS = ["peft", "mmdet", "plots"]


def read(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"no {path.name} here: this is no checkout")
    return path.read_text(encoding="utf-8")


def test_every_place_names_the_same_version():
    cited = re.search(r"^version: (\S+)$", read(ROOT / "CITATION.cff"), re.MULTILINE).group(1)
    released, day = re.search(r"^## \[(\d[^]]*)\] - (\S+)$", read(ROOT / "CHANGELOG.md"), re.MULTILINE).groups()
    cited_day = re.search(r"^date-released: \"?([\d-]+)\"?$", read(ROOT / "CITATION.cff"), re.MULTILINE).group(1)
    assert cited == released == exit_plugins.__version__ and day == cited_day


def test_the_workflow_runs_every_python_that_is_declared():
    yaml = pytest.importorskip("yaml")
    matrix = yaml.safe_load(read(WORKFLOW))["jobs"]["test"]["strategy"]["matrix"]
    declared = [c.rpartition(" ")[2] for c in project()["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert matrix["python"] == declared
    assert matrix["include"] == [{"python": declared[0], "versions": "lowest"}]
    newest = int(declared[-1].partition(".")[2])
    assert project()["requires-python"] == f">={declared[0]},<3.{newest + 1}"


def test_the_constraints_are_the_lowest_versions_declared():
    declared = dict(line.split("==") for line in lowest(TRIED_EXTRAS) if "==" in line)
    found = dict(line.split("==") for line in read(CONSTRAINTS).splitlines() if not line.startswith("#"))

    def numbers(version: str) -> list[int]:
        return [int(part) for part in f"{version}.0.0".split(".")[:3]]

    assert {name: numbers(version) for name, version in found.items()} == {
        name: numbers(version) for name, version in declared.items()
    }
