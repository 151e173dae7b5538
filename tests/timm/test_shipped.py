"""Networks that come with the package: they load by name, fit their card and their policy, and stay small."""

import pytest
import timm
import torch

import exit_plugins  # noqa: F401  registers the models
from exit_plugins import AdaptiveModel
from exit_plugins.timm._shipped import WEIGHTS, list_shipped, shipped_card, shipped_policy


def test_what_ships_is_small():
    assert list_shipped()
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("name", list_shipped())
def test_loads_by_name_and_runs_under_its_policy(name):
    model = timm.create_model(name, pretrained=True).eval()
    card, policy = shipped_card(name), shipped_policy(name)
    assert model.num_classes == len(card["classes"]) == len(set(card["classes"]))
    assert len(card["right"]) == model.num_exits and card["right"] == sorted(card["right"])
    policy.check_model(model)
    out = AdaptiveModel(model, policy)(torch.randn(2, *model.pretrained_cfg["input_size"]))
    assert out.logits.shape == (2, model.num_classes)
    plain = timm.create_model(name.partition(".")[0]).state_dict()
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no weights of 'nothing' come with this package"):
        shipped_policy("nothing")
