"""A ratio is worse when it moved the wrong way by more than its spread; what cannot be compared is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import bench_check

MACHINE = {"cpu": "a cpu", "threads": 1, "device": "cpu", "torch": "2.6", "date": "2026-01-01"}


def forward(*ratios: float, spread: float = 0.05, **machine) -> dict:
    rows = [{"mode": "fused", "batch": 1, "exit": k, "ratio": r, "ratio_iqr": spread} for k, r in enumerate(ratios, 1)]
    return {"command": {"model": "m", "json": "a.json"}, "machine": {**MACHINE, **machine}, "rows": rows}


def adaptive(*speedups: float, spread: float = 0.05) -> dict:
    rows = [
        {"mode": "fused", "batch": 1, "mix": str(k), "speedup": s, "speedup_iqr": spread}
        for k, s in enumerate(speedups)
    ]
    return {"command": {"model": "m"}, "machine": MACHINE, "rows": rows}


@pytest.mark.parametrize("make, sign", [(forward, 1), (adaptive, -1)])
def test_worse_is_further_the_wrong_way_than_the_spread(make, sign):
    kept = make(1.0, 1.0, 1.0, 1.0, 1.0)
    new = make(1.0, *(1 + sign * step for step in (0.0625, 0.03125, -0.03125, -0.0625)))
    changes, gone = bench_check.compare(kept, new)
    assert [change.worse for change in changes] == [False, True, False, False, False]
    assert [change.better for change in changes] == [False, False, False, False, True]
    assert not gone


def test_the_wider_spread_counts():
    narrow, wide = forward(1.0, spread=0.01), forward(1.5, spread=1.0)
    for kept, new in ((narrow, wide), (forward(1.0, spread=1.0), forward(1.5, spread=0.01))):
        assert not bench_check.compare(kept, new)[0][0].worse
    assert bench_check.compare(narrow, forward(1.5, spread=0.01))[0][0].worse
    assert bench_check.compare(narrow, forward(float("nan")))[0][0].worse


def test_what_is_not_measured_any_more_is_named(capsys):
    assert bench_check.compare(forward(1.0, 2.0), forward(1.0))[1] == [("fused", 1, 2)]
    assert not bench_check.report(forward(1.0, 2.0), forward(1.0))
    assert "not measured: mode fused, batch 1, exit 2" in capsys.readouterr().out
    assert bench_check.report(forward(1.0), forward(1.0, 9.0))  # what is new has nothing to be worse than


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="different benchmarks"):
        bench_check.compare(forward(1.0), adaptive(1.0))
    with pytest.raises(ValueError, match="machine: threads was 1 and is 2"):
        bench_check.compare(forward(1.0), forward(1.0, threads=2))
    bench_check.compare(forward(1.0), forward(1.0, torch="2.7", date="2026-02-02"))  # that is what it is for
    other = copy.deepcopy(forward(1.0))
    other["command"] |= {"model": "n", "json": "b.json"}
    with pytest.raises(ValueError, match="command: model was m and is n"):
        bench_check.compare(forward(1.0), other)
    with pytest.raises(ValueError, match=r"forward\.py or adaptive\.py"):
        bench_check.compare({"rows": [{"name": "x"}]}, forward(1.0))


def test_the_command_says_it_in_words_and_status(tmp_path):
    for name, document in (("kept", forward(1.0, 2.0)), ("same", forward(1.0, 2.0)), ("slow", forward(1.0, 2.5))):
        (tmp_path / name).write_text(json.dumps(document))
    words = [sys.executable, bench_check.__file__]

    def run(*names: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, *names], cwd=tmp_path, capture_output=True, text=True)

    assert run("kept", "same").returncode == 0
    slow = run("kept", "same", "kept", "slow")
    assert slow.returncode == 1 and slow.stdout.splitlines()[1] == (
        "worse: mode fused, batch 1, exit 2: ratio 2.000 -> 2.500 (spread 0.050)"
    )
    for names, said in ((("nothing", "same"), "make bench-keep"), (("kept",), "pairs")):
        failed = run(*names)
        assert failed.returncode and said in failed.stderr and "Traceback" not in failed.stderr
