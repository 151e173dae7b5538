import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from multiscale import layer_counts, random_config, stated_reads, watched_reads
from options import check_compiled, check_option
from timm.layers import DropPath
from torch import Tensor, nn

from exit_plugins import MultiExitLoss, exit_costs
from exit_plugins.timm.chase import CHASE
from exit_plugins.timm.msdnet import MSDNet

SMALL = dict(form="cifar", num_classes=5, head_width=16, attn_dim=16, head_dim=8)


def macs_of_exits(name: str, **options) -> np.ndarray:
    """Millions of MACs to each exit, the products of the attention counted."""
    model = timm.create_model(name, device="meta", **options)
    return exit_costs(model, model.default_cfg["input_size"]).macs / 1e6


@pytest.mark.slow
def test_the_published_costs():
    # Section III-B: anytime prediction at the last two exits on ImageNet.
    np.testing.assert_allclose(macs_of_exits("chase_step5")[-2:], [2150, 2600], rtol=0.015)
    # Section III-A: the curves on CIFAR go through 27M and 55M; figure 3 ends above them.
    cifar = macs_of_exits("chase_cifar")
    assert cifar[0] < 27 < 55 < cifar[-1] and 70 <= cifar[-1] <= 85


@pytest.mark.parametrize(
    ("name", "behind", "exits"),
    [("chase_step5", (10, 20, 30), (2, 4, 6)), ("chase_cifar", (6, 12), (2, 5))],
)
def test_transitions_stand_between_the_blocks(name, behind, exits):
    """Section II-C: what an exit between two blocks reads comes after the transition; layers and exits from 1."""
    model = timm.create_model(name, device="meta")
    reduced, widths = [], {}
    for layer, module in enumerate(model.layers, start=1):
        if not hasattr(module, "scales"):
            continue
        transitions = [
            part.transition for part in module.scales.values() if not isinstance(part.transition, nn.Identity)
        ]
        if transitions:
            reduced.append(layer)
            assert len(transitions) == len(model.plans[layer - 1].returns)  # of every map that is read later
            for unit in transitions:
                assert unit.conv.kernel_size == (1, 1) and unit.conv.out_channels * 2 <= unit.conv.in_channels
            widths[layer] = transitions[-1].conv.out_channels
    assert tuple(reduced) == behind
    # The scale is gone behind the transition: nothing reads it any more, the transition has no part for it.
    assert [min(model.plans[layer].reads) for layer in behind] == [1 + i for i in range(len(behind))]
    assert [min(model.plans[layer - 1].returns) for layer in behind] == [1 + i for i in range(len(behind))]
    between = [exit for exit, layer in enumerate(model.exit_layers, start=1) if layer + 1 in behind]
    assert tuple(between) == exits
    for exit in between:
        assert model.heads[exit - 1].convs[0].conv.in_channels == widths[model.exit_layers[exit - 1] + 1]


@pytest.mark.parametrize("seed", range(8))
def test_every_function_reads_what_equation_1_says(seed):
    config = random_config(seed)
    stated = stated_reads(config, new_finer=True)
    seen = watched_reads(CHASE(**SMALL, **config, gal=False), size=32)
    assert seen.h == stated.h
    assert seen.f == stated.f
    assert seen.heads == stated.heads


def test_the_papers_table_1():
    """The table's block of 3 scales and 4 layers; the first transition stands behind it."""
    model = CHASE(**SMALL, blocks=3, base=4, step=4, width=8, growth=4, growth_factors=(1, 2, 4), gal=False)
    seen = watched_reads(model, size=32)
    for layer in range(1, 5):
        for scale in range(3):
            assert seen.h[layer, scale] == {(i, scale) for i in range(layer)}
            assert seen.f[layer, scale] == ({(i, scale - 1) for i in range(layer + 1)} if scale else None)


def test_global_attention_reads_the_coarsest_scale_alone():
    config = dict(blocks=4, base=3, step=2, width=8, growth=4, growth_factors=(1, 2, 4))
    model, plain = CHASE(**SMALL, **config), CHASE(**SMALL, **config, gal=False)
    counts = layer_counts(dict(config, step_mode="even"))
    assert len(plain.layers) == counts[-1] and len(model.layers) == counts[-2] + 1
    assert len(model.layers[-1].blocks) == config["step"]
    state = model.eval().begin_exits(torch.zeros(1, 3, 32, 32))
    for index in range(3):
        _, state = model.forward_exit(index, state)
    assert [leaf.shape[-1] for leaf in state] == [4]
    # The dense layers before it are those of the network without it, less what only the replaced layers would read.
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    dense = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(("heads.3", f"layers.{counts[-2]}"))}
    assert dense.items() <= shapes.items()


def test_global_attention_in_two_blocks():
    """The cyan curve of figure 5: the last two blocks, each at the coarsest scale alone."""
    config = dict(blocks=4, base=3, step=2, width=8, growth=4, growth_factors=(1, 2, 4), drop_path_rate=0.8)
    model, counts = CHASE(**SMALL, **config, gal_blocks=2), layer_counts(dict(config, step_mode="even"))
    assert model.exit_layers == [counts[0] - 1, counts[1] - 1, counts[1], counts[1] + 1]
    for layer, in_chs in zip(model.layers[-2:], (model.heads[1].convs[0].conv.in_channels, 16), strict=True):
        assert layer.reduce.conv.in_channels == in_chs and len(layer.blocks) == config["step"]
    # Every block of every layer has its own place in stochastic depth's course.
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert sorted(set(rates)) == pytest.approx([0.1 * i for i in range(1, 9)])
    one, two = macs_of_exits("chase_cifar"), macs_of_exits("chase_cifar", gal_blocks=2)
    np.testing.assert_array_equal(one[:5], two[:5])
    assert two[5] > one[5] and two[6] > one[6]


@pytest.mark.parametrize("options", [dict(gal_blocks=2, cam=False), dict(gal=False)], ids=str)
@pytest.mark.slow
def test_every_option_trains_compiles_and_exports(options):
    check_compiled(check_option("chase_test", options))


# --- the parts, restated ---------------------------------------------------------------------------------------------


def conv_bn(unit: nn.Module, x: Tensor, act: bool = True) -> Tensor:
    conv, bn = unit.conv, unit.bn
    assert conv.bias is None
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.weight.shape[-1] // 2, 1, conv.groups)
    x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    x = x * bn.weight[:, None, None] + bn.bias[:, None, None]
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2))) if act else x


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.fixture
def model() -> CHASE:
    model = timm.create_model("chase_test").double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and (tensor.ndim == 1 or name.endswith("gamma")):
                tensor.normal_(0, 0.5)
    return model


@torch.no_grad()
def test_stem(model):
    stem, x = model.stem.finest, torch.randn(2, 3, 32, 32, dtype=torch.float64)
    first = conv_bn(stem.first, x)
    assert stem.first.conv.stride == (1, 1) and stem.down.conv.stride == (2, 2)
    assert [unit.conv.groups for unit in (stem.first, stem.depthwise, stem.pointwise, stem.down)] == [1, 8, 1, 8]
    expected = conv_bn(stem.down, first + conv_bn(stem.pointwise, conv_bn(stem.depthwise, first)))
    torch.testing.assert_close(stem(x), expected)


@torch.no_grad()
def test_channel_attention(model):
    cam = model.layers[1].scales["1"].down.cam
    channels = cam.fc1.in_channels
    assert cam.fc1.out_channels == channels // 2
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64)
    hidden = gelu(x.mean((2, 3)) @ cam.fc1.weight[:, :, 0, 0].T + cam.fc1.bias)
    weight = 1 / (1 + (-(hidden @ cam.fc2.weight[:, :, 0, 0].T + cam.fc2.bias)).exp())
    torch.testing.assert_close(cam(x), x * weight[:, :, None, None])


@torch.no_grad()
def test_global_attention_layer(model):
    layer = model.layers[-1]
    x = torch.randn(2, layer.reduce.conv.in_channels, 4, 3, dtype=torch.float64)
    expected = conv_bn(layer.reduce, x)
    expected = expected + F.conv2d(expected, layer.position.weight, layer.position.bias, padding=3, groups=32)
    for block in layer.blocks:
        bn = block.norm
        z = F.batch_norm(expected, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        tokens = z.flatten(2).transpose(1, 2)  # (2, 12, 32)
        assert block.attn.qkv.bias is None and block.attn.proj.bias is not None
        query, key, value = (tokens @ block.attn.qkv.weight.T).split(32, dim=-1)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(16)
            heads.append(scores.softmax(-1) @ value[..., head])
        mixed = torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        expected = expected + block.scale1.gamma[:, None, None] * mixed.transpose(1, 2).reshape(2, 32, 4, 3)
        ffn = block.ffn
        hidden = gelu(F.conv2d(conv_bn(ffn.depthwise, expected, act=False), ffn.fc1.weight, ffn.fc1.bias))
        assert hidden.shape[1] == 64 and ffn.depthwise.conv.kernel_size == (7, 7)
        hidden = F.conv2d(hidden, ffn.fc2.weight, ffn.fc2.bias)
        expected = expected + block.scale2.gamma[:, None, None] * hidden
    torch.testing.assert_close(layer([x])[0], expected)


@torch.no_grad()
def test_folding_batch_norms_keeps_every_exit(model):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model.forward_exits(x)
    torch.testing.assert_close(model.fuse().forward_exits(x), before)


def test_layer_scale_starts_at_1e_5():
    gammas = [p for n, p in timm.create_model("chase_test").named_parameters() if n.endswith("gamma")]
    assert len(gammas) == 4 and all((g == 1e-5).all() for g in gammas)


# --- options -------------------------------------------------------------------------------------------------------


def costs_and_state(**kwargs) -> tuple[np.ndarray, dict]:
    model = timm.create_model("chase_cifar", device="meta", **kwargs)
    return exit_costs(model, (3, 32, 32)).macs, model.state_dict()


@pytest.mark.slow
def test_ablations_change_what_they_should():
    macs, state = costs_and_state()
    plain_macs, plain = costs_and_state(cam=False)
    # Without channel attention: nothing but its own weights is gone, and hardly any computation.
    assert set(plain) == {key for key in state if ".cam." not in key}
    assert all(plain[key].shape == state[key].shape for key in plain)
    cam = [v.numel() for k, v in state.items() if ".cam." in k and v.ndim == 4]
    np.testing.assert_allclose(macs[-1] - plain_macs[-1], sum(cam))  # each weight is used once per image
    large = timm.create_model("chase_step5", device="meta")
    share = sum(p.numel() for n, p in large.named_parameters() if ".cam." in n) / exit_costs(large).params[-1]
    assert share == pytest.approx(0.53, abs=0.005)
    # Without global attention: the last exit alone.
    dense_macs, dense = costs_and_state(gal=False)
    np.testing.assert_array_equal(dense_macs[:-1], macs[:-1])
    assert dense_macs[-1] < macs[-1]
    assert {k for k in dense if k.startswith("layers.15.scales.")} and not any(k.startswith("layers.15") for k in state)
    _, wide = costs_and_state(cam_reduction=4)
    key = next(k for k in state if k.endswith("cam.fc1.weight"))
    assert (wide[key].shape[0], state[key].shape[0]) == (state[key].shape[1] // 4, state[key].shape[1] // 2)
    heads = [timm.create_model("chase_cifar", device="meta", head_dim=d).layers[-1].blocks[0].attn for d in (32, 64)]
    assert [attn.num_heads for attn in heads] == [6, 3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gal=False),
        dict(cam=False),
        dict(prune="min"),
        dict(step_mode="lin_grow", reduction=0.7),
        dict(bottleneck=False, reduction=0),
        dict(base=1, step=1),
        dict(growth_factors=(2, 1, 4, 2), base=4),
    ],
    ids=str,
)
def test_nothing_is_there_for_nothing(options):
    config = dict(blocks=3, base=2, step=2, width=8, growth=4, growth_factors=(1, 2, 4)) | options
    model = CHASE(**SMALL, **config).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    loss = MultiExitLoss(3, preset="chase")(model(x), torch.tensor([0, 1, 4]))
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.eval()
    state = model.begin_exits(x)
    for index in range(model.num_exits):
        state = [leaf.detach().requires_grad_() for leaf in state]
        later, rest = [], state
        for deeper in range(index, model.num_exits):
            logits, rest = model.forward_exit(deeper, rest)
            later.append(logits.square().sum())
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(sum(later), state))
        _, state = model.forward_exit(index, state)
    assert state == []


def test_the_loss_is_the_plain_sum(model):
    exits, target = model.train()(torch.randn(4, 3, 32, 32, dtype=torch.float64)), torch.tensor([3, 1, 4, 1])
    expected = sum(-(logits.log_softmax(-1)[range(4), target]).mean() for logits in exits)
    torch.testing.assert_close(MultiExitLoss(3, preset="chase")(exits, target).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_two_share_is_one():
    assert CHASE.forward_exit is MSDNet.forward_exit and CHASE.forward_intermediates is MSDNet.forward_intermediates


@pytest.mark.parametrize(
    "wrong", [dict(attn_dim=40), dict(cam_reduction=0), dict(blocks=1), dict(gal_blocks=0), dict(nonsense=1)], ids=str
)
def test_configurations_that_cannot_be_built(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        timm.create_model("chase_cifar", **wrong)
