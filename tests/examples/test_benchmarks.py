"""What the benchmarks rely on: modes compute the same, forced mixes have their shares, token merging is ToMe's."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import adaptive
import forward
import latency_budget
import measure_all
import report
import rivals
import solvers
from adaptive import MIXES, forced_policy
from bench_tables import TABLES
from bench_targets import TARGETS
from measure_all import RUNS
from modes import MODES, OneExit, runner, to_exit
from time_per_mac import PAIRS
from timing import interleaved, spread
from token_merging import MergingTransformer, merge_tokens

from exit_plugins import exit_costs


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make a benchmark on a machine that does other things last for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_exits", [2, 3, 4, 7])
def test_forced_mixes_have_their_shares(num_exits):
    confidence = np.random.default_rng(0).random((num_exits, 840)).astype(np.float32)
    for name, mix in MIXES.items():
        shares = mix(num_exits)
        exits = forced_policy(confidence, shares).choose(confidence)
        found = np.bincount(exits, minlength=num_exits) / 840
        np.testing.assert_allclose(found[:-1], shares, atol=1 / 840, err_msg=name)


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("compiled")])
def test_every_mode_times_the_same_network(mode, monkeypatch):
    if mode.startswith(("onnx", "openvino")):
        pytest.importorskip("openvino" if mode == "openvino" else "onnxruntime")
    torch.manual_seed(0)
    plain = OneExit("test_resnet").eval()
    size = (3, 64, 64)
    images = torch.randn(4, *size)
    reduced = mode.endswith(("bfloat16", "int8"))
    with torch.inference_mode():
        expected = plain.network(images)
        model = runner(plain, mode, size, threads=1)
        close = dict(atol=0.2 * expected.abs().max().item(), rtol=0) if reduced else dict(atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(images).logits, expected, **close)
        ran = []
        monkeypatch.setattr(model.runner, "forward_exit", lambda index, state: (ran.append(index), state))
        to_exit(model, 2, images)
    assert ran == [0, 1, 2]


def test_token_merging_equals_its_definition():
    torch.manual_seed(0)
    x, keys, size = torch.randn(2, 9, 4), torch.randn(2, 9, 3), torch.randint(1, 4, (2, 9, 1)).float()
    merged, sizes = merge_tokens(x, keys, size, 2)
    assert merged.shape == (2, 7, 4) and torch.equal(sizes.sum(1), size.sum(1))
    for b in range(2):
        groups = {j: [j] for j in range(9)}
        pairs = []
        for i in range(2, 9, 2):  # even tokens but the class token, each with its nearest odd one
            alike = {j: float(F.cosine_similarity(keys[b, i], keys[b, j], dim=0)) for j in range(1, 9, 2)}
            nearest = max(alike, key=alike.get)
            pairs.append((alike[nearest], i, nearest))
        for _, i, j in sorted(pairs, reverse=True)[:2]:
            groups[j].append(i)
            del groups[i]
        order = [j for j in range(0, 9, 2) if j in groups] + list(range(1, 9, 2))
        weights = size[b]
        expected = torch.stack(
            [(x[b, groups[j]] * weights[groups[j]]).sum(0) / weights[groups[j]].sum() for j in order]
        )
        torch.testing.assert_close(merged[b], expected)


def test_merging_nothing_is_the_plain_transformer():
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5).eval()
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(MergingTransformer(network, 0)(images), network(images))
        assert torch.isfinite(MergingTransformer(network, 8)(images)).all()


@pytest.fixture
def small_rivals(monkeypatch):
    for name, values in (("STATIC", ("test_resnet", "test_efficientnet")), ("SIDES", (32, 64, 96)), ("MERGED", (0, 8))):
        monkeypatch.setattr(rivals, name, values)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the tests that follow
    words = "--model dynperceiver_test --plain test_resnet --layers layer1 layer2 layer3 --transformer test_vit "
    return (words + "--mode eager fused --images 8 --repeats 1 --threads 1 --system-malloc").split()


def test_rivals_stand_beside_the_mix_of_their_macs(small_rivals, tmp_path):
    path = tmp_path / "rivals.json"
    rivals.main([*small_rivals, "--batch", "1", "4", "--json", str(path)])
    document = json.loads(path.read_text())
    rows = [row for row in document["rows"] if row["batch"] == 4]
    groups = {name: [row for row in rows if row["beside"] == name] for name in {row["beside"] for row in rows}}
    ours, exits = groups["dynperceiver_test, even mix"], groups["test_resnet with exits, even mix"]
    for group in (ours, exits):
        assert group[0]["name"] == group[0]["beside"] and group[0]["macs_over_mix"] == group[0]["time_over_mix"] == 1
        assert all(row["mode"] == min(row["modes_ms"], key=row["modes_ms"].get) for row in group)
    macs = exit_costs(timm.create_model("dynperceiver_test"), (3, 64, 64)).macs
    assert ours[0]["macs"] == pytest.approx(np.mean(macs)) and ours[1]["macs"] == pytest.approx(macs[-1])
    # The nearest are chosen by hand: both networks at 64 pixels, the plain one at 32 or 96.
    for chosen, names in ((2, ("test_resnet", "test_efficientnet")), (3, ("test_resnet",))):
        costs = {
            f"{name} at {side} px": exit_costs(OneExit(name), (3, side, side)).macs[0]
            for name in names
            for side in ((64,) if chosen == 2 else (32, 96))
        }
        name = min(costs, key=lambda name: abs(np.log(costs[name] / ours[0]["macs"])))
        assert ours[chosen]["name"] == name and ours[chosen]["macs"] == pytest.approx(costs[name])
    assert [row["name"] for row in exits[-2:]] == ["test_resnet at 64 px", "test_resnet at 96 px"]
    text = TABLES["rivals"](document)
    assert text.count("**test_resnet with exits, even mix**") == 2  # at both batch sizes
    if rivals.same_exits is not None:
        assert exits[1]["name"] == "test_resnet with exits, even mix, earlyon" and len(exits) == 4


def test_earlyon_leaves_where_ours_does():
    pytest.importorskip("earlyon")
    torch.manual_seed(0)
    found, shares = rivals.Contest(["fused"], 1, torch.randn(8, 3, 64, 64)), MIXES["even"](4)
    network = timm.create_model("test_resnet").eval()
    with torch.inference_mode():
        ours, theirs = rivals.same_exits(network, ["layer1", "layer2", "layer3"], (3, 64, 64))
        mix = found.enter("ours", ours, mix=shares)
        other = found.earlyon("earlyon", mix, ours, theirs, shares)
        taken = [answer.exit_taken % 4 for answer in other.modes["one by one"](found.images)]
        assert taken == mix.modes["fused"](found.images).exit_index.tolist() and sorted(taken) == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
        ]
        assert other.modes["until all are sure"](found.images).exit_taken % 4 == 3


def test_timings_take_turns():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=1)
    assert sorted(times) == ["a", "b", "c"] and all(t.shape == (3,) for t in times.values())
    assert sorted(calls[:3]) == sorted(calls[3:6]) == ["a", "b", "c"] and calls[:3] == calls[3:6][::-1]
    assert spread(np.array([0.001, 0.002, 0.003]))["median_ms"] == pytest.approx(2)


def run(monkeypatch, script, *options):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the tests that follow
    monkeypatch.setattr(sys, "argv", [script.__name__, "--threads", "1", "--system-malloc", *map(str, options)])
    script.main()


def test_from_runs_to_the_page_and_its_picture(tmp_path, monkeypatch):
    common = ["--model", "dynperceiver_test", "--repeats", "2", "--batch", "1", "2"]
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    for script, options in (
        (adaptive, ["--mode", "eager", "fused", "--images", "4"]),
        (forward, ["--mode", "fused", "--plain", "test_resnet"]),
    ):
        path = results / f"{script.__name__}.json"
        run(monkeypatch, script, *common, *options, "--json", path)
        path.write_text(json.dumps({"made_by": f"the command of {script.__name__}", **json.loads(path.read_text())}))
    rows = json.loads((results / "adaptive.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(MIXES) and {row["mode"] for row in rows} == {"eager", "fused"}
    for row in rows:
        assert sum(row["share"]) == pytest.approx(1, abs=0.01) and row["per_call"]["p95_ms"] >= 0
        if row["mix"] == "nobody":
            assert row["share"][-1] == 1 and row["ideal"] == row["ideal_macs"] == 1

    marked = "\n".join(
        f"<!-- table: {name} -->\n<!-- /table -->" for name in ("targets", "picture", "forward", "rivals")
    )
    page.write_text(f"Before.\n\n{marked}\n<!-- table: adaptive -->\n<!-- /table -->\n\nBehind.\n")
    report.main(["--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("Behind.\n") and "![Time to each exit" in text
    assert "Not measured yet: `make benchmarks ONLY=rivals`." in text and "`the command of forward` (" in text
    lines = text.partition("<!-- table: adaptive -->")[2].strip().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert page.with_suffix(".png").stat().st_size > 10_000
    report.main(["--results", str(results), "--page", str(page)])
    assert page.read_text() == text

    page.write_text("<!-- table: fastest -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match="no benchmark makes a table 'fastest'"):
        report.main(["--results", str(results), "--page", str(page)])
    (results / "rivals.json").write_text('{"rows": [{}], "made_by": "", "machine": {}}')
    page.write_text("<!-- table: rivals -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match=r"rivals\.json is not what its benchmark writes now.*ONLY=rivals FORCE=1"):
        report.main(["--results", str(results), "--page", str(page)])


def test_the_page_is_what_its_files_say():
    if not report.RESULTS.is_dir() and not (report.ROOT / ".git").exists():
        pytest.skip("a source distribution without the files")
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page, report.read(report.RESULTS), "benchmarks.png") == page, (
        "run examples/benchmarks/report.py"
    )
    for name in ["targets", "picture", *TABLES]:
        assert page.count(f"<!-- table: {name} -->") == 1
    assert RUNS.keys() == TABLES.keys() >= {target.name for target in TARGETS}


def test_solvers_on_random_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(solvers, "below_the_optimum", partial(solvers.below_the_optimum, 60, 2))
    path = tmp_path / "solvers.json"
    monkeypatch.setattr(sys, "argv", ["solvers.py", "--large", "300x4", "--json", str(path)])
    solvers.main()
    document = json.loads(path.read_text())
    assert document["random_tables"]["mean"] == document["random_tables"]["worst"] == 0
    assert [len(large["seconds"]) for large in document["large"]] == [7]
    assert "| 300 x 4 | " in TABLES["solvers"](document)
    assert [target.row(document)[2] for target in TARGETS if target.name == "solvers"][0] == "yes"
    table = solvers.random_table(4, 300, 0)
    right, sure = table.correct, table.confidence[0] > 0.5
    assert right[-1].mean() > right[0].mean() and right[0, sure].mean() > right[0, ~sure].mean()
    monkeypatch.setattr(sys, "argv", ["solvers.py", "val.npz"])
    with pytest.raises(SystemExit):
        solvers.main()
    assert "give two tables and --costs, or none of them" in capsys.readouterr().err


def test_budgets_in_time_from_a_run_to_their_table(tmp_path, monkeypatch):
    path = tmp_path / "budgets.json"
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    options = ["--batch", "1", "4", "--images", "16", "--repeats", "1", "--threads", "1", "--system-malloc"]
    monkeypatch.setattr(sys, "argv", ["latency_budget.py", "dynperceiver_test", *options, "--json", str(path)])
    latency_budget.main()
    document = json.loads(path.read_text())
    assert [row["batch"] for row in document["rows"]] == [1] * 4 + [4] * 4
    assert all(row["solved_ms"] <= row["budget_ms"] and row["expected_ms"] > 0 for row in document["rows"])
    assert TABLES["latency_budget"](document).count("\n") == 9
    kept = next(target for target in TARGETS if target.name == "latency_budget")
    row = dict(document["rows"][0], measured_over_budget=1.04)
    assert (
        kept.row({"rows": [row]})[2] == "yes"
        and kept.row({"rows": [row, dict(row, measured_over_budget=0.9)]})[2] == "no"
    )


def test_every_pair_of_time_per_mac_exists():
    for name, plain in PAIRS.items():
        assert timm.is_model(name.partition(" + ")[0]) and timm.is_model(plain), name


def test_what_reaches_a_target():
    rows = [dict(mode=mode, batch=1, exit=1, ratio=ratio) for mode, ratio in (("onnx", 0.8), ("openvino", 0.81))]
    first = next(target for target in TARGETS if target.name == "forward")
    assert first.row({"rows": rows}) == [first.wanted, "onnx 0.8, openvino 0.81", "onnx"]
    assert first.row({"rows": rows[:1]})[2] == "yes" and first.row({"rows": rows[1:]})[2] == "no"
    assert first.row({"rows": [dict(rows[0], ratio=float("nan"))]})[2] == "no"
    assert first.row(None)[1:] == ["not measured yet", ""]
    queue = next(target for target in TARGETS if target.name == "request_load")
    best = {"plain batching": 50.0, "a queue per segment": 61.0}
    assert queue.row({"best": best})[1:] == ["RequestQueue 1.22", "yes"]
    assert queue.row({"best": {**best, "plain batching": 0.0}})[2] == "no"  # nothing to compare with


def test_measures_what_is_missing_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "write", lambda page, results: None)
    tiny = "--threads 1 --batch 1 --repeats 1"
    monkeypatch.setitem(RUNS, "forward", f"forward.py --model dynperceiver_test --plain test_resnet {tiny}")
    monkeypatch.setitem(RUNS, "adaptive", "adaptive.py --batch none")
    assert measure_all.main(["--only", "forward", "adaptive", "precision"]) == 1
    said = capsys.readouterr()
    assert "failed: adaptive (status 2)" in said.err and "precision: left out" in said.out
    (path,) = (tmp_path / "results").iterdir()
    document = json.loads(path.read_text())
    assert document["made_by"] == f"python examples/benchmarks/{RUNS['forward']}" and "json" not in document["command"]
    assert TABLES["forward"](document).count("\n") == 3
    before = path.read_bytes()
    assert measure_all.main(["--only", "forward"]) == 0 and path.read_bytes() == before
    assert "forward: measured already" in capsys.readouterr().out


def test_who_wins_is_what_was_measured():
    """README's line beside rivals, and docs/benchmarks.md's."""
    rows = json.loads((report.RESULTS / "rivals.json").read_text(encoding="utf-8"))["rows"]
    times = {(row["beside"], row["name"], row["batch"]): row["time_over_mix"] for row in rows}
    exits, latents = (f"{name}, even mix" for name in ("regnety_008 with exits", "dynperceiver_regnety_800mf"))
    for batch in (1, 32):
        assert 0.9 < times[exits, "regnety_004 at 224 px", batch] < 1.2
        assert 1.6 < times[exits, f"{exits}, earlyon", batch] < 2
        assert times[exits, "regnety_008 at 160 px", batch] < 1
        static = [name for beside, name, size in times if (beside, size) == (latents, batch) and "dynp" not in name]
        assert len(static) == 4 and all(times[latents, name, batch] < 1 for name in static)
