"""A saved folder holds a model, the names of its classes and its policy, and gives them back together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, collect_exits, exit_costs, solve_thresholds
from exit_plugins.cli import main
from exit_plugins.exits.digests import describe_model, weights_digest
from exit_plugins.timm import load_from_hf, save_for_hf


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("msdnet_test", num_classes=3, in_chans=1).eval()


@pytest.fixture
def policy(model):
    torch.manual_seed(1)
    images = TensorDataset(torch.randn(40, 1, 32, 32), torch.randint(3, (40,)))
    costs = exit_costs(model, (1, 32, 32)).macs
    return solve_thresholds(collect_exits(model, DataLoader(images, 8)), costs, budget=0.8 * costs[-1], model=model)


def test_a_folder_is_the_old_model_or_the_new_one(model, tmp_path, monkeypatch):
    save_for_hf(model, tmp_path, classes=("ant", "bee", "cow"))
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = timm.create_model("msdnet_test", num_classes=3, in_chans=1).eval()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("timm.models._hub.save_config_for_hf", full_disk)  # the weights are written by then
        for safe in (True, False):
            with pytest.raises(OSError, match="no space"):
                save_for_hf(other, tmp_path, classes=("x", "y", "z"), safe_serialization=safe)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_for_hf(other, tmp_path, safe_serialization=False)  # the weights of before, which timm would prefer, go
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(load_from_hf(f"local-dir:{tmp_path}")[0](x), other(x))


def test_model_and_policy_travel_together(model, policy, tmp_path):
    save_for_hf(model, tmp_path, policy=policy, classes=("ant", "bee", "cow"))
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["ant", "bee", "cow"]
    loaded, found = load_from_hf(f"local-dir:{tmp_path}")
    assert found.thresholds.tolist() == policy.thresholds.tolist()
    x = torch.randn(6, 1, 32, 32)
    ours, theirs = AdaptiveModel(model, policy)(x), AdaptiveModel(loaded, found)(x)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.exit_index, theirs.exit_index)
    (tmp_path / "policy.json").unlink()
    assert load_from_hf(f"local-dir:{tmp_path}")[1] is None
    with pytest.raises(ValueError, match="expected local-dir:FOLDER or hf-hub"):
        load_from_hf(str(tmp_path))


def test_a_policy_for_other_weights_does_not_travel_along(model, policy, tmp_path):
    other = timm.create_model("msdnet_test", num_classes=3, in_chans=1)
    with pytest.raises(ValueError, match="other weights"):
        save_for_hf(other, tmp_path / "other", policy=policy)
    with pytest.raises(ValueError, match="2 names for a model of 3 classes"):
        save_for_hf(other, tmp_path / "other", classes=("ant", "bee"))
    assert not (tmp_path / "other").exists()
    save_for_hf(other, tmp_path)
    policy.save(tmp_path / "policy.json")
    with pytest.raises(ValueError, match="other weights"):
        load_from_hf(f"local-dir:{tmp_path}")
    # By hand: nothing says what it was solved with.
    replace(policy, model=None).save(tmp_path / "policy.json")
    assert isinstance(load_from_hf(f"local-dir:{tmp_path}")[1], ExitPolicy)


@pytest.mark.slow
def test_the_command_line_takes_classes_and_channels_from_the_card(model, policy, tmp_path, capsys):
    folder, data = tmp_path / "saved", tmp_path / "data" / "test" / "cow"
    save_for_hf(model, folder, policy=replace(policy, source={}), classes=("ant", "bee", "cow"))
    data.mkdir(parents=True)
    (data.parent / "bee").mkdir()
    for number, place in enumerate((data, data, data.parent / "bee")):
        Image.fromarray(np.full((32, 32), 80 * number, np.uint8)).save(place / f"{number}.png")
    for words in ([f"local-dir:{folder}"], ["msdnet_test", "--checkpoint", str(folder / "model.safetensors")]):
        more = [] if words[0].startswith("local") else ["--model-kwargs", "in_chans=1"]
        table = str(tmp_path / "t.npz")
        assert main(["evaluate", *words, *more, "--data", str(tmp_path / "data"), "--save-table", table]) == 0
        assert sorted(ExitTable.load(table).target.tolist()) == [1, 2, 2]
    words = ["predict", str(data), "--policy", str(folder / "policy.json"), "--model", f"local-dir:{folder}", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    assert {row["label"] for row in json.loads(capsys.readouterr().out)} <= {"ant", "bee", "cow"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, said",
    [
        ("msdnet_test", {}, {}),
        ("msdnet_test", {"growth": 4, "drop_rate": 0.1}, {"growth": 4}),
        ("dynperceiver_test", {"latent_depths": (1, 1, 1, 1), "fkt": False}, {"latent_depths": [1] * 4, "fkt": False}),
        ("with_exits_test", {"train": "heads"}, {"train": "heads"}),
        ("cascade_test", {}, {}),
    ],
)
def test_a_policy_says_how_its_model_was_built(name, options, said, tmp_path):
    model = timm.create_model(name, num_classes=3, **options).eval()
    described = describe_model(model)
    assert described["architecture"] == name and said.items() <= described["model_kwargs"].items()
    policy = ExitPolicy([0.9] * model.num_exits, model={**described, "weights": weights_digest(model)})
    policy.save(tmp_path / "p.json")
    kwargs = ExitPolicy.load(tmp_path / "p.json").model["model_kwargs"]
    assert not {"num_classes", "drop_rate"} & kwargs.keys()
    again = timm.create_model(described["architecture"], num_classes=3, **kwargs)
    again.load_state_dict(model.state_dict())
    # The card beside saved weights says more of the same model.
    save_for_hf(model, tmp_path / "saved", policy=policy)
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    words = ["predict", str(image), "--policy", str(tmp_path / "saved" / "policy.json")]
    assert main([*words, "--checkpoint", str(tmp_path / "saved" / "model.safetensors")]) == 0
    loaded, _ = load_from_hf(f"local-dir:{tmp_path / 'saved'}")
    assert kwargs.items() <= describe_model(loaded)["model_kwargs"].items()


def test_what_json_cannot_hold_is_not_known():
    model = timm.create_model("msdnet_test", num_classes=3)
    model._model_args["norm_layer"] = torch.nn.BatchNorm2d
    assert describe_model(model)["model_kwargs"] is None
