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
