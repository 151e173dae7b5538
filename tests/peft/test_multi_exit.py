"""Every family's chain of exits against the backbone's own forward, hooked."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_backbones import FAMILIES, make_backbone, make_images, plain_logits
from torch import nn

from exit_plugins import (
    AdaptiveModel,
    BottleneckConfig,
    DynConfig,
    DynPeftModel,
    ExitPolicy,
    RepAdapterConfig,
    exit_costs,
    get_dyn_peft_model,
)
from exit_plugins.exits.protocol import select_samples
from exit_plugins.exits.similarity import cka
from exit_plugins.peft.heads import EarlyHead


@pytest.fixture
def images():
    return make_images()


STAGES = ("swin", "convnext", "convnext_conv_mlp", "hf_swin", "hf_convnext")


def dynamic(name, **kwargs):
    torch.manual_seed(1)
    _, targets, _ = FAMILIES[name]
    interval = None if name in STAGES else 1
    config = RepAdapterConfig(target_modules=targets, r=4, init_weights=False)
    return get_dyn_peft_model(
        make_backbone(name), config, DynConfig(exit_interval=interval, num_classes=5, **kwargs)
    ).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_exits_are_those_of_the_backbones_own_forward(name, images, tmp_path):
    dyn = dynamic(name)
    units = dyn.family.units(dyn.backbone)
    seen = []
    hooks = [dyn.backbone.get_submodule(unit).register_forward_hook(lambda m, i, o: seen.append(o)) for unit in units]
    with torch.no_grad():
        expected_last = plain_logits(dyn.backbone, images)  # the host's forward, our adapters inside
    [hook.remove() for hook in hooks]
    with torch.no_grad():
        exits = dyn.forward_exits(images)
        assert dyn.num_exits == len(exits) == len(units) == len(seen)
        torch.testing.assert_close(exits[-1], expected_last, atol=1e-5, rtol=1e-5)
        for index, features in enumerate(seen[:-1]):
            features = features[0] if isinstance(features, tuple) else features
            if features.ndim == 4:
                token = features.mean((1, 2) if name == "swin" else (2, 3))
            elif name in ("augreg_mean", "siglip", "hf_siglip", "hf_swin"):
                token = features.mean(1)
            else:
                token = features[:, 0]
            torch.testing.assert_close(exits[index], dyn.early_heads[index](token), atol=1e-5, rtol=1e-5)

        # Samples may leave, and the others go on as if nothing had happened.
        state = dyn.begin_exits(images)
        logits, state = dyn.forward_exit(0, state)
        keep = torch.tensor([2, 0])
        state = select_samples(state, keep)
        for index in range(1, dyn.num_exits):
            logits, state = dyn.forward_exit(index, state)
            torch.testing.assert_close(logits, exits[index][keep], atol=1e-5, rtol=1e-5)

        # Files: read by us, read by plain PEFT over the plain backbone, and merged.
        dyn.save_pretrained(tmp_path)
        loaded = DynPeftModel.from_pretrained(make_backbone(name), tmp_path)
        for mine, theirs in zip(exits, loaded.forward_exits(images), strict=True):
            assert torch.equal(mine, theirs)
        if not name.startswith("eva"):  # timm's fused bias keeps any adapter from being called; see the docs
            plain = PeftModel.from_pretrained(make_backbone(name), tmp_path)
            torch.testing.assert_close(plain_logits(plain, images), exits[-1], atol=1e-5, rtol=1e-5)
        merged = loaded.merge_and_unload()
        assert not any("repadapter" in key or "lora" in key for key in merged.state_dict())
        for mine, theirs in zip(exits, merged.forward_exits(images), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged(images), merged.forward_exits(images)[-1])
        fused = copy.deepcopy(merged).fuse()
        for mine, theirs in zip(exits, fused.forward_exits(images.repeat(2, 1, 1, 1)), strict=True):
            torch.testing.assert_close(theirs, mine.repeat(2, 1), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="in its form for inference"):
            fused.save_pretrained(tmp_path / "fused")
        assert not (tmp_path / "fused").exists()
        for mine, theirs in zip(exits, merged.forward_exits(images), strict=True):  # what ran it before still does
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_reaches_adapters_and_heads_and_nothing_else(name, images):
    dyn = dynamic(name, dropout_shallow=0.0, dropout_deep=0.0).train()
    before = {key: value.clone() for key, value in make_backbone(name).state_dict().items()}
    target = torch.tensor([0, 3, 4])
    dyn.set_progress(0.5)
    dyn.loss(dyn(images), target).backward()
    trained = [key for key, p in dyn.named_parameters() if p.requires_grad]
    assert all(any(part in key for part in ("repadapter", "exit_heads", "modules_to_save")) for key in trained)
    for key, p in dyn.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), key
        else:
            assert p.grad is None, key
    torch.optim.AdamW([p for p in dyn.parameters() if p.requires_grad], lr=0.1).step()
    after = dyn.backbone.state_dict()
    for key, value in before.items():
        wrapped = [k for k in after if k.replace(".base_layer", "").replace(".original_module", "") == key]
        assert len(wrapped) == 1 and torch.equal(after[wrapped[0]], value), key


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_reg", "eva", "hf_deit", "hf_beit"])
def test_mean_token(name, images):
    dyn = dynamic(name, token="mean")
    prefix = {"vit": 1, "deit_distilled": 2, "dinov2_reg": 3, "eva": 1, "hf_deit": 2, "hf_beit": 1}[name]
    seen = []
    unit = dyn.backbone.get_submodule(dyn.family.units(dyn.backbone)[0])
    hook = unit.register_forward_hook(lambda m, i, o: seen.append(o))
    logits = dyn.forward_exits(images)[0]
    hook.remove()
    assert seen[0].shape[1] == 16 + prefix
    torch.testing.assert_close(logits, dyn.early_heads[0](seen[0][:, prefix:].mean(1)))


@pytest.mark.parametrize("name", ["vit", "eva", "hf_vit", "hf_dinov2"])
def test_gradient_checkpointing_changes_nothing(name, images):
    plain, thrifty = (dynamic(name, dropout_shallow=0.0, dropout_deep=0.0) for _ in range(2))
    for model in (plain, thrifty):
        model.train()
    backbone = thrifty.backbone
    backbone.set_grad_checkpointing() if hasattr(backbone, "set_grad_checkpointing") else (
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    )
    target = torch.tensor([0, 3, 4])
    for model in (plain, thrifty):
        model.loss(model(images), target).backward()
    for p, q in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_adaptive_inference_on_the_adapted_and_on_the_merged_model(images):
    dyn = dynamic("vit")
    with torch.no_grad():
        exits = torch.stack(dyn.forward_exits(images))
    first = exits[0].softmax(-1).amax(-1)
    threshold = float(first.sort().values[:2].mean())  # between two samples
    policy = ExitPolicy(thresholds=[threshold, 2.0, 2.0, float("-inf")])
    for model, tolerance in ((dyn, 1e-6), (copy.deepcopy(dyn).merge_and_unload(), 1e-5)):
        out = AdaptiveModel(model, policy)(images)
        expected = torch.where(first >= threshold, 0, 3)
        assert torch.equal(out.exit_index, expected)
        torch.testing.assert_close(out.logits, exits[expected, torch.arange(3)], atol=tolerance, rtol=1e-4)
    costs = exit_costs(dyn, (3, 32, 32))
    assert (costs.macs[1:] > costs.macs[:-1]).all()


@pytest.mark.parametrize("name", ["vit", "hf_vit", "swin"])
@pytest.mark.slow
def test_merged_segments_can_be_exported(name, images):
    class Segment(nn.Module):
        def __init__(self, model, index):
            super().__init__()
            self.model, self.index = model, index

        def forward(self, state):
            return self.model.forward_exit(self.index, state)

    merged = dynamic(name).merge_and_unload().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        expected, state = merged.forward_exits(images), merged.begin_exits(images)
        for index in range(merged.num_exits):
            program = torch.export.export(Segment(merged, index), (state,), dynamic_shapes=({0: batch},))
            logits, state = program.module()(state)
            torch.testing.assert_close(logits, expected[index], atol=1e-5, rtol=1e-5)


def test_features_of_the_exits(images):
    """What CKA between exits and labels (the paper's Fig. 4) is computed from."""
    dyn = dynamic("vit")
    with torch.no_grad():
        features = dyn.exit_features(images)
        exits = dyn.forward_exits(images)
        for head, feature, logits in zip(dyn.early_heads, features, exits, strict=False):
            torch.testing.assert_close(head(feature), logits)
        torch.testing.assert_close(dyn.backbone.head(dyn.backbone.norm(features[-1])), exits[-1])
    labels = torch.tensor([0, 1, 1])
    assert all(0 <= cka(feature, labels) <= 1 for feature in features)


def test_heads_of_the_paper():
    dyn = get_dyn_peft_model(make_backbone("vit"), RepAdapterConfig(target_modules=["qkv"]), DynConfig(exit_interval=1))
    hidden = [head.mlp[0].out_features if isinstance(head.mlp, nn.Sequential) else 0 for head in dyn.early_heads]
    assert hidden == [96, 48, 0]

    def early_parameters(widths, classes):
        heads = [EarlyHead(768, classes, wide) for wide in (*widths, 0)]
        return sum(p.numel() for head in heads for p in head.parameters())

    # VTAB-1k has 49.47 classes on average; the paper adds 0.16M, 0.12M and 0.17M parameters.
    for widths, expected in (((96, 48), 0.16e6), ((64, 32), 0.12e6), ((96, 64), 0.17e6)):
        mean = (early_parameters(widths, 49) * 10 + early_parameters(widths, 50) * 9) / 19
        assert abs(mean - expected) < 0.005e6
    assert DynConfig().hidden_widths(2) == [96]
    assert DynConfig().hidden_widths(6) == [96, 72, 48, 0, 0]
    assert DynConfig(head_widths=(0, 0, 64)).hidden_widths(4) == [0, 0, 64]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "hf_vit", "swin"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "bottleneck", "ia3", "oft", "lokr"])
def test_any_peft_method(name, method, images, tmp_path):
    import peft

    _, targets, behind = FAMILIES[name]
    config = {
        "lora": lambda: LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False),
        "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=targets, init_lora_weights=False),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["fc2"], init_weights=False),
        "bottleneck": lambda: BottleneckConfig(target_modules=[behind]),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
        "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["fc2"], init_weights=False),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=targets, init_weights=False),
    }[method]()
    if method == "vera" and name == "swin":
        pytest.skip("VeRA shares projections between layers, and takes the largest; Swin's widths differ by stage")
    quiet = {} if method in ("lora", "dora", "vera", "bottleneck") else dict(dropout_shallow=None, dropout_deep=None)
    torch.manual_seed(3)
    dyn = get_dyn_peft_model(make_backbone(name), config, DynConfig(num_classes=5, **quiet))
    dyn.train()
    dyn.loss(dyn(images), torch.tensor([0, 3, 4])).backward()
    assert all(p.grad is not None for p in dyn.parameters() if p.requires_grad)
    dyn.eval()
    exits = dyn.forward_exits(images)
    torch.testing.assert_close(plain_logits(dyn.backbone, images), exits[-1], atol=1e-5, rtol=1e-5)
    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(make_backbone(name), tmp_path)
    for mine, theirs in zip(exits, loaded.forward_exits(images), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    if method == "bottleneck":
        with pytest.raises(ValueError, match="cannot be merged"):
            loaded.merge_and_unload()
    else:
        for mine, theirs in zip(exits, loaded.merge_and_unload().forward_exits(images), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4)


def test_unknown_model_is_told_what_is_known_and_how_to_add_more():
    with pytest.raises(TypeError, match=r"(?s)any timm classification model.*transformers BeitFor.*register_family"):
        get_dyn_peft_model(Foreign(), RepAdapterConfig(target_modules=["qkv"]))
