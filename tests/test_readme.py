"""The README's snippets in the order a reader meets them: nothing in them is undefined, and they run."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_nothing_is_used_undefined():
    code = "\n".join(snippets())
    assert "solve_thresholds" in code
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", "-"]
    done = subprocess.run(words, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_way_to_a_policy_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, choose = snippets()[0], next(text for text in snippets() if "policy_path" in text)
    # A smaller network of the same kind, and its size.
    first = first.replace("dynperceiver_regnety_400mf", "dynperceiver_test").replace("224", "64")
    names: dict = {}
    exec(compile(first + choose, "README.md", "exec"), names)
    assert names["policy"].max_exit == 2 and names["safe"].certificate["samples"]["count"] == len(names["apart"])
    assert (tmp_path / "policy.json").is_file() and not (tmp_path / "val.part").exists()


def test_the_shipped_network_answers_as_it_says(capsys):
    first, shipped = snippets()[0], next(text for text in snippets() if "shipped_policy" in text)
    exec(compile(first.replace("dynperceiver_regnety_400mf", "dynperceiver_test") + shipped, "README.md", "exec"), {})
    said = re.search(r"It prints `(.*)`", README.read_text(encoding="utf-8")).group(1)
    assert capsys.readouterr().out.strip() == said
