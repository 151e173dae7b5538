"""Dyn-Perceiver over a timm network: the network is the feature branch, with its weights and its answers."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from exit_plugins import exit_costs
from exit_plugins.exits.protocol import select_samples
from exit_plugins.timm import save_for_hf

NETWORKS = ["test_resnet", "test_efficientnet", "test_convnext"]
SMALL = dict(num_latents=16, latent_depths=(1, 1, 1, 1), num_classes=7)


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dynperceiver", backbone=name, **{**SMALL, **kwargs}).eval()


def images(batch: int = 4, size: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_feature_branch_is_the_network(name, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    torch.save(network.state_dict(), tmp_path / "network.pth")
    overlay = dict(file=str(tmp_path / "network.pth"))
    # Without Z2X the latents do not change the maps.
    model = make(name, z2x=False, pretrained_backbone=True, pretrained_cfg_overlay=overlay)
    maps = model.forward_intermediates(images(), intermediates_only=True)
    own = network.forward_intermediates(images(), intermediates_only=True)
    for found, expected in zip(maps[:3], own[-4:-1], strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(maps[3], network.forward_features(images()))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_samples_leave_and_the_fused_form_answers_alike(name):
    model = make(name)
    expected = model.forward_exits(images())
    torch.testing.assert_close(model(images()), expected[-1])
    state, kept = model.begin_exits(images()), torch.arange(4)
    for index in range(4):
        logits, state = model.forward_exit(index, state)
        torch.testing.assert_close(logits, expected[index][kept], rtol=1e-4, atol=1e-5)
        if index == 1:
            state, kept = select_samples(state, torch.tensor([1, 3])), torch.tensor([1, 3])
    for other in (copy.deepcopy(model).fuse(), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.forward_exits(images()), expected, rtol=1e-3, atol=1e-4)
    assert (exit_costs(model, (3, 96, 96)).macs[1:] > exit_costs(model, (3, 96, 96)).macs[:-1]).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_that_learns_is_reached(name):
    model = make(name).train()
    sum(logits.square().mean() for logits in model(images())).backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = make(name, freeze_backbone=True).train()
    assert not frozen.backbone.training and not any(p.requires_grad for p in frozen.backbone.parameters())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_what_learns_does_not_depend_on_where_it_is_built(switch):
    expected = {key: p.requires_grad for key, p in make("test_convnext").named_parameters()}
    assert not all(expected.values())  # the network's own head learns nothing
    with switch():
        model = make("test_convnext")
    assert {key: p.requires_grad for key, p in model.named_parameters()} == expected
    with torch.no_grad():
        assert all(logits.isfinite().all() for logits in model.forward_exits(images()))


@torch.no_grad()
def test_saved_folders_load_again(tmp_path):
    model = make("test_resnet", num_classes=3)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded.forward_exits(images()), model.forward_exits(images()), rtol=0, atol=0)


def test_networks_without_four_stages_are_refused():
    with pytest.raises(ValueError, match="convolutional or hierarchical"):
        make("test_vit")
