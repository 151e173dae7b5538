"""What must not pass in silence at the command line: the wrong split, classes, pictures, weights, and numbers."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_data import NAMES, write_images, write_model

from exit_plugins import ExitPolicy, ExitTable
from exit_plugins.cli import main
from exit_plugins.exits.digests import weights_digest
from exit_plugins.timm.data import open_dataset

MODEL = "msdnet_test"


def run(*words) -> int:
    """Exit status, of argparse too."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stopped:
        return stopped.code


def run_json(capsys, *words):
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


# Splits


def test_a_split_that_is_not_there_is_named(images, checkpoint, capsys, tmp_path):
    assert run("evaluate", MODEL, "--checkpoint", checkpoint, "--data", images, "--split", "bogus") == 2
    assert "has no split 'bogus'; it has test, train, val" in capsys.readouterr().err
    flat = write_images(tmp_path / "flat", 10)
    words = ["solve", MODEL, "--checkpoint", checkpoint, "--data", flat, "--budget", "90%", "-o", tmp_path / "p.json"]
    assert run(*words) == 2
    assert "--holdout SHARE" in capsys.readouterr().err
    assert run(*words, "--holdout", "0.2", "--holdout-seed", "3") == 0
    data = ExitPolicy.load(tmp_path / "p.json").source["data"]
    assert (data["split"], data["holdout"]) == ("validation", {"share": 0.2, "seed": 3})


def test_a_policy_is_not_tested_on_what_it_was_solved_on(images, checkpoint, policy_file, capsys, tmp_path):
    words = ["evaluate", MODEL, "--checkpoint", checkpoint, "--data", images, "--policy", policy_file]
    found = run_json(capsys, *words)["policy"]
    assert (found["overlap"], found["is_test"]) == (60, False)
    assert run(*words) == 0
    assert "no test: 60 of these 60 images are among those" in capsys.readouterr().out
    found = run_json(capsys, *words, "--split", "test")["policy"]
    assert (found["overlap"], found["is_test"]) == (0, True)
    page = tmp_path / "r.html"
    common = ["report", MODEL, "--checkpoint", checkpoint, "--data", images, "--budgets", 2, "-o", page]
    assert run_json(capsys, *common, "--split", "test", "--solve-split", "val")["is_test"] is True
    assert "No test" not in page.read_text()
    assert run_json(capsys, *common, "--policy", policy_file)["overlap"] == 30  # of its half
    assert "No test: 30 of these 30 images" in page.read_text()
    assert run_json(capsys, *common, "--solve-split", "val")["overlap"] == 60


# Classes


def test_a_test_split_without_a_class_is_scored_by_names(images, checkpoint, policy_file, capsys, tmp_path):
    apart = tmp_path / "elsewhere"
    shutil.copytree(images / "test", apart / "test")
    shutil.rmtree(apart / "test" / "ant")
    words = ["evaluate", MODEL, "--checkpoint", checkpoint, "--data", apart, "--split", "test"]
    assert run(*words, "--num-classes", 3) == 2  # nothing says what the two are
    assert "has 2 classes and the model 3, and nothing says which" in capsys.readouterr().err
    table = tmp_path / "t.npz"
    assert run(*words, "--policy", policy_file, "--save-table", table) == 0
    assert "1 of the model's 3 classes are not in the data" in capsys.readouterr().err
    assert sorted(set(ExitTable.load(table).target.tolist())) == [1, 2]
    (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)))
    assert run(*words, "--class-names", tmp_path / "names.txt", "--save-table", table) == 0
    assert sorted(set(ExitTable.load(table).target.tolist())) == [0, 1]
    write_images(apart / "test", 1, names=("cow",))
    (apart / "test" / "cow").rename(apart / "test" / "dog")
    assert run(*words, "--policy", policy_file) == 2
    assert "has the class 'dog', which the model does not know" in capsys.readouterr().err


def test_names_that_an_editor_began_with_a_byte_order_mark(images, checkpoint, policy_file, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("first\nsecond\nthird\n", encoding="utf-8-sig")
    words = ["--policy", policy_file, "--checkpoint", checkpoint, "--class-names", tmp_path / "names.txt"]
    found = run_json(capsys, "predict", images / "test", *words)
    assert {row["label"] for row in found if row["class"] == 0} == {"first"}


def test_class_names_travel_in_the_policy_and_are_printed(images, checkpoint, policy_file, capsys):
    assert ExitPolicy.load(policy_file).model["classes"] == list(NAMES)
    found = run_json(capsys, "predict", images / "test", "--policy", policy_file, "--checkpoint", checkpoint)
    assert len(found) == 30 and {row["label"] for row in found} <= set(NAMES)
    assert all(NAMES[row["class"]] == row["label"] for row in found)


# Channels and pictures


def test_one_channel_everywhere(capsys, tmp_path):
    grey = write_model(tmp_path / "grey.safetensors", in_chans=1)
    data = tmp_path / "data"
    for split in ("val", "test"):
        write_images(data / split, 8, mode="L")
    words = [MODEL, "--checkpoint", grey, "--model-kwargs", "in_chans=1"]
    found = run_json(capsys, "profile", *words, "--num-classes", 3, "--no-latency", "--plain", "test_resnet")
    assert found["input_size"] == [1, 32, 32]
    policy = tmp_path / "p.json"
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    words += ["--data", data, "--class-names", tmp_path / "names.txt"]
    assert run("solve", *words, "--budget", "80%", "-o", policy) == 0
    assert run("evaluate", *words, "--split", "test", "--policy", policy) == 0
    # What the policy knows of the model is enough to build it again.
    found = run_json(capsys, "predict", data / "test", "--policy", policy, "--checkpoint", grey)
    model = timm.create_model(MODEL, num_classes=3, in_chans=1, checkpoint_path=str(grey)).eval()
    pixels = np.asarray(Image.open(found[0]["image"])).astype(np.float32)[None, None] / 255
    config = timm.data.resolve_data_config({}, model=timm.create_model(MODEL))
    pixels = (pixels - np.mean(config["mean"])) / np.mean(config["std"])
    exit_ = found[0]["exit"] - 1
    assert found[0]["class"] == model.forward_exits(torch.from_numpy(pixels).float())[exit_].argmax().item()
    assert run("evaluate", *words, "--input-size", "3,32,32") == 2
    assert "reads images of 1 channels" in capsys.readouterr().err


def test_unreadable_images_are_named_counted_and_left_out(images, checkpoint, capsys, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images / "val", data / "val")
    (data / "val" / "bee" / "0.png").write_bytes(b"no image")
    (data / "val" / "cow" / "19.png").write_bytes((data / "val" / "cow" / "19.png").read_bytes()[:100])
    (data / "names").write_text("\n".join(NAMES))
    words = [MODEL, "--checkpoint", checkpoint, "--data", data, "--class-names", data / "names"]
    table = tmp_path / "t.npz"
    for workers in (0, 2):
        assert run("solve", *words, "--budget", "80%", "-o", tmp_path / "p.json", "--workers", workers) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "bee/0.png is not an image" in line and "--max-bad N" in line
    assert run("evaluate", *words, "--save-table", table, "--batch-size", 7, "--workers", 2) == 0
    said = capsys.readouterr().err
    assert "bee/0.png" in said and "cow/19.png" in said and "2 of 60 images could not be read" in said
    found, clean = ExitTable.load(table), open_dataset(str(data), "val")
    assert found.num_samples == 58 and np.bincount(found.target).tolist() == [20, 19, 19]
    assert len(set(found.sample.tolist())) == 58  # nobody stands in for the missing
    assert run("solve", *words, "--budget", "80%", "-o", tmp_path / "p.json", "--max-bad", 1) == 2
    assert run("solve", *words, "--budget", "80%", "-o", tmp_path / "p.json", "--max-bad", 2) == 0
    assert len(clean) == 60
    assert run_json(capsys, "report", *words, "--budgets", 2, "-o", tmp_path / "r.html")["accuracy"] >= 0


# Tables, policies and the model they belong to


def test_a_table_brings_its_model_and_refuses_another(policy_file, capsys, tmp_path):
    table = policy_file.with_name("val.npz")
    words = ["solve", MODEL, "--table", table, "--budget", "80%", "-o", tmp_path / "p.json"]
    assert run(*words) == 0
    by_table, by_data = ExitPolicy.load(tmp_path / "p.json"), ExitPolicy.load(policy_file)
    assert by_table.model == by_data.model and by_table.model["num_classes"] == 3
    assert by_table.thresholds.tolist() == by_data.thresholds.tolist()
    for more, says in (
        (["--num-classes", 99], "the table was made for num_classes 3 and the model has 99"),
        (["--input-size", 64], "--input-size 64x64 is not that of the policy or table, 32x32"),
        (["--model-kwargs", "width=9"], "the table was made for model_kwargs {} and the model has {'width': 9}"),
    ):
        assert run(*words, *more) == 2
        assert says in capsys.readouterr().err
    assert run("solve", "chase_test", *words[2:]) == 2
    assert "the table was made for architecture msdnet_test and the model has chase_test" in capsys.readouterr().err


def test_a_table_and_the_data_beside_it_are_of_the_same_images(images, checkpoint, policy_file, capsys, tmp_path):
    table = tmp_path / "t.npz"
    made = ["evaluate", MODEL, "--checkpoint", checkpoint, "--policy", policy_file, "--data", images, "--crop-pct", 0.8]
    assert run(*made, "--split", "test", "--save-table", table) == 0
    beside = ["--table", table, "--data", images, "--limit", 30]  # of the 60 in val
    for command in (
        ["report", MODEL, "--budgets", 2, "-o", tmp_path / "r.html"],
        ["solve", MODEL, "--budget", "80%", "-o", tmp_path / "p.json"],
        ["evaluate", MODEL],
    ):
        assert run(*command, *beside, "--split", "test") == 0
        capsys.readouterr()
        assert run(*command, *beside, "--split", "val") == 2
        said = capsys.readouterr().err
        assert "is of other images than the data: its number 1 is not" in said and "split test" in said
    # A table without digests is known by its classes.
    bare = ExitTable.load(table)
    ExitTable(bare.confidence, bare.prediction, np.roll(bare.target, 1), about=bare.about).save(table)
    assert run("evaluate", MODEL, *beside, "--split", "test") == 2
    assert "of its class; give the --data" in capsys.readouterr().err


def test_a_table_that_knows_nothing_is_measured_by_its_contents(capsys, tmp_path):
    rng = np.random.default_rng(0)
    ExitTable.from_logits(rng.normal(size=(3, 20, 5)), rng.integers(5, size=20)).save(tmp_path / "t.npz")
    words = ["solve", MODEL, "--table", tmp_path / "t.npz", "--budget", "90%", "-o", tmp_path / "p.json"]
    assert run(*words) == 0
    assert ExitPolicy.load(tmp_path / "p.json").model["num_classes"] == 5
    assert run(*words, "--num-classes", 4) == 2
    ExitTable(np.ones((3, 4)), np.full((3, 4), 7), np.zeros(4)).save(tmp_path / "t.npz")
    assert run(*words, "--num-classes", 5) == 2
    assert "the table holds class 7 and the model has classes 0 to 4" in capsys.readouterr().err


def test_a_policy_knows_how_its_model_was_built(images, capsys, tmp_path):
    weights = write_model(tmp_path / "w.safetensors", growth=4)
    words = [MODEL, "--checkpoint", weights, "--model-kwargs", "growth=4"]
    policy = tmp_path / "p.json"
    assert run("solve", *words, "--data", images, "--budget", "80%", "-o", policy) == 0
    assert ExitPolicy.load(policy).model["model_kwargs"] == {"growth": 4}
    assert len(run_json(capsys, "predict", images / "test", "--policy", policy, "--checkpoint", weights)) == 30
    more = ["--checkpoint", weights, "--model-kwargs", "growth=5"]
    assert run("predict", images / "test", "--policy", policy, *more) == 2
    assert "made for model_kwargs {'growth': 4}" in capsys.readouterr().err


def test_a_policy_knows_its_weights(images, checkpoint, policy_file, capsys, tmp_path):
    model = timm.create_model(MODEL, num_classes=3, checkpoint_path=str(checkpoint))
    assert ExitPolicy.load(policy_file).model["weights"] == weights_digest(model)
    other = tmp_path / "other.safetensors"
    save_file({name: t.flip(0) if t.ndim == 4 else t for name, t in load_file(checkpoint).items()}, other)
    predict = ["predict", images / "test" / "ant", "--checkpoint", other]
    assert run(*predict, "--policy", policy_file) == 0
    assert "warning: the policy was solved with other weights" in capsys.readouterr().err
    certified = tmp_path / "c.json"
    solve = ["solve", MODEL, "--checkpoint", checkpoint, "--data", images, "-o", certified]
    assert run(*solve, "--certify", "crc", "--epsilon", "0.3") == 0
    capsys.readouterr()
    evaluate = ["evaluate", MODEL, "--checkpoint", other, "--data", images, "--split", "test"]
    for words in (predict, evaluate):
        assert run(*words, "--policy", certified) == 2
        assert "its certificate does not hold for these" in capsys.readouterr().err
        assert run(*words, "--policy", certified, "--force") == 0
        assert "warning:" in capsys.readouterr().err
    assert run(*predict[:2], "--checkpoint", checkpoint, "--policy", certified) == 0
    assert "warning" not in capsys.readouterr().err


# Certificates


def test_temperatures_thresholds_and_certificate_come_from_three_parts(policy_file, tmp_path):
    table = ExitTable.load(policy_file.with_name("val.npz"))
    words = ["solve", MODEL, "--table", policy_file.with_name("val.npz"), "-o", tmp_path / "p.json", "--temperatures"]
    assert run(*words, "--certify", "crc", "--epsilon", "0.4") == 0
    policy = ExitPolicy.load(tmp_path / "p.json")
    parts = [policy.source["temperature_samples"], policy.source["samples"], policy.certificate["samples"]]
    digests = [set(part["digests"]) for part in parts]
    assert [len(part) for part in digests] == [15, 15, 30]
    assert set.union(*digests) == {f"{int(d):016x}" for d in table.sample}  # so they are disjoint
    assert policy.overlap(table) == 60
    table.subset(np.arange(2)).save(tmp_path / "two.npz")
    words[3] = tmp_path / "two.npz"
    assert run(*words, "--certify", "crc", "--epsilon", "0.4") == 2


def test_a_certificate_of_nothing_says_so(policy_file, capsys, tmp_path):
    from scipy.stats import binom

    table = ExitTable.load(policy_file.with_name("val.npz"))
    same = np.broadcast_to(table.prediction[-1], table.prediction.shape)
    ExitTable(table.confidence, same, table.target, about=table.about).save(tmp_path / "t.npz")
    words = ["solve", MODEL, "--table", tmp_path / "t.npz", "-o", tmp_path / "p.json", "--certify"]
    assert run(*words, "ltt", "--epsilon", "0.02", "--delta", "0.1") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "nothing is certified" in line]
    needed = next(n for n in range(1, 1000) if binom.cdf(0, n, 0.02) <= 0.1)  # 114: no loss among that many
    assert "since 30 images do not show" in line and f"about {needed} images" in line
    assert (ExitPolicy.load(tmp_path / "p.json").thresholds[:-1] == np.inf).all()
    assert run(*words, "ltt", "--epsilon", "0.2") == 0
    assert "nothing is certified" not in capsys.readouterr().err
    never = np.where(np.arange(3)[:, None] == 2, table.prediction, (table.prediction[-1] + 1) % 3)
    ExitTable(table.confidence, never, table.target, about=table.about).save(tmp_path / "t.npz")
    assert run(*words, "crc", "--epsilon", "0.02") == 0
    assert "no number of images would" in capsys.readouterr().err


# Numbers


@pytest.mark.parametrize("words", [
    ["--drop", "nan"], ["--drop", "-0.1"], ["--accuracy", "nan"], ["--accuracy", "1.5"], ["--budget", "inf"],
    ["--budget", "nan"], ["--budget", "-1e9"], ["--budget", "0"], ["--budget", "nan%"],
    ["--budget", "90%", "--crop-pct", "0"], ["--budget", "90%", "--crop-pct", "nan"],
    ["--budget", "90%", "--input-size", "0"], ["--budget", "90%", "--batch-size", "0"],
    ["--budget", "90%", "--max-exit", "0"], ["--budget", "90%", "--max-exit", "4"],
    ["--certify", "crc", "--epsilon", "nan"], ["--certify", "ucb", "--delta", "1"],
    ["--budget", "90%", "--holdout", "1"],
])  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(words, policy_file, capsys, tmp_path):
    out = tmp_path / "p.json"
    assert run("solve", MODEL, "--table", policy_file.with_name("val.npz"), "-o", out, *words) == 2
    assert "Traceback" not in capsys.readouterr().err and not out.exists()


# Predictions


def test_predict_goes_on_after_a_bad_file(images, checkpoint, policy_file, capsys, tmp_path):
    shutil.copytree(images / "test" / "ant", tmp_path / "mixed")
    (tmp_path / "mixed" / "3.png").write_bytes(b"no image")
    Image.fromarray(np.full((32, 32), 40000, np.uint16)).save(tmp_path / "mixed" / "deep.tiff")
    words = ["predict", tmp_path / "mixed", tmp_path / "nowhere.png", "--policy", policy_file]
    capsys.readouterr()
    assert run(*words, "--checkpoint", checkpoint) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 10 and "deep.tiff" in out
    assert "3.png is not an image" in err and "there is no image" in err and "nowhere.png" in err
    assert run(*words, "--checkpoint", checkpoint, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)) == 10


def test_predict_prints_rows_as_they_come(images, checkpoint, policy_file, capsys, monkeypatch):
    from exit_plugins.timm import predictor

    read, seen = predictor.read_image, []

    def stop(path, name=None):
        seen.append(capsys.readouterr().out)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(path, name)

    monkeypatch.setattr(predictor, "read_image", stop)
    words = ["predict", images / "test" / "ant", "--policy", policy_file, "--checkpoint", checkpoint]
    assert run(*words) == 130
    assert [text.count("ant/") for text in seen] == [0, 1, 1, 1]
    seen.clear()
    capsys.readouterr()
    assert run(*words, "--json") == 130
    assert len(json.loads("".join(seen) + capsys.readouterr().out)) == 3
