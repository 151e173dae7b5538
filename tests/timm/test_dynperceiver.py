"""Dyn-Perceiver against the published models' outputs, sizes and costs, and its inference form against itself.

The golden files hold what the authors' models give for weights and images that are a rule (``golden_value``); the
tables of sizes and costs were counted from the paper's tables 5 to 7.
"""

import copy
import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from exit_plugins import exit_costs
from exit_plugins.exits.protocol import select_samples
from exit_plugins.timm.dynperceiver import DynPerceiver, checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden" / "dynperceiver"
FAMILIES = {
    "regnety_400mf_l128": "dynperceiver_regnety_400mf",
    "resnet50_0375_l128": "dynperceiver_resnet50_0_375x",
    "mobilenet_v3_075_l128": "dynperceiver_mobilenetv3_0_75x",
}
# The three families at their smallest: few latents and one block of self-attention.
TINY = dict(num_latents=8, latent_depths=(1, 1, 1, 1))

# Name, parameters, 10^9 multiply-accumulates at exits 1 to 4 for 224 x 224.
TABLE = [
    ("dynperceiver_resnet50_0_375x", 20_283_336, (0.619, 1.007, 1.122, 1.190)),
    ("dynperceiver_resnet50_0_5x", 53_092_464, (1.063, 2.053, 2.256, 2.377)),
    ("dynperceiver_resnet50_0_5x_t256", 34_224_288, (1.391, 2.253, 2.457, 2.579)),
    ("dynperceiver_resnet50_0_625x", 51_681_712, (1.871, 3.077, 3.394, 3.583)),
    ("dynperceiver_resnet50_0_75x", 59_848_224, (2.103, 3.529, 3.985, 4.254)),
    ("dynperceiver_regnety_400mf", 13_292_496, (0.2758, 0.5135, 0.6505, 0.6734)),
    ("dynperceiver_regnety_400mf_t256", 13_207_200, (0.3356, 0.6549, 0.7919, 0.8152)),
    ("dynperceiver_regnety_800mf", 21_798_360, (0.4579, 1.0635, 1.2276, 1.2983)),
    ("dynperceiver_regnety_800mf_t256", 21_835_272, (0.5773, 1.3124, 1.4765, 1.5484)),
    ("dynperceiver_regnety_1_6gf", 24_005_438, (0.6188, 1.8923, 2.1016, 2.1932)),
    ("dynperceiver_regnety_3_2gf", 74_968_082, (1.4066, 4.8689, 5.2122, 5.4751)),
    ("dynperceiver_mobilenetv3_0_75x", 9_299_040, (0.0973, 0.1813, 0.2064, 0.2661)),
    ("dynperceiver_mobilenetv3_1_0x", 15_162_448, (0.1327, 0.2759, 0.3193, 0.4248)),
    ("dynperceiver_mobilenetv3_1_0x_deep", 15_242_704, (0.1423, 0.2856, 0.3290, 0.4345)),
    ("dynperceiver_mobilenetv3_1_25x", 22_852_208, (0.2246, 0.4508, 0.5175, 0.6818)),
    ("dynperceiver_mobilenetv3_1_5x", 31_597_568, (0.3906, 0.8171, 0.9120, 1.1498)),
]


def golden_value(key: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a public key, from its name and shape alone."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    normal = torch.from_numpy(np.asarray(generator.standard_normal(shape, dtype=np.float32)))
    if key.endswith("running_mean"):
        return np.float32(0.05) * normal
    if key.endswith("running_var"):
        return 1 + np.float32(0.1) * normal.abs()
    if key.endswith(".weight") and len(shape) >= 2:
        return normal * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    if key.endswith(".weight"):
        return 1 + np.float32(0.05) * normal
    return np.float32(0.02) * normal


def golden_images(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32))


@cache
def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def public_state_dict(name: str) -> dict[str, Tensor]:
    return {key: golden_value(key, tuple(shape)) for key, shape, *_ in golden(name)["state_dict"]}


@cache
def _golden_model(name: str) -> DynPerceiver:
    model = timm.create_model(FAMILIES[name])
    model.load_state_dict(checkpoint_filter_fn(public_state_dict(name), model), strict=True)
    return model.double().eval()


def golden_model(name: str) -> DynPerceiver:
    return copy.deepcopy(_golden_model(name))


def tiny(family: str, **kwargs) -> DynPerceiver:
    return timm.create_model(FAMILIES[family], **TINY, **kwargs)


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


# --- the published models --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["as trained", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_published_models(name, form):
    model = golden_model(name)
    if form == "fused":
        model.fuse()
    images = golden_images(7, (2, 3, 224, 224)).double()
    expected = torch.from_numpy(np.load(GOLDEN / f"{name}.npz")["logits"])
    torch.testing.assert_close(torch.stack(model.forward_exits(images)), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(model(images), expected[-1], rtol=0, atol=1e-8)
    # Not square: the 7x7 grid of X2Z averages windows of unequal size.
    rect = golden(name)["rect"]["logits_first5"]
    expected = torch.tensor([rect[key] for key in golden(name)["exits"]], dtype=torch.float64)
    exits = model.forward_exits(golden_images(8, (1, 3, 192, 256)).double())
    torch.testing.assert_close(torch.cat(exits)[:, :5], expected, rtol=0, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("point", ["pre", "post"])
@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_are_the_published_models(name, point):
    model = golden_model(name)
    model.features_before_z2x = point == "pre"
    images = golden_images(8, (1, 3, 192, 256)).double()
    for stage, fmap in enumerate(model.forward_intermediates(images, intermediates_only=True), start=1):
        expected = golden(name)["rect"][f"{point}{stage}"]
        assert list(fmap.shape) == expected["shape"]
        actual = torch.cat([fmap.mean().view(1), fmap.std().view(1), fmap.flatten()[:5]])
        figures = torch.tensor([expected["mean"], expected["std"], *expected["first5"]], dtype=torch.float64)
        torch.testing.assert_close(actual, figures, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_public_weights_all_arrive(name):
    public = public_state_dict(name)
    state = timm.create_model(FAMILIES[name], device="meta").state_dict()
    ours = checkpoint_filter_fn(public, timm.create_model(FAMILIES[name], device="meta"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in state.items()}
    # Every value arrives, each once.
    sums = [[sum(t.double().pow(n).sum() for t in tensors.values()) for n in (1, 2, 3)] for tensors in (ours, public)]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-6)
    # Eight parameters cannot move any output: the next LayerNorm removes their effect. They are checked by value.
    for stage in range(3):
        for part, index in (("norm", 0), ("fc", 1)):
            expected = public[f"token_mixer.{stage}.{index}.bias"]
            assert ours[f"stages.{stage}.token_mixer.{part}.bias"].equal(expected)
    for stage in range(2):
        last = max(int(key.split(".")[1]) for key in public if key.startswith(f"self_att{stage + 1}."))
        expected = public[f"self_att{stage + 1}.{last}.mlp.fc2.bias"]
        assert ours[f"stages.{stage}.self_attn.{last}.mlp.fc2.bias"].equal(expected)


@pytest.mark.parametrize(("name", "params", "gmacs"), TABLE)
@pytest.mark.slow
def test_parameters_and_costs_are_the_papers(name, params, gmacs):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    costs = exit_costs(model)
    np.testing.assert_allclose(costs.macs / 1e9, gmacs, rtol=0.01)
    assert costs.params[-1] == params


def test_fusing_saves_operations():
    model = timm.create_model("dynperceiver_regnety_400mf").eval()
    before = exit_costs(model)
    # The depthwise 7x7 convolution over 112 x 112 x 32 alone is 20 million of 276.
    assert (exit_costs(model.fuse()).macs < before.macs - 18e6).all()


def test_detection_backbone_costs_are_the_papers():
    def gmacs(**kwargs) -> float:
        backbone = timm.create_model("dynperceiver_regnety_1_6gf", features_only=True, device="meta", **kwargs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone.eval().requires_grad_(False)(torch.empty(1, 3, 800, 1280, device="meta"))
        return counter.get_total_flops() / 2e9

    assert gmacs() == pytest.approx(37.71, rel=1e-3)
    # Before the last Z2X, stage 4's latents feed nothing and go with it.
    assert 32.85 < gmacs(features_before_z2x=True) < 35.93


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_building_moves_no_statistics_and_initialises_as_published(name):
    model = tiny(name)
    for key, buffer in model.named_buffers():
        assert buffer.eq(1 if key.endswith("running_var") else 0).all(), key
    large = timm.create_model(FAMILIES[name], num_latents=1024, latent_depths=(0, 0, 0, 0))
    assert large.latent.std().item() == pytest.approx(0.02, rel=0.05) and large.latent.abs().max() <= 2
    last = model.stages[3].blocks[1]
    conv = next(module for module in last.modules() if isinstance(module, nn.Conv2d))
    fan_out = conv.out_channels * math.prod(conv.kernel_size)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    assert model.stages[0].x2z.key_position.eq(0).all()
    if name.startswith("resnet"):
        assert all(block.bn3.weight.eq(0).all() for stage in model.stages for block in stage.blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_norms_have_the_published_constants(name):
    for key, module in tiny(name).named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            mobile = name.startswith("mobilenet") and isinstance(module, nn.BatchNorm2d)
            assert (module.eps, module.momentum) == ((1e-3, 0.01) if mobile else (1e-5, 0.1)), key


@pytest.mark.parametrize("name", FAMILIES)
def test_training_gives_four_logits_with_the_classes_asked_for(name):
    model = tiny(name, num_classes=7).train()
    outputs = model(torch.randn(4, 3, 64, 96))
    assert isinstance(outputs, tuple) and [logits.shape for logits in outputs] == [(4, 7)] * 4
    sum(logits.square().mean() for logits in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_earlier_exits_learn_from_what_later_ones_make_of_them():
    model = timm.create_model("dynperceiver_test", num_classes=5).train()
    for index in (1, 3):
        model.zero_grad()
        model(torch.randn(4, 3, 64, 64))[index].square().mean().backward()
        assert model.heads[index // 2].fc.weight.grad.abs().sum() > 0


def test_dropout_is_where_the_paper_has_it():
    assert tiny("mobilenet_v3_075_l128").heads[3].hidden[2].p == 0.2
    assert tiny("mobilenet_v3_075_l128", drop_rate=0.5).heads[2].hidden[2].p == 0.5
    assert tiny("resnet50_0375_l128").head_drop.p == 0.0
    assert tiny("resnet50_0375_l128", drop_rate=0.2).head_drop.p == 0.2
    rates = [m.drop_prob for m in tiny("resnet50_0375_l128", drop_path_rate=0.2).modules() if hasattr(m, "drop_prob")]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 16)[1:], rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (65, 127)])
def test_small_and_odd_images(name, size):
    model = tiny(name, num_classes=3).eval()
    assert all(
        logits.isfinite().all() and logits.shape == (1, 3) for logits in model.forward_exits(torch.randn(1, 3, *size))
    )


# --- exits -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_segments_run_only_what_lies_between_exits():
    model = timm.create_model("dynperceiver_test").eval()
    ran = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    state = model.begin_exits(torch.randn(2, 3, 64, 64))
    assert not ran
    expected = [
        ({"stem", "stages.0", "stages.1", "stages.2.grid", "stages.2.x2z", "stages.2.self_attn", "heads.0"}),
        (
            {"stages.2.blocks", "stages.2.token_mixer", "stages.2.channel_expander", "stages.2.z2x", "transfers.0"}
            | {"stages.3.grid", "stages.3.x2z", "stages.3.self_attn", "heads.1"}
        ),
        ({"stages.3.blocks", "heads.2"}),
        ({"stages.3.token_mixer", "stages.3.channel_expander", "stages.3.z2x", "transfers.1", "heads.3"}),
    ]
    for index, roots in enumerate(expected):
        ran.clear()
        _, state = model.forward_exit(index, state)
        stray = {name for name in ran if name != "head_drop" and not any(name.startswith(root) for root in roots)}
        silent = {root for root in roots if not any(name.startswith(root) for name in ran)}
        assert not stray and not silent, (index, stray, silent)
    assert state == ()


@torch.no_grad()
def test_latents_and_map_are_carried_per_sample():
    model = with_statistics(timm.create_model("dynperceiver_test")).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    whole = model.forward_exits(images)
    state = model.begin_exits(images)
    _, state = model.forward_exit(0, state)
    kept = torch.tensor([3, 1])
    logits, state = model.forward_exit(1, select_samples(state, kept))
    torch.testing.assert_close(logits, whole[1][kept], rtol=0, atol=1e-10)
    assert [leaf.shape[0] for leaf in state] == [2, 2, 2]


def test_bad_input_is_refused_in_one_line():
    model = timm.create_model("dynperceiver_test").eval()
    with pytest.raises(ValueError, match="3 channels, got 1"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match="at least 32x32 pixels, got 31x64"):
        model.forward_exits(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match="got 3 dimensions"):
        model.begin_exits(torch.randn(3, 64, 64))
    with pytest.raises(IndexError, match="exits 0 to 3, got 4"):
        model.forward_exit(4, ())
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("dynperceiver_regnety_500mf")
    with pytest.raises(ValueError, match="multiple of 8"):
        timm.create_model("dynperceiver_test", num_latents=12)
    with pytest.raises(ValueError, match="unknown feature branch 'vgg'"):
        timm.create_model("dynperceiver_test", branch="vgg")
    with pytest.raises(ValueError, match="pools by average only"):
        timm.create_model("dynperceiver_test", global_pool="max")
    with pytest.raises(ValueError, match="pools by average only"):
        model.reset_classifier(10, "max")


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("indices", [(0,), (1, 2), (0, 1, 2, 3)])
def test_feature_backbone_keeps_only_what_it_needs(before, indices):
    model = with_statistics(timm.create_model("dynperceiver_test", features_before_z2x=before))
    backbone = FeatureGetterNet(copy.deepcopy(model), out_indices=indices)
    images = torch.randn(2, 3, 64, 96)
    maps = model.forward_intermediates(images, indices=list(indices), intermediates_only=True)
    torch.testing.assert_close(backbone(images), maps)
    torch.testing.assert_close(torch.jit.script(backbone)(images), maps)
    sum(fmap.sum() for fmap in backbone.train()(images)).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    assert backbone.model.eval()(images).shape[1] == backbone.model.head_hidden_size


def test_pruned_model_says_that_its_exits_are_gone():
    model = timm.create_model("dynperceiver_test").eval()
    model.prune_intermediate_layers([1])
    images = torch.randn(1, 3, 64, 64)
    assert model.train().num_exits == 0 and isinstance(model(images), Tensor)
    with pytest.raises(RuntimeError, match="pruned to intermediate features"):
        model.begin_exits(images)
    with pytest.raises(RuntimeError, match="pruned to intermediate features"):
        model.reset_classifier(10)
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(images, indices=[3])


# --- the inference form ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(224, 224), (112, 224), (160, 96)])
def test_fused_model_computes_the_same(name, size):
    model = with_statistics(tiny(name)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model.forward_exits(images)
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert model.fuse() is model and model.fuse() is model
    assert not [
        m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m is not model.heads[3].norm
    ]
    torch.testing.assert_close(model.forward_exits(images), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.forward_intermediates(images, intermediates_only=True), maps, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(images), expected[-1], rtol=0, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_fused_model_in_single_precision_and_other_forms():
    model = with_statistics(timm.create_model("dynperceiver_test"))
    images = torch.randn(3, 3, 112, 112)
    expected = model.forward_exits(images)
    model.fuse(image_size=(112, 112))
    torch.testing.assert_close(model.forward_exits(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(model)(images), expected[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), expected[-1], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected[-1], rtol=1e-5, atol=1e-5)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images[:2]), expected[-1][:2], rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.stack(model.forward_exits(images)).float().isfinite().all()


def test_fusing_needs_evaluation_mode():
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        timm.create_model("dynperceiver_test").train().fuse()
