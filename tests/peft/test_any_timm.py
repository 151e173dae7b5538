"""Adapters and exits on timm's networks, each cut where timm says its stages or blocks end.

``make test-hosts`` checks one network of every model module of timm the same way.
"""

import sys
from pathlib import Path

import peft
import pytest
import timm
import torch
from peft import LoraConfig
from peft.utils.other import ModulesToSaveWrapper

sys.path.append(str(Path(__file__).parents[1] / "timm"))
import any_adapted

from exit_plugins import BottleneckConfig, DynConfig, RepAdapterConfig, get_dyn_peft_model
from exit_plugins.peft import timm_family

# One of each kind, made small; how many exits it gets, and what LoRA adapts where nothing is said.
SWIN = dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), img_size=64, window_size=4)
BASIC = dict(block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
NETWORKS = {
    "test_resnet": ({}, 4, "conv3"),
    "test_efficientnet": ({}, 5, "conv_pw"),
    "test_byobnet": ({}, 3, "conv1_1x1.conv"),
    "test_convnext": ({}, 4, "fc1"),
    "test_mambaout": ({}, 4, "fc1"),
    "test_vit": ({}, 6, "qkv"),
    "test_maxvit": ({}, 4, "qkv"),
    "densenet121": (dict(growth_rate=8, block_config=(1, 2, 1, 1)), 3, "conv1"),
    "resnet18": (BASIC, 4, "conv2"),
    "swinv2_tiny_window8_256": (SWIN, 4, "qkv"),
    "xcit_nano_12_p16_224": (dict(depth=4, embed_dim=48, num_heads=4, cls_attn_layers=1, img_size=64), 4, "qkv"),
    "beit_base_patch16_224": (dict(depth=4, embed_dim=48, num_heads=4, img_size=64), 4, "qkv"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_lora_over_any_network(name, capsys):
    kwargs, exits, target = NETWORKS[name]
    model = any_adapted.check_adapted(name, **kwargs)
    assert model.num_exits == exits
    adapted = [n for n, m in model.backbone.named_modules() if hasattr(m, "lora_A")]
    assert any(n.endswith(target) for n in adapted)
    said = capsys.readouterr().out
    assert f"target_modules left out: LORA adapts {len(adapted)} layers" in said


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (lambda **t: RepAdapterConfig(r=4, init_weights=False, **t), {"conv_pw", "conv_pwl"}),
        (lambda **t: BottleneckConfig(r=4, **t), {"conv_pw", "conv_pwl"}),
        (lambda **t: LoraConfig(r=2, init_lora_weights=False, **t), {"conv_pw", "conv_pwl"}),
    ],
    ids=["repadapter", "bottleneck", "lora"],
)
def test_adapters_on_pointwise_convolutions(config, targets):
    model = any_adapted.check_adapted("test_efficientnet", config(target_modules=["conv_pwl"]))
    assert model.num_exits == 5
    lite = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    dyn = get_dyn_peft_model(lite, config(), DynConfig(dropout_shallow=None, dropout_deep=None)).eval()
    with torch.no_grad():
        exits = dyn.forward_exits(torch.randn(1, 3, 64, 64))
    assert [tuple(z.shape) for z in exits] == [(1, 5)] * dyn.num_exits
    assert set(dyn.peft_config["default"].target_modules) == targets
    if config is not None and dyn.peft_type == "LORA":  # blocks.3 and blocks.5, where timm ends no stage, among them
        adapted = {n.split(".")[1] for n, m in dyn.backbone.named_modules() if hasattr(m, "lora_A")}
        assert adapted == {"0", "1", "2", "3", "4", "5", "6"}


def test_dropout_by_depth_reaches_layers_between_two_units():
    lite = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    dyn = get_dyn_peft_model(lite, LoraConfig(lora_dropout=0.2), DynConfig())
    rates = {}
    for name, module in dyn.backbone.named_modules():
        if name.endswith("lora_dropout.default"):
            rates.setdefault(int(name.split(".")[1]), set()).add(module.p)
    # Units end behind blocks 0, 1, 2, 4, 6: the shallow half are the first two.
    assert rates == {0: {0.5}, 1: {0.5}, 2: {0.1}, 3: {0.1}, 4: {0.1}, 5: {0.1}, 6: {0.1}}


def test_frozen_batch_norms_stay_as_in_evaluation_and_trained_ones_do_not():
    model = any_adapted.adapt("test_efficientnet", LoraConfig(modules_to_save=["conv_stem", "bn1"])).train()
    norms = {n: m for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    trained = {n for n, m in norms.items() if m.weight.requires_grad}
    assert trained and trained < set(norms)
    assert all(module.training == (name in trained) for name, module in norms.items())
    assert not any(module.training for module in model.eval().modules())


def test_dilated_convolutions_are_left_out_and_refused():
    """PEFT builds LoRA's convolutions without dilation, and they fail when they run."""
    small = dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16))
    adapted = {n for n, m in any_adapted.adapt("skresnet18", **small).backbone.named_modules() if hasattr(m, "lora_A")}
    assert "layer1.0.conv1.paths.0.conv" in adapted and "layer1.0.conv1.paths.1.conv" not in adapted
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.paths\.1\.conv cannot run: .* dilation \(2, 2\)"):
        any_adapted.adapt("skresnet18", LoraConfig(target_modules=["paths.0.conv", "paths.1.conv"]), **small)
    any_adapted.adapt("skresnet18", peft.LoKrConfig(target_modules=["paths.1.conv"]), **small)  # which has it


def test_a_network_that_cannot_be_cut_says_why():
    with pytest.raises(ValueError, match=r"TNT has 0 places .* what blocks\.0 returns has not the samples first"):
        any_adapted.adapt("tnt_s_legacy_patch16_224", depth=2)


def test_an_adapter_that_nothing_calls_is_refused(monkeypatch):
    monkeypatch.setattr(timm_family.TimmFamily, "prepare", lambda self, model: None)
    kwargs, _, _ = NETWORKS["beit_base_patch16_224"]
    backbone = any_adapted.make_backbone("beit_base_patch16_224", **kwargs)
    with pytest.raises(ValueError, match="4 of the layers to adapt are never called, such as blocks.0.attn.qkv"):
        get_dyn_peft_model(backbone, LoraConfig(target_modules=["qkv", "fc1"]))


def test_usual_layers_of_other_methods_and_layouts(capsys):
    for config, name, expected in (
        (RepAdapterConfig(), "test_vit", {"qkv", "fc1"}),
        (BottleneckConfig(), "test_vit", {"fc2"}),
        (peft.LNTuningConfig(), "test_vit", {"norm1", "norm2"}),
        (RepAdapterConfig(), "test_resnet", None),
    ):
        model = any_adapted.adapt(name, config)
        found = set(model.peft_config["default"].target_modules)
        assert found == expected or (expected is None and found)
    with pytest.raises(ValueError, match="no usual layers to adapt.*target_modules"):
        any_adapted.adapt("test_efficientnet", peft.LNTuningConfig())


def test_a_classifier_that_is_no_plain_linear_layer():
    model = any_adapted.check_adapted("levit_128s")  # batch norm and linear layer in one module
    assert model.dyn_config["default"].num_classes == 5


def test_a_classifier_with_a_part_of_its_name_is_trained_once():
    model = any_adapted.adapt("iformer_t")  # its classifier is called head, and the layer in it head too
    wrapped = [name for name, module in model.backbone.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrapped == ["head.head"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_exits(images)[-1], model.backbone(images), rtol=1e-4, atol=1e-5)


def test_stages_that_pass_a_tuple_on():
    model = any_adapted.check_adapted("pit_ti_224", img_size=64, depth=[1, 1, 1])  # maps and class token together
    assert model.num_exits == 3


def test_merging_into_a_standardised_weight_is_refused():
    model = any_adapted.adapt("test_nfnet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(TypeError, match="standardises its weight at every call"):
            model.merge_and_unload()
        assert torch.equal(model(x), before)


def test_a_method_that_trips_over_the_layers_is_named_with_them():
    with pytest.raises(ValueError, match=r"PEFT's TINYLORA cannot adapt .*conv_pwl.* of this EfficientNet: it failed"):
        any_adapted.adapt("test_efficientnet", peft.TinyLoraConfig(target_modules=["conv_pwl"]))


def test_merging_into_a_network_that_pefts_own_way_takes_for_an_adapter_is_refused():
    model = any_adapted.adapt("dla46x_c")
    with pytest.raises(TypeError, match="into this DLA: it has a part called base_layer"):
        model.merge_and_unload()


def test_what_cannot_be_cut_says_so():
    with pytest.raises(ValueError, match="exits of its own"):
        get_dyn_peft_model(timm.create_model("dynperceiver_test"), LoraConfig())
