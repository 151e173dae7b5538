"""The queue of experiments on a made-up data set: what it runs, resumes, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "experiments"
sys.path.append(str(FOLDER))

import base  # noqa: E402
import clock  # noqa: E402
import judging  # noqa: E402
import lite0  # noqa: E402
import run as queue  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten colours under noise in the layout of CIFAR-100."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("datasets")
    for split, count in (("train", 60), ("test", 6)):
        for number in range(10):
            folder = root / "cifar100" / split / f"colour{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal((25 * number, 128, 250 - 25 * number), 30, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_trains_writes_reports_and_runs_nothing_twice(data, tmp_path):
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--small",
        "--data",
        str(data),
        "--state",
        str(tmp_path),
        "--nice",
        "0",
    ]
    done = subprocess.run([*command, "--only", "dvt/both-s0", "dvt/none-s0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    file = tmp_path / "results" / "dvt" / "both-s0.json"
    result = json.loads(file.read_text())
    assert (result["experiment"], result["variant"], result["seed"], result["small"]) == ("dvt", "both", 0, True)
    assert result["settings"]["data"] == "cifar100" and result["epochs"] == 1 and result["machine"]["threads"] == 1
    assert [e["macs"] for e in result["exits"]] == sorted(e["macs"] for e in result["exits"])
    page = (tmp_path / "results" / "results.md").read_text()
    assert "both (DVT)" in page and f"{100 * result['exits'][0]['accuracy']:.1f}" in page
    assert "chase" in page.split("Not run yet")[1]
    assert (tmp_path / "results" / "dvt" / "budgeted.png").is_file()

    before = file.stat().st_mtime_ns
    again = subprocess.run([*command, "--only", "dvt/both-s0"], capture_output=True, text=True)
    assert again.returncode == 0 and "started" not in again.stdout and file.stat().st_mtime_ns == before


def test_a_run_is_locked_by_whoever_trains_it(tmp_path):
    with queue.locked(tmp_path / "a.lock") as first, queue.locked(tmp_path / "a.lock") as second:
        assert first and not second
    with queue.locked(tmp_path / "a.lock") as third:
        assert third


def test_every_experiment_says_its_runs_by_distinct_names():
    for experiment, runs in queue.load_experiments():
        names = [run.name for run in runs]
        assert len(set(names)) == len(names)
        assert all((experiment.title, experiment.claim, experiment.paper, experiment.setup, experiment.outlook))
    with pytest.raises(SystemExit, match="no experiment or run nothing"):
        queue.load_experiments(["nothing"])


def test_differences_are_paired_by_seed():
    def result(variant, seed, accuracy):
        return {"variant": variant, "seed": seed, "exits": [{"accuracy": accuracy}]}

    first = [result("a", 0, 0.5), result("a", 1, 0.7), result("a", 2, 0.1)]
    second = [result("b", 1, 0.6), result("b", 0, 0.3)]
    found = judging.paired(first, second)
    assert found.mean == pytest.approx(0.15) and str(found) == "+15.0 ± 5.0"
    assert judging.paired(first, [result("b", 7, 0.3)]) is None


def test_a_difference_counts_if_seeds_or_images_do_not_explain_it():
    values = [0.010, 0.014, 0.021]
    one_sided = stats.ttest_1samp(values, 0.0, alternative="greater")
    limit = one_sided.confidence_interval(0.95).low
    found = judging.Difference(values)
    assert found.mean - found.reach == pytest.approx(limit) and found.above() and not found.above(0.01)
    assert not judging.Difference([0.5]).above(), "nothing is known of a single value"
    chance = judging.by_chance([0.3, 0.3], 10_000)  # of two independent networks
    draws = np.random.default_rng(0).binomial(10_000, 0.3, (2, 20_000)) / 10_000
    assert chance == pytest.approx((draws[0] - draws[1]).std(), rel=0.02)
    assert judging.Difference([0.011], chance).above() and not judging.Difference([0.010], chance).above()
    assert judging.Difference([-0.011], chance).below()


def test_curves_are_compared_at_costs_that_all_of_them_cover():
    ours = [np.array([[1.0, 3.0], [0.5, 0.7]]), np.array([[2.0, 4.0], [0.62, 0.82]])]
    theirs = [np.array([[0.0, 6.0], [0.3, 0.9]])] * 2  # a tenth a unit, as ours, 0.1 and 0.12 below
    found = judging.compare(ours, theirs, points=3)
    np.testing.assert_allclose(found.costs, [2.0, 2.5, 3.0])
    np.testing.assert_allclose(found.gains, [[0.1] * 3, [0.12] * 3])
    assert found.above() and found.cells(1)[2] == "+11.0 ± 1.0"
    assert judging.compare(ours, [np.array([[7.0, 8.0], [0.1, 0.2]])] * 2) is None


@pytest.mark.parametrize("form", ["tokens", "frames"])
def test_adapters_with_and_without_exits_are_of_one_network(form, tmp_path):
    pytest.importorskip("transformers")
    import motion_peft

    place = base.Place(tmp_path, tmp_path, tmp_path, small=True)
    plain, dyn = (
        motion_peft.train(method, form, place, tmp_path / f"{method}-{form}", 0) for method in ("plain", "dyn")
    )
    # Counted by two ways, and of two models: the dynamic one has early heads besides.
    assert plain["exits"][0]["macs"] == pytest.approx(dyn["plain_macs"])
    assert len(dyn["exits"]) == 4 and dyn["exits"][-1]["macs"] > dyn["plain_macs"]
    assert all(point["cost"] <= point["share"] + 1e-6 for point in dyn["budgets"][2:])
    results = [
        {"variant": f"{method}-{form}", "seed": 0, **result} for method, result in (("plain", plain), ("dyn", dyn))
    ]
    text = motion_peft.section(results, tmp_path)
    assert f"{100 * plain['exits'][0]['accuracy']:.1f}" in text and "**Not shown.**" in text


def timed(seed: int, names: dict[str, float]) -> dict:
    """A result of ``clock``: static networks on one line, and each of ``names`` so many points above it."""
    points = []
    for batch in clock.BATCHES:
        for ms in (1.0, 2.0, 3.0):
            static = {"engine": "torch", "batch": batch, "macs": ms, "ms": ms, "iqr_ms": 0.1, "fixed": False}
            points.append({**static, "name": f"plain_{ms:.0f}", "static": True, "accuracy": 0.5 + 0.1 * ms})
            for name, above in names.items():
                own = {**static, "name": name, "static": False}
                points.append({**own, "accuracy": 0.5 + 0.1 * ms + above})
                points.append({**own, "accuracy": 0.51 + 0.1 * ms, "fixed": True})
    head = {"variant": "caltech101", "seed": seed, "settings": {"halvings": 20}, "test_images": 100}
    return {**head, "points": points}


def test_images_are_timed_in_the_shares_of_the_exits():
    leaves = np.repeat([2, 0, 1], [50, 35, 15])
    chosen = clock.typical(leaves, 20, seed=0)
    assert np.bincount(leaves[chosen]).tolist() == [7, 3, 10] and len(set(chosen)) == 20
    assert sorted(clock.typical(leaves, 100, seed=1)) == list(range(100))
    assert not np.array_equal(chosen, clock.typical(leaves, 20, seed=1))


def test_the_clock_takes_the_mean_over_seeds_of_the_networks_that_all_have(tmp_path):
    results = [
        timed(0, {"exits_64": 0.01, "exits_96": 0.029, "late": 0.5}),
        timed(1, {"exits_64": 0.03, "exits_96": 0.031}),
    ]
    text = clock.section(results, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| PyTorch | 1 |"))
    cells = ["1.5 to 2.5", *["+3.0", "+3.0 ± 0.1", "+3.0"], *["+2.0", "+2.0 ± 0.1", "+2.0"]]
    assert row == f"| PyTorch | 1 | exits, any size | {' | '.join(cells)} |"
    assert "2 seeds" in text and text.count("**Shown.**") == 2 and "late" not in text
    assert (tmp_path / "caltech101.png").stat().st_size > 10_000


def test_families_are_judged_over_the_seeds_and_what_has_not_run_is_named(tmp_path):
    def result(variant: str, seed: int, macs: float, accuracy: float, curve=None) -> dict:
        found = {"variant": variant, "seed": seed, "test_images": 100, "exits": [{"macs": macs, "accuracy": accuracy}]}
        return found | ({"budgeted": [{"budget": c, "cost": c, "accuracy": a} for c, a in curve]} if curve else {})

    results = []
    for seed, above in ((0, 0.02), (1, 0.03), (2, 0.04)):
        results += [result(f"plain_{size}", seed, 1e6 * size, size / 1000) for size in (100, 200, 300)]
        for size in (100, 200):
            curve = [(1e6 * c, c / 1000 + above) for c in (size, size + 50, size + 100)]
            results.append(result(f"exits_{size}", seed, 1e6 * size, size / 1000, curve))
    text = lite0.section(lite0.FIELD, results, tmp_path)
    assert "`exits, any size` (+3.0 ± 0.6 points). Not run yet: plain, 160 px" in text
    assert "**Shown.**" in text and (tmp_path / "budgeted.png").is_file()
    worse = [
        r | {"budgeted": [p | {"accuracy": p["accuracy"] - 0.09} for p in r["budgeted"]]} if "budgeted" in r else r
        for r in results
    ]
    text = lite0.section(lite0.FIELD, worse, tmp_path)
    assert "**Against.** At the same MACs above every network without exits that has run, in all of the" in text
    alone = [r for r in results if "budgeted" in r]
    assert "**" not in lite0.section(lite0.FIELD, alone, tmp_path)


def test_results_of_another_version_are_missing(tmp_path):
    run = base.Run("a", 0, lambda place, folder, seed: {"answer": 1})
    texts = dict.fromkeys(("title", "claim", "paper", "setup", "outlook"), "")
    place = base.Place(tmp_path, tmp_path, tmp_path)
    old = base.Experiment(name="one", runs=[run], section=lambda results, pictures: "", **texts)
    new = base.Experiment(name="one", runs=[run], section=lambda results, pictures: "", version=2, **texts)
    old.execute(place, run)
    assert old.result(place, run)["answer"] == 1 and new.result(place, run) is None and new.results(place) == []
    new.execute(place, run)
    assert new.result(place, run)["version"] == 2 and old.result(place, run) is None
