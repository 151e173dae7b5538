"""Forms for inference leave what others listen to, or compute the weights of, as it is."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from exit_plugins import cascade

BUILD = {
    **{name: lambda name=name: timm.create_model(name) for name in ("msdnet_test", "chase_test", "with_exits_test")},
    "dynperceiver_test": lambda: timm.create_model("dynperceiver_test"),
    "dvt_test": lambda: timm.create_model("dvt_test"),
    "cascade": lambda: cascade([timm.create_model("test_resnet"), timm.create_model("test_resnet")], sizes=(32, 64)),
}
LISTENED_TO = (
    "Conv2d",
    "BatchNorm2d",
    "BatchNormAct2d",
    "Linear",
    "LayerNorm",
    "Block",
    "Bottleneck",
    "CrossAttention",
)


def change_outputs(model: nn.Module) -> None:
    """Every other module of each kind has a hook that changes what it returns."""
    for kind in LISTENED_TO:
        for module in [m for m in model.modules() if type(m).__name__ == kind][::2]:
            module.register_forward_hook(lambda module, args, out: out * 1.25)


def compute_weights(model: nn.Module) -> None:
    layers = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    for layer in layers[::3]:
        parametrizations.weight_norm(layer)
    for layer in layers[1::3]:
        prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("touch", [change_outputs, compute_weights])
@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_hooks_and_computed_weights_outlive_fuse(name, touch):
    torch.manual_seed(0)
    model = BUILD[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, *model.pretrained_cfg.get("input_size", (3, 64, 64)), dtype=torch.float64)
    plain = model.forward_exits(x)
    touch(model)
    expected = model.forward_exits(x)
    assert all(not torch.allclose(a, b) for a, b in zip(plain, expected, strict=True))
    torch.testing.assert_close(copy.deepcopy(model).fuse().forward_exits(x), expected)
