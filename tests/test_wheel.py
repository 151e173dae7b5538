"""The package as a user gets it: built, installed where nothing else of it is, and tried."""

import email
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Run by the installed package's Python, in an empty folder.
TRIAL = """
import contextlib, io, json, pathlib, sys
import exit_plugins
from exit_plugins.cli import COMMANDS, main

snippet, helps = sys.argv[1], {}
exec(compile(snippet, "README.md", "exec"), {})
for command in COMMANDS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    helps[command] = len(out.getvalue())
out = io.StringIO()
with contextlib.redirect_stdout(out):
    assert main(["configs", "--json"]) == 0
found = json.loads(out.getvalue())
here = pathlib.Path(exit_plugins.__file__).parent
print(json.dumps({
    "home": str(here), "helps": helps, "configs": found,
    "there": [(pathlib.Path(found["folder"]) / f"{name}.py").is_file() for name in found["configs"]],
    "page": len((here / "cli" / "page.js").read_text()), "shipped": exit_plugins.timm.list_shipped(),
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """sdist, and the wheel built from it, of the files that git knows or would."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout: nothing says what belongs to the package")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def readme_files() -> set[str]:
    """Files and folders of the repository that the README links to."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s#]+)", text)
    return {target for target in targets if not re.match("[a-z]+:", target)}


def test_the_source_distribution_holds_what_the_readme_names(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2].rstrip("/") for name in archive.getnames()}
    assert readme_files() <= names
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")}
    assert examples <= names and "exit_plugins/cli/page.html" in names and "tests/conftest.py" in names


def test_the_wheel_says_where_things_are(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(archive.read(metadata))
    assert {name.partition("/")[0] for name in names} == {"exit_plugins", Path(metadata).parent.name}
    assert {"Homepage", "Changelog", "Issues"} <= {url.partition(",")[0] for url in about.get_all("Project-URL")}
    minors = {x.rpartition("3.")[2] for x in about.get_all("Classifier") if "Python :: 3." in x}
    assert minors == {"10", "11", "12", "13"} and about["Requires-Python"] == "<3.14,>=3.10"
    targets = re.findall(r"\]\(([^)\s]+)\)", about.get_payload())
    assert targets and all(re.match("https?:|#", target) for target in targets)


def test_the_wheel_alone_is_enough(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # what installing a wheel of pure Python is
    # The big dependencies are those of this environment; a line of a .pth file brings no .pth files of its own.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL).group(1)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [python, "-c", TRIAL, snippet],
        capture_output=True,
        text=True,
        cwd=tmp_path / "empty",
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["home"] == str(site / "exit_plugins")
    assert all(length > 300 for length in found["helps"].values()), found["helps"]
    assert len(found["configs"]["configs"]) > 12 and all(found["there"]) and found["page"] and found["shipped"]
