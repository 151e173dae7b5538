"""Every command from its words to its output, on scikit-learn's digits and a small model with stored weights."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import exit_plugins
from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, exit_costs
from exit_plugins.cli import COMMANDS, main
from exit_plugins.cli.models import parse_kwargs
from exit_plugins.timm.data import open_dataset

MODEL = "msdnet_test"
DATA = ["--data", "digits", "--limit", "80"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose exits disagree, the table of 80 digits and a policy, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 32, 32))  # moves the norms' statistics off their start
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "model.safetensors")
    weights = ["--checkpoint", str(folder / "model.safetensors")]
    assert main(["evaluate", MODEL, *weights, *DATA, "--save-table", str(folder / "table.npz")]) == 0
    assert main(["solve", MODEL, *weights, *DATA, "--budget", "80%", "-o", str(folder / "policy.json")]) == 0
    return folder


def weights(folder) -> list[str]:
    return ["--checkpoint", str(folder / "model.safetensors")]


def run_json(capsys, *words) -> object:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            code = main([command, "--help"])
            raise SystemExit(code)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert ("exit-plugins " + command) in text or command == "train", f"{command} shows no example"
    assert main([]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {command} " in listing for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.slow
def test_module_and_command_are_the_same():
    script = shutil.which("exit-plugins", path=str(__import__("pathlib").Path(sys.executable).parent))
    for words in ([sys.executable, "-m", "exit_plugins"], *([[script]] if script else [])):
        out = subprocess.run([*words, "solve", "--table"], capture_output=True, text=True)
        assert out.returncode == 2 and "Traceback" not in out.stderr


def test_profile_counts_what_exit_costs_counts(capsys):
    found = run_json(capsys, "profile", MODEL, "--repeats", 2, "--plain", "test_resnet", "--num-classes", 10)
    costs = exit_costs(timm.create_model(MODEL, num_classes=10), (3, 32, 32))
    assert [row["macs"] for row in found["exits"]] == costs.macs.tolist()
    assert [row["params"] for row in found["exits"]] == costs.params.tolist()
    assert all(row["latency"] > 0 for row in found["exits"])
    plain = timm.create_model("test_resnet", num_classes=10)
    assert found["plain"]["params"] == sum(p.numel() for p in plain.parameters())
    assert main(["profile", MODEL, "--no-latency"]) == 0
    assert "exit 3" in capsys.readouterr().out


def test_profile_times_the_modes_that_run_and_names_the_fastest(capsys, monkeypatch):
    from exit_plugins.cli import modes

    way = modes.open_mode

    def without_engines(name, model, images):
        if name in ("compiled", "onnx", "openvino"):
            raise ImportError("this needs an engine, which is not installed")
        return way(name, model, images)

    monkeypatch.setattr(modes, "open_mode", without_engines)
    found = run_json(capsys, "profile", MODEL, "--modes", "--repeats", 2, "--batch-size", 2)
    means = {row["mode"]: sum(row["latency"]) for row in found["modes"]}
    assert list(means) == ["plain", "channels_last", "fused"] and found["recommended"] == min(means, key=means.get)
    assert set(found["refused"]) == {"compiled", "onnx", "openvino"} and found["batch_size"] == 2
    assert all(sorted(row["latency"]) == row["latency"] for row in found["modes"])
    assert main(["profile", MODEL, "--modes", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "onnx does not run here: this needs an engine" in out and "fastest here: " in out


def test_plain_networks_to_compare_with_exist():
    from exit_plugins.cli.profile import PLAIN

    assert all(timm.is_model(name) for name in PLAIN.values())
    assert all(any(ours.startswith(name) for ours in exit_plugins.timm.list_models()) for name in PLAIN)


def test_data_set_that_streams_gives_the_same_table(folder, capsys, tmp_path, monkeypatch):
    from exit_plugins.cli import common

    class Stream:
        """What timm's tfds and wds readers are to a loader: iterable, without length or index."""

        transform = None

        def __iter__(self):
            view = open_dataset("digits", "validation")
            for i in np.sort(np.random.default_rng(0).permutation(len(view))[:80]):
                image, target = view[i]
                yield self.transform(image), target

    monkeypatch.setattr(common, "create_dataset", lambda name, **kwargs: Stream())
    table = tmp_path / "t.npz"
    words = [MODEL, *weights(folder), "--num-classes", "10", "--data", "wds/digits", "--save-table", str(table)]
    assert main(["evaluate", *words]) == 0
    assert ExitTable.load(table).digest() == ExitTable.load(folder / "table.npz").digest()


def test_evaluate_reports_the_table_it_writes(folder, capsys):
    table = ExitTable.load(folder / "table.npz")
    assert (table.num_exits, table.num_samples) == (3, 80)
    found = run_json(capsys, "evaluate", MODEL, *weights(folder), *DATA, "--policy", folder / "policy.json")
    assert [row["accuracy"] for row in found["exits"]] == table.correct.mean(1).tolist()
    policy = ExitPolicy.load(folder / "policy.json")
    exits = policy.choose(table.confidence)
    assert found["policy"]["shares"] == [(exits == k).mean() for k in range(3)]
    again = run_json(capsys, "evaluate", MODEL, "--num-classes", 10, "--table", folder / "table.npz")
    assert again["exits"] == found["exits"]
    assert main(["evaluate", MODEL, "--num-classes", "10", "--table", str(folder / "table.npz")]) == 0
    assert re.search(r"exit 3 .*%.*\[", capsys.readouterr().out)


def test_solve_meets_each_kind_of_goal(folder, capsys, tmp_path):
    common = [MODEL, "--num-classes", 10, "--table", folder / "table.npz", "-o", tmp_path / "p.json"]
    costs = exit_costs(timm.create_model(MODEL, num_classes=10), (3, 32, 32)).macs
    table = ExitTable.load(folder / "table.npz")
    for budget, meant in (("70%", 0.7 * costs[-1]), ("6.5M", 6.5e6), ("6500000", 6.5e6)):
        found = run_json(capsys, "solve", *common, "--budget", budget)
        assert found["source"]["target"]["budget"] == pytest.approx(meant)
        assert found["source"]["cost"] <= meant
    found = run_json(capsys, "solve", *common, "--drop", 0.01, "--method", "exact")
    assert found["source"]["accuracy"] >= table.correct[-1].mean() - 0.01
    found = run_json(capsys, "solve", *common, "--certify", "crc", "--epsilon", 0.2, "--method", "shared")
    # Sample digests are in the file, for overlaps; printed they would bury everything else.
    assert found["certificate"]["samples"] == {"count": 40}
    written = ExitPolicy.load(tmp_path / "p.json")
    assert len(written.certificate["samples"]["digests"]) == 40
    run_json(capsys, "solve", *common, "--budget", "90%", "--temperatures", "--measure", "entropy", "--max-exit", 2)
    policy = ExitPolicy.load(tmp_path / "p.json")
    assert policy.measure == "entropy" and policy.last_exit == 1 and not (policy.temperatures == 1).all()
    known = {"architecture": MODEL, "num_exits": 3, "num_classes": 10, "in_chans": 3, "input_size": [3, 32, 32]}
    assert policy.model.items() >= known.items() and policy.model["weights"] == table.about["weights"]


def test_what_solve_says_under_a_cap_is_what_evaluate_finds(folder, capsys, tmp_path):
    table = ExitTable.load(folder / "table.npz")
    common = ["solve", MODEL, "--num-classes", 10, "--table", folder / "table.npz", "-o", tmp_path / "p.json"]
    first, best = float(table.correct[0].mean()), float(table.correct.mean(1).max())
    for goal in (["--budget", "95%"], ["--accuracy", first]):
        for cost in ([], ["--cost", "latency"]):
            said = run_json(capsys, *common, *goal, *cost, "--max-exit", 1)["source"]
            assert said["accuracy"] == pytest.approx(first) and said["shares"] == [1, 0, 0]
            policy = ExitPolicy.load(tmp_path / "p.json")
            assert policy.last_exit == 0 and said["cost"] == pytest.approx(policy.costs[0])
            (tmp_path / "p.json").unlink()
    assert first < best
    assert main([*map(str, common), "--accuracy", str(best), "--max-exit", "1"]) == 2
    assert f"up to exit 1 is {first:.4f}" in capsys.readouterr().err
    assert main([*map(str, common), "--certify", "ucb", "--max-exit", "2"]) == 2
    assert "--max-exit lets no image reach: give one of the two" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_solve_for_latency_takes_budgets_in_time(folder, capsys, tmp_path):
    words = ["solve", MODEL, "--num-classes", "10", "--table", str(folder / "table.npz"), "--cost", "latency"]
    for budget in ("6M", "0.4G"):
        assert main([*words, "--budget", budget]) == 2
        said = capsys.readouterr().err
        assert f"{budget!r} is not in the unit of --cost latency; write it in seconds: 0.012, 12ms" in said
    found = run_json(
        capsys, "solve", MODEL, "--num-classes", 10, "--table", folder / "table.npz",
        "--cost", "latency", "--budget", "100%", "-o", tmp_path / "p.json",
    )  # fmt: skip
    assert 0 < found["source"]["cost"] < 60
    policy = ExitPolicy.load(tmp_path / "p.json")
    latency = policy.source["latency"]
    assert latency["batch_size"] == 1 and latency["mode"] == "fused" and latency["threads"] == torch.get_num_threads()
    assert policy.costs @ np.array(policy.source["shares"]) == pytest.approx(policy.source["cost"])


def test_solve_for_latency_writes_a_policy_for_every_batch_size(folder, capsys, tmp_path):
    common = [MODEL, "--num-classes", 10, "--table", folder / "table.npz", "--cost", "latency", "--cost-batch"]
    found = run_json(capsys, "solve", *common, 1, 4, "--accuracy", 0.1, "-o", tmp_path / "p.json")
    assert [Path(one["policy"]).name for one in found["policies"]] == ["p-b1.json", "p-b4.json"]
    for batch in (1, 4):
        policy = ExitPolicy.load(tmp_path / f"p-b{batch}.json")
        assert policy.source["latency"]["batch_size"] == batch and policy.source["accuracy"] >= 0.1
    assert main([*map(str, ["solve", *common, 4, "--accuracy", 0.1, "-o", tmp_path / "p.json"])]) == 0
    said = capsys.readouterr().out
    assert "in batches of 4 (fused)" in said and "p.json: accuracy" in said
    for options, message in (
        (["--cost-batch", 1, 4], "several --cost-batch are for budgets in time"),
        (["--cost", "latency", "--cost-batch", 4, 4], "--cost-batch names a size twice: 4 4"),
    ):
        assert main([*map(str, ["solve", *common[:5], *options, "--accuracy", 0.1])]) == 2
        assert message in capsys.readouterr().err
    # Elsewhere it is said that the budget is not for these batches.
    args = ["evaluate", *common, 2, "--policy", tmp_path / "p-b4.json", "--json"]
    assert main([*map(str, args)]) == 0
    said = capsys.readouterr()
    assert "a mean time in batches of 4 (fused), and these are of 2 (fused)" in said.err
    assert json.loads(said.out)["policy"]["cost"] > 0
    view = open_dataset("digits", "validation")
    view[0][0].save(tmp_path / "0.png")
    args = ["predict", tmp_path / "0.png", "--policy", tmp_path / "p-b4.json", *weights(folder)]
    assert main([*map(str, args)]) == 0
    assert "in batches of 4 (fused), and these are of 1 (fused)" in capsys.readouterr().err


def test_predict_answers_as_the_adaptive_model_does(folder, capsys, tmp_path):
    view = open_dataset("digits", "validation")
    for i in range(4):
        view[i][0].save(tmp_path / f"{i}.png")
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    found = run_json(
        capsys, "predict", tmp_path, "--policy", folder / "policy.json", *weights(folder),
        "--class-names", tmp_path / "names.txt",
    )  # fmt: skip
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(folder / "model.safetensors")).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    adaptive = AdaptiveModel(model, ExitPolicy.load(folder / "policy.json"))
    for row, i in zip(found, range(4), strict=True):
        out = adaptive(transform(Image.open(tmp_path / f"{i}.png"))[None])
        assert row["class"] == out.logits.argmax().item() and row["exit"] == out.exit_index.item() + 1
        assert row["label"] == f"digit {row['class']}" and row["seconds"] > 0
        assert row["confidence"] == pytest.approx(out.confidence.item(), rel=1e-5)


def test_report_is_one_page_that_needs_no_other_file(folder, capsys, tmp_path):
    page = tmp_path / "report.html"
    found = run_json(capsys, "report", MODEL, *weights(folder), *DATA, "--budgets", 3, "-o", page)
    text = page.read_text()
    assert not re.search(r"(?:src|href)\s*=\s*['\"](?!data:)", text) and not re.search(
        r"https?://(?!www.w3.org/)", text
    )
    for title in ("What a budget buys", "Easiest and hardest images", "Reliability", "Similarity of exits"):
        assert title in text
    assert len(found["budgets"]) == 3 and f'"accuracy": {found["accuracy"]}' in text


def test_switches_are_read_as_people_write_them():
    given = parse_kwargs(["x2z=false", "z2x=True", "fkt=FALSE", "num_latents=8", "early_exits=feature"])
    assert given == {"x2z": False, "z2x": True, "fkt": False, "num_latents": 8, "early_exits": "feature"}


@pytest.mark.parametrize(("words", "message"), [
    (["evaluate", "msdnet_tset", *DATA], r"timm knows no model 'msdnet_tset'; did you mean msdnet_"),
    (["evaluate", "test_resnet", *DATA], r"ResNet is not a multi-exit model"),
    (["evaluate", MODEL, "--data", "no/such/folder"], r"no data at 'no/such/folder'"),
    (["evaluate", MODEL, *DATA, "--checkpoint", "none.pt"], r"no checkpoint at none.pt"),
    (["evaluate", MODEL, *DATA, "--policy", "none.json"], r"no policy at none.json"),
    (["evaluate", MODEL], r"give --data to run the model on, or --table"),
    (["evaluate", MODEL, *DATA, "--model-kwargs", "width"], r"takes NAME=VALUE, got 'width'"),
    (["profile", "dynperceiver_test", "--model-kwargs", "x2z=no"], r"x2z is True or False, got 'no'"),
    (["solve", MODEL, "--table", "none.npz", "--budget", "50%"], r"no exit table at none.npz"),
    (["predict", "none.jpg", "--policy", "none.json"], r"no policy at none.json"),
    (["report", MODEL], r"give --data"),
])  # fmt: skip
def test_errors_are_one_line_without_a_traceback(words, message, capsys):
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith(f"exit-plugins {words[0]}: ")
    assert re.search(message, lines[0])


def test_budget_errors_are_one_line_too(folder, capsys):
    common = ["solve", MODEL, "--num-classes", "10", "--table", str(folder / "table.npz")]
    for budget, message in (
        ("5%", "least possible mean cost"),
        ("lots", "'lots' is not a budget"),
        ("6000000s", "'6000000s' is not in the unit of --cost macs"),
        ("12 ms", "write it in MACs: 0.4e9, 400M"),
    ):
        assert main([*common, "--budget", budget]) == 2
        assert message in capsys.readouterr().err


def test_damaged_policy_and_image_are_one_line(folder, capsys, tmp_path):
    (tmp_path / "p.json").write_text((folder / "policy.json").read_text()[:50])
    (tmp_path / "x.png").write_text("no image")
    assert main(["predict", str(tmp_path / "x.png"), "--policy", str(tmp_path / "p.json")]) == 2
    assert "may be cut off" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "x.png"), "--policy", str(folder / "policy.json"), *weights(folder)]) == 1
    assert "is not an image" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_one_short_line(folder, capsys):
    for words in (["chase_test", *weights(folder), *DATA], [MODEL, *weights(folder), *DATA, "--num-classes", "7"]):
        assert main(["evaluate", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.safetensors does not fit" in line and "more); check the name" in line and len(line) < 500


def test_random_weights_are_not_passed_over_in_silence(capsys):
    assert main(["evaluate", MODEL, "--data", "digits", "--limit", "8"]) == 0
    assert f"warning: {MODEL} has random weights" in capsys.readouterr().err


def test_a_folder_stands_for_its_weights(folder, tmp_path, capsys):
    model = timm.create_model(MODEL, num_classes=10)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    exit_plugins.timm.save_for_hf(model, tmp_path / "saved")
    words = ["evaluate", f"local-dir:{tmp_path / 'saved'}", *DATA, "--save-table", str(tmp_path / "table.npz")]
    assert main(words) == 0 and "random weights" not in capsys.readouterr().err
    found, expected = (ExitTable.load(path / "table.npz") for path in (tmp_path, folder))
    np.testing.assert_array_equal(found.confidence, expected.confidence)


def test_traceback_is_shown_when_asked_for():
    with pytest.raises(FileNotFoundError):
        main(["evaluate", MODEL, "--data", "nowhere", "--traceback"])


def test_interrupted_evaluation_goes_on_from_its_part_file(folder, capsys, tmp_path, monkeypatch):
    table = tmp_path / "t.npz"
    words = ["evaluate", MODEL, *weights(folder), *DATA, "--batch-size", "16", "--save-table", str(table)]
    from exit_plugins.exits import collecting as module

    calls, ask = [], module._Asker.__call__

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(module._Asker, "__call__", stop)
    assert main(words) == 130
    assert table.with_name("t.npz.part").exists() and not table.exists()
    assert main(words) == 0
    assert len(calls) == 3 + 3  # two of five batches were kept
    assert ExitTable.load(table).digest() == ExitTable.load(folder / "table.npz").digest()
    assert not table.with_name("t.npz.part").exists()


def test_train_hands_over_to_timm(capsys):
    with pytest.raises(SystemExit):
        main(["train", "no_such_train.py"])
    assert "no_such_train.py" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_print_once_and_the_same(folder, tmp_path):
    pytest.importorskip("torch.distributed.run")
    words = ["evaluate", MODEL, *weights(folder), *DATA, "--batch-size", "16", "--save-table", str(tmp_path / "t.npz")]
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "exit_plugins", *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.count(f"{MODEL} on 80 images") == 1
    assert ExitTable.load(tmp_path / "t.npz").digest() == ExitTable.load(folder / "table.npz").digest()


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"exit-plugins {exit_plugins.__version__}"
