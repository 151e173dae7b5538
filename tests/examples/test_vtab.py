"""The VTAB runner and the fine-tuning example on coloured images and on digits, offline."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from exit_plugins import DynConfig, get_dyn_peft_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for folder in (EXAMPLES, EXAMPLES / "benchmarks"):  # the examples are scripts, no package
    sys.path.append(str(folder))
MODEL = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32"]
SMALL = ["--model-kwargs", json.dumps({"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2})]


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vtab():
    return load("vtab")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three colours under noise: train/ and test/, one folder a class."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("colours")
    for split, count in (("train", 20), ("test", 8)):
        for name, colour in (("blue", (40, 60, 200)), ("green", (60, 200, 60)), ("red", (200, 60, 40))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def lists(colours, tmp_path_factory):
    root = tmp_path_factory.mktemp("lists")
    arguments = ["--data", str(colours), "--output", str(root / "cifar"), "--train", "40", "--val", "15"]
    load("image_lists").main(arguments)
    return root


def test_list_files(lists, vtab):
    folder = lists / "cifar"
    sizes = {name: len((folder / f"{name}.txt").read_text().splitlines()) for name in ("train800", "val200", "test")}
    assert sizes == {"train800": 40, "val200": 15, "test": 24}
    both = set((folder / "train800val200.txt").read_text().splitlines())
    parts = [set((folder / f"{name}.txt").read_text().splitlines()) for name in ("train800", "val200")]
    assert both == parts[0] | parts[1] and not parts[0] & parts[1]
    data = vtab.ListFile(folder, folder / "test.txt")
    image, label = data[len(data) - 1]
    assert label == 2 and np.asarray(image).mean((0, 1)).argmax() == 0  # classes in alphabetical order: red is last


def test_runner_on_lists(lists, vtab, tmp_path, capsys, monkeypatch):
    seen = []
    original = vtab.measure
    monkeypatch.setattr(vtab, "measure", lambda m, data, a: (seen.append(len(data)), original(m, data, a))[1])
    arguments = ["--root", str(lists), "--datasets", "cifar", "dtd", "--scales", "0.5", "1", "--epochs", "12"]
    arguments += ["--warmup-epochs", "1", "--batch-size", "20", "--lr", "0.01", "--workers", "0", "--drop-path", "0"]
    arguments += [*MODEL, *SMALL, "--device", "cpu", "--output", str(tmp_path)]
    result = vtab.main(arguments)
    assert seen == [15, 15, 24]  # the scale is searched on validation images; the test images are seen once
    found = result["results"]["cifar"]
    assert found["classes"] == 100 and found["scale"] in (0.5, 1.0)
    assert found["exit_accuracy"][-1] > 0.8
    for point in found["points"]:
        assert sum(point["shares"]) == pytest.approx(1) and point["macs"] <= found["macs"][-1]
        weighted = sum(s * (a or 0) for s, a in zip(point["shares"], point["accuracy_of_leavers"], strict=True))
        assert weighted == pytest.approx(point["accuracy"])
    out = capsys.readouterr().out
    assert "left out, dtd" in out and "train800" in out and "averages over 1 data sets" in out
    assert vtab.main(arguments)["results"]["cifar"] == found and len(seen) == 3  # done before, not run again


def test_runner_without_exits(lists, vtab, tmp_path):
    arguments = ["--root", str(lists), "--datasets", "cifar", "--method", "bottleneck", "--plain", "--epochs", "2"]
    arguments += ["--workers", "0", *MODEL, *SMALL, "--device", "cpu", "--output", str(tmp_path)]
    found = vtab.main(arguments)["results"]["cifar"]
    assert len(found["exit_accuracy"]) == len(found["macs"]) == 1 and not found["points"]


@pytest.mark.parametrize("method", ["linear", "full"])
def test_linear_probe_and_full_tuning(method, lists, vtab, tmp_path):
    arguments = ["--root", str(lists), "--datasets", "cifar", "--method", method, "--epochs", "2", "--workers", "0"]
    found = vtab.main([*arguments, *MODEL, *SMALL, "--device", "cpu", "--output", str(tmp_path)])["results"]["cifar"]
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=100, **json.loads(SMALL[1]))
    trained = model.head if method == "linear" else model
    assert found["trained_parameters"] == sum(p.numel() for p in trained.parameters())
    assert len(found["exit_accuracy"]) == 1 and not found["points"] and found["plain"]


def test_every_field_of_the_exits_by_command_line(vtab):
    words = {
        "exit_interval": ("2", 2),
        "token": ("mean", "mean"),
        "head_widths": ("9 0 3", (9, 0, 3)),
        "last_head_width": ("6", 6),
        "lambda_shallow": ("0.2 0.4", (0.2, 0.4)),
        "lambda_deep": ("0.9 0.8", (0.9, 0.8)),
        "dropout_shallow": ("none", None),
        "dropout_deep": ("0.3", 0.3),
        "mask": ("none", None),
        "mask_share": ("0.2", 0.2),
        "mask_scope": ("heads", "heads"),
        "mask_seed": ("4", 4),
        "label_smoothing": ("0.1", 0.1),
    }
    assert {*words, "num_classes", "num_frames"} == {field.name for field in dataclasses.fields(DynConfig)}
    line = [word for name, (text, _) in words.items() for word in (f"--{name.replace('_', '-')}", *text.split())]
    args = vtab.parse_args(["--root", "x", *line])
    asked = DynConfig.from_arguments(args, num_classes=5)
    assert {name: getattr(asked, name) for name in words} == {name: value for name, (_, value) in words.items()}
    assert DynConfig.from_arguments(vtab.parse_args(["--root", "x"])) == DynConfig()
    with pytest.raises(SystemExit):
        vtab.parse_args(["--root", "x", "--mask-share", "much"])
    from adapting import run_name

    assert run_name(args, plain=True) == "repadapter" and "mask=None" in run_name(args, plain=False)


def test_other_domains_with_some_of_the_classes(colours, vtab, tmp_path):
    for name, colour in (("red", (250, 30, 20)), ("green", (30, 250, 30))):  # no blue
        (tmp_path / "bright" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (20, 20), colour).save(tmp_path / "bright" / name / f"{index}.png")
    arguments = ["--datasets", str(colours), "--shots", "8", "--shifted", str(tmp_path / "bright"), "--epochs", "6"]
    arguments += ["--scales", "1", "--lr", "0.01", "--warmup-epochs", "1", "--workers", "0", "--batch-size", "12"]
    arguments += [*MODEL, *SMALL, "--exit-interval", "2", "--device", "cpu", "--output", str(tmp_path / "out")]
    found = vtab.main(arguments)["results"][str(colours)]
    shifted = found["shifted"]["bright"]
    assert shifted["classes"] == 2 and shifted["images"] == 8 and len(shifted["points"]) == 2
    data, present = vtab.shifted_set(tmp_path / "bright", ("blue", "green", "red"))
    assert present == [1, 2] and sorted({label for _, label in data.samples}) == [0, 1]
    with pytest.raises(ValueError, match="no class of the training data, such as green"):
        vtab.shifted_set(tmp_path / "bright", ("blue", "red"))

    class Fixed(torch.nn.Module):  # says class 0 everywhere, which the other domain has not, and then class 2
        num_exits = 1

        def begin_exits(self, x):
            return x

        def forward_exit(self, index, state):
            return torch.tensor([[3.0, 1.0, 2.0]]).expand(len(state), 3), state

    logits, _ = vtab.ClassSubset(Fixed(), present).forward_exit(0, torch.zeros(4, 3))
    assert logits.shape == (4, 2) and (logits.argmax(-1) == 1).all()


def test_few_shots_are_augmented_and_vtab_is_not(vtab):
    assert vtab.parse_args(["--root", "x", "--shots", "16"]).augment and not vtab.parse_args(["--root", "x"]).augment
    assert not vtab.parse_args(["--root", "x", "--shots", "16", "--no-augment"]).augment
    steps = repr(vtab.augmentation((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    for part in ("RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", "RandAugment"):
        assert part in steps


def test_similarity_to_the_labels_is_drawn(colours, tmp_path):
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **kwargs)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    from exit_plugins import RepAdapterConfig

    get_dyn_peft_model(vit, RepAdapterConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "adapter")
    arguments = [
        "--data",
        str(colours),
        "--adapter",
        str(tmp_path / "adapter"),
        "--checkpoint",
        str(tmp_path / "vit.pth"),
    ]
    arguments += ["--model", "vit_tiny_patch16_224", *SMALL, "--img-size", "32", "--against", "dynperceiver_test"]
    sys.modules["timing"] = load("benchmarks/timing")
    rows = load("benchmarks/cka").main([*arguments, "--drop-path", "0", "--output", str(tmp_path / "cka.png")])
    plain, adapted, other = rows.values()
    assert len(plain) == len(adapted) == 4 and len(other) > 1 and all(0 <= v <= 1 for row in rows.values() for v in row)
    assert plain == pytest.approx(adapted, abs=1e-5)  # an untrained RepAdapter changes nothing
    assert json.loads((tmp_path / "cka.json").read_text())["rows"] == rows and (tmp_path / "cka.png").stat().st_size


def test_both_averages(vtab):
    names = [name for group in vtab.VTAB.values() for name in group]
    scores = dict(zip(names, np.linspace(0.3, 0.9, 19), strict=True))
    results = {name: {"exit_accuracy": [0.0, score], "points": []} for name, score in scores.items()}
    row = vtab.averages(results)["last exit"]
    values = list(scores.values())
    groups = [np.mean(values[:7]), np.mean(values[7:11]), np.mean(values[11:])]
    assert row["mean of groups"] == pytest.approx(np.mean(groups))
    assert row["mean of sets"] == pytest.approx(np.mean(values))
    # RepAdapter's published row: 76.1 is the mean of the groups, 73.84 the mean of the sets.
    row = [72.4, 91.6, 71.0, 99.2, 91.4, 90.7, 55.1, 85.3, 95.9, 84.6, 75.9]
    row += [82.3, 68.0, 50.4, 79.9, 80.4, 49.2, 38.6, 41.0]
    published = {n: {"exit_accuracy": [v / 100], "points": []} for n, v in zip(names, row, strict=True)}
    averages = vtab.averages(published)["last exit"]
    assert round(100 * averages["mean of groups"], 1) == 76.1
    assert round(100 * averages["mean of sets"], 2) == 73.84
    assert sum(c for g in vtab.VTAB.values() for c in g.values()) == 940  # 49.47 on average


def test_few_shot_from_a_folder_and_from_lists(colours, vtab, tmp_path):
    args = vtab.parse_args(["--datasets", str(colours), "--shots", "4"])
    sets, classes, names = vtab.open_sets(str(colours), args)
    assert names == ("blue", "green", "red")
    assert classes == 3 and [len(sets[name]) for name in ("train", "val", "test")] == [12, 12, 24]
    assert sorted(label for _, label in sets["train"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert not set(sets["train"].index) & set(sets["val"].index)
    folder = tmp_path / "pets"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    for name in ("train_meta.list.num_shot_4.seed_0", "val_meta.list", "test_meta.list"):
        (folder / "annotations" / name).write_text("a.png 1\n")
    args = vtab.parse_args(["--root", str(tmp_path), "--datasets", "pets", "--shots", "4"])
    sets, classes, _ = vtab.open_sets("pets", args)
    assert classes == 2 and all(len(data) == 1 for data in sets.values())


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [("a.png\n", ValueError, "line 1"), ("", ValueError, "no images"), ("b.png 1\n", FileNotFoundError, "not there")],
)
def test_bad_lists(lines, error, message, vtab, tmp_path):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(error, match=message):
        vtab.ListFile(tmp_path, tmp_path / "list.txt")


def test_nothing_found(vtab, tmp_path):
    with pytest.raises(SystemExit, match="no data set"):
        vtab.main(["--root", str(tmp_path), "--output", str(tmp_path / "out")])


def test_images_are_normalised_as_the_folder_of_a_transformers_model_says(tmp_path):
    example = load("finetune_peft")
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **size)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    arguments = argparse.Namespace(model=f"hf:{tmp_path}")
    with pytest.raises(SystemExit, match="no preprocessor_config"):
        example.make_backbone(arguments, 3)
    for settings, mean, std in (
        (dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)),
        (dict(do_normalize=False), (0, 0, 0), (1, 1, 1)),
    ):
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **settings).save_pretrained(tmp_path)
        _, side, found = example.make_backbone(arguments, 3)
        assert side == 32 and found == {"mean": mean, "std": std}


def test_finetuning_by_trainer(tmp_path):
    example = load("finetune_peft")
    arguments = ["--data", "digits", *MODEL, *SMALL, "--epochs", "5", "--cpu", "--output", str(tmp_path)]
    result = example.main([*arguments, "--lr", "0.01", "--exit-interval", "2"])
    assert len(result["exit_accuracy"]) == 2 and len(result["points"]) == 4
    assert max(result["exit_accuracy"]) > 0.2  # of 10 classes; the frozen backbone is random
    assert (tmp_path / "adapter" / "dyn_heads.safetensors").is_file() and (tmp_path / "policy.json").is_file()
