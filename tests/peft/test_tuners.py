"""RepAdapter and Bottleneck as PEFT methods, against the published code's figures and hand-written forwards."""

import copy
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from exit_plugins import BottleneckConfig, RepAdapterConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "repadapter"


def golden_tensor(key, shape):
    """A parameter of the golden models, which is computed from its name (tests/golden/repadapter/RULE.md)."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if key.endswith(".bias"):
        return torch.from_numpy(np.float32(0.02) * n)
    if len(shape) == 1 and key.endswith(".weight"):
        return torch.from_numpy(1 + np.float32(0.05) * n)
    if len(shape) >= 2:
        return torch.from_numpy(n / np.float32(np.sqrt(np.prod(shape[1:]))))
    return torch.from_numpy(np.float32(0.02) * n)


def golden_input(shape):
    return torch.from_numpy(np.random.Generator(np.random.PCG64(7)).standard_normal(shape).astype(np.float32))


def small_vit(**kwargs):
    torch.manual_seed(0)
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5) | kwargs
    return timm.models.VisionTransformer(**arguments).eval()


def acting(config_class, **kwargs):
    return config_class(init_weights=False, **kwargs)


REP = dict(target_modules=["qkv", "fc1"], scale=0.5)


def test_golden_block_before_and_after_merging():
    case = json.loads((GOLDEN / "rep_block_d768_depth4_s0.5.json").read_text())
    expected = np.load(GOLDEN / "rep_block_d768_depth4_s0.5.npz")
    vit = timm.models.VisionTransformer(embed_dim=768, depth=4, num_heads=12, num_classes=10)
    values = {key: golden_tensor(key, shape) for key, shape in case["params"].items()}
    vit.load_state_dict({key: value for key, value in values.items() if "adapter_" not in key})
    x = golden_input((2, 3, 224, 224))
    with torch.no_grad():
        np.testing.assert_allclose(vit.eval()(x).numpy(), expected["logits_no_adapter"], atol=1e-5)
    model = get_peft_model(vit, RepAdapterConfig(target_modules=["qkv", "fc1"], scale=case["scale"])).eval()
    for name, layer in model.named_modules():
        if hasattr(layer, "repadapter_A"):
            block = name.split("blocks.")[1].split(".")[0]
            prefix = f"blocks.{block}.adapter_{'attn' if name.endswith('qkv') else 'mlp'}"
            for part, conv in (("A", "conv_A"), ("B", "conv_B")):
                linear = getattr(layer, f"repadapter_{part}")["default"]
                linear.weight.data.copy_(values[f"{prefix}.{conv}.weight"].squeeze(-1))
                linear.bias.data.copy_(values[f"{prefix}.{conv}.bias"])
    with torch.no_grad():
        cls = []
        hooks = [b.register_forward_hook(lambda m, i, o: cls.append(o[:, 0])) for b in model.base_model.model.blocks]
        np.testing.assert_allclose(model(x).numpy(), expected["logits_before"], atol=1e-5)
        np.testing.assert_allclose(torch.stack(cls).numpy(), expected["cls_after_block"], atol=2e-5)
        [hook.remove() for hook in hooks]
        merged = model.merge_and_unload()
        assert type(merged) is timm.models.VisionTransformer and set(merged.state_dict()) == set(vit.state_dict())
        qkv = merged.blocks[0].attn.qkv
        np.testing.assert_allclose(qkv.weight[:16, :16].numpy(), expected["fused_qkv0_weight_slice"], atol=1e-6)
        np.testing.assert_allclose(qkv.bias.numpy(), expected["fused_qkv0_bias"], atol=1e-6)
        np.testing.assert_allclose(merged(x).numpy(), expected["logits_after"], atol=1e-5)


def test_golden_module():
    case = json.loads((GOLDEN / "rep_module_alone.json").read_text())
    model = get_peft_model(
        nn.Sequential(nn.Linear(768, 768)), RepAdapterConfig(target_modules=["0"], scale=case["scale"])
    ).eval()
    layer = model.base_model.model[0]
    for key, shape in case["params"].items():
        part, kind = key.removeprefix("conv_").split(".")
        value = golden_tensor(key, shape)
        getattr(getattr(layer, f"repadapter_{part}")["default"], kind).data.copy_(value.reshape(value.shape[:2]))
    y = layer.adapt(golden_input((2, 5, 768)))
    np.testing.assert_allclose(y.detach().numpy(), np.load(GOLDEN / "rep_module_alone.npz")["y"], atol=1e-6)


def test_parameter_counts_on_vit_base():
    with torch.device("meta"):
        vits = [timm.create_model("vit_base_patch16_224", num_classes=0) for _ in range(3)]
    configs = (
        RepAdapterConfig(target_modules=["qkv", "fc1"]),
        BottleneckConfig(target_modules=["fc2"]),
        LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=["qkv"]),
    )
    counts = [get_peft_model(v, c).get_nb_trainable_parameters()[0] for v, c in zip(vits, configs, strict=True)]
    assert counts == [239_808, 156_768, 294_912]


def test_initialisation():
    torch.manual_seed(1)
    vit, x = small_vit(), torch.randn(2, 3, 32, 32)
    before = vit(x)
    for config in (RepAdapterConfig(**REP), BottleneckConfig(target_modules=["fc2"], init="identity")):
        assert torch.equal(get_peft_model(copy.deepcopy(vit), config).eval()(x), before)
    layer = get_peft_model(small_vit(), RepAdapterConfig(**REP)).base_model.model.blocks[0].attn.qkv
    bound = (6 / (32 + 8)) ** 0.5
    weight = layer.repadapter_A["default"].weight
    assert weight.abs().max() <= bound and weight.std() > 0.4 * bound
    assert not any(p.any() for p in (layer.repadapter_A["default"].bias, *layer.repadapter_B["default"].parameters()))
    layer = get_peft_model(small_vit(), BottleneckConfig(target_modules=["fc2"])).base_model.model.blocks[0].mlp.fc2
    assert 0 < layer.bottleneck_up["default"].bias.std() < 1e-5
    assert layer.bottleneck_up["default"].weight.std() > 0.1


def test_bottleneck_forward_against_the_formula():
    model = get_peft_model(small_vit(), acting(BottleneckConfig, target_modules=["fc2"], r=6)).eval()
    vit, x = model.base_model.model, torch.randn(3, 3, 32, 32)
    reference = small_vit()
    for block, adapted in zip(reference.blocks, vit.blocks, strict=True):
        down, up = adapted.mlp.fc2.bottleneck_down["default"], adapted.mlp.fc2.bottleneck_up["default"]
        block.mlp.register_forward_hook(
            lambda m, i, h, down=down, up=up: h + up(nn.functional.gelu(down(h)))  # eval: no dropout
        )
    torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)


def test_bottleneck_says_that_it_cannot_be_merged():
    model = get_peft_model(small_vit(), acting(BottleneckConfig, target_modules=["fc2"]))
    for attempt in (model.merge_and_unload, model.merge_adapter, model.base_model.model.blocks[0].mlp.fc2.merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            attempt()
    assert type(model.unload()) is timm.models.VisionTransformer


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.mix(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [small_vit, Convolutions], ids=["linear", "convolution"])
def test_merge_unmerge_and_several_adapters(make):
    torch.manual_seed(2)
    base, x = make().eval(), torch.randn(2, 3, 32, 32)
    targets = ["qkv", "fc1"] if make is small_vit else ["mix"]
    model = get_peft_model(base, acting(RepAdapterConfig, target_modules=targets, r=4)).eval()
    model.add_adapter("other", acting(RepAdapterConfig, target_modules=targets, r=6, scale=0.3))
    model.eval()
    original = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    outputs = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        outputs[tuple(names)] = model(x)
        for order in (names, names[::-1]):
            for name in order:
                model.merge_adapter([name])  # in either order, and one after the other
            torch.testing.assert_close(model(x), outputs[tuple(names)], atol=2e-5, rtol=1e-4)
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), outputs[tuple(names)], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(outputs[("default",)], outputs[("other",)], atol=1e-3)
    after = {key: value for key, value in model.state_dict().items() if "base_layer" in key}
    assert original.keys() == after.keys()  # a bias that merging added is gone
    for key in original:
        torch.testing.assert_close(after[key], original[key], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        base_output = model(x)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), outputs[("default",)])
    assert not torch.allclose(base_output, outputs[("default",)], atol=1e-3)
    model.delete_adapter("other")
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(x), outputs[("default",)], atol=2e-5, rtol=1e-4)


def test_merge_at_large_scale_and_broken_weights():
    torch.manual_seed(3)
    model = get_peft_model(small_vit(), acting(RepAdapterConfig, target_modules=["qkv", "fc1"], scale=5.0)).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    copy_of_it = copy.deepcopy(model)
    torch.testing.assert_close(copy_of_it.merge_and_unload()(x), before, atol=5e-4, rtol=0)
    layer = model.base_model.model.blocks[0].attn.qkv
    weight = layer.weight.clone()
    layer.repadapter_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_scale_can_be_changed():
    model = get_peft_model(small_vit(), acting(RepAdapterConfig, target_modules=["qkv"], scale=0.5)).eval()
    layer, x = model.base_model.model.blocks[0].attn.qkv, torch.randn(2, 4, 32)
    difference = layer.adapt(x) - x
    layer.scale_layer(2.0)
    torch.testing.assert_close(layer.adapt(x) - x, 2 * difference, atol=1e-5, rtol=1e-4)
    layer.unscale_layer()
    torch.testing.assert_close(layer.adapt(x) - x, difference, atol=1e-5, rtol=1e-4)


def test_patterns_and_layers():
    config = RepAdapterConfig(
        target_modules=["qkv", "fc1"],
        rank_pattern={"fc1": 4},
        dropout_pattern={r"blocks\.0\.attn\.qkv": 0.5},
        scale_pattern={"qkv": 2.0},
        layers_to_transform=[0, 2],
        layers_pattern="blocks",
    )
    blocks = get_peft_model(small_vit(), config).base_model.model.blocks
    adapted = [i for i, block in enumerate(blocks) if hasattr(block.attn.qkv, "repadapter_A")]
    assert adapted == [0, 2]
    assert blocks[0].mlp.fc1.r["default"] == 4 and blocks[0].attn.qkv.r["default"] == 8
    assert [blocks[i].attn.qkv.repadapter_dropout["default"].p for i in (0, 2)] == [0.5, 0.1]
    assert blocks[0].attn.qkv.scaling["default"] == 2.0 and blocks[0].mlp.fc1.scaling["default"] == 1.0


@pytest.mark.parametrize(
    "config",
    [acting(RepAdapterConfig, **REP), acting(BottleneckConfig, target_modules=["fc2"])],
    ids=["repadapter", "bottleneck"],
)
def test_save_and_load(tmp_path, config):
    model = get_peft_model(small_vit(), config).eval()
    x = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is type(config) and read.peft_type.value == config.peft_type.value
    loaded = PeftModel.from_pretrained(small_vit(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


class SplitAttention(nn.Module):
    """Separate projections of one input, as transformers writes attention."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.q_proj(x) + torch.sin(self.k_proj(x)) * self.v_proj(x)


def test_separate_query_key_value_share_one_adapter(tmp_path):
    torch.manual_seed(4)
    base, x = nn.Sequential(SplitAttention(), SplitAttention()), torch.randn(2, 3, 16)
    pristine = copy.deepcopy(base)
    model = get_peft_model(base, acting(RepAdapterConfig, target_modules=["q_proj", "k_proj", "v_proj"])).eval()
    one = 16 * 8 + 8 + 16 * 4 + 16
    assert model.get_nb_trainable_parameters()[0] == 2 * one
    owner = model.base_model.model[0].q_proj
    expected = x
    for attention, adapted in zip(pristine, model.base_model.model, strict=True):
        expected = attention(adapted.q_proj.adapt(expected))
    torch.testing.assert_close(model(x), expected)

    copied = copy.deepcopy(model)
    assert copied.base_model.model[0].k_proj.repadapter_source["default"] is copied.base_model.model[0].q_proj
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 4
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)(x), expected)
    model.add_adapter("other", acting(RepAdapterConfig, target_modules=["k_proj", "v_proj"]))
    model.eval()
    torch.testing.assert_close(model(x), expected)
    model.delete_adapter("other")
    torch.testing.assert_close(model.merge_and_unload()(x), expected, atol=1e-5, rtol=1e-5)

    own = RepAdapterConfig(target_modules=["q_proj", "k_proj", "v_proj"], share_qkv=False)
    assert get_peft_model(copy.deepcopy(pristine), own).get_nb_trainable_parameters()[0] == 6 * one
    uneven = RepAdapterConfig(target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 4})
    with pytest.raises(ValueError, match="share_qkv=False"):
        get_peft_model(copy.deepcopy(pristine), uneven)
    assert owner.in_features == 16


def test_half_precision_and_training_step():
    model = get_peft_model(small_vit().to(torch.bfloat16), RepAdapterConfig(**REP)).train()
    layer = model.base_model.model.blocks[0].attn.qkv
    assert layer.repadapter_A["default"].weight.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    out = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.repadapter_B["default"].weight.grad.any() and layer.base_layer.weight.grad is None


def test_peft_type_is_a_member_like_any_other():
    kind = RepAdapterConfig(target_modules=["qkv"]).peft_type
    assert kind is peft.PeftType.REPADAPTER is peft.PeftType("REPADAPTER") and kind == "REPADAPTER"
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind
    assert json.dumps(kind) == '"REPADAPTER"' and kind.value == "REPADAPTER"
    assert peft.PeftType.BOTTLENECK in list(peft.PeftType)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(r=0), "at least 1"),
        (dict(r=7), "does not divide"),
        (dict(dropout=1.0), "dropout"),
        (dict(groups=0), "groups"),
        (dict(target_modules=".*qkv", layers_to_transform=[1]), "regular expression"),
        (dict(layers_pattern="blocks"), "layers_to_transform"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepAdapterConfig(**arguments)


def test_bad_targets():
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(small_vit(), RepAdapterConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(small_vit(), RepAdapterConfig())
    with pytest.raises(TypeError, match="nn.Linear"):
        get_peft_model(small_vit(), RepAdapterConfig(target_modules=["norm1"]))
    with pytest.raises(TypeError, match="1 x 1 convolution"):
        get_peft_model(Convolutions(), RepAdapterConfig(target_modules=["stem"]))
    with pytest.raises(ValueError, match="does not divide the 32"):
        get_peft_model(small_vit(), RepAdapterConfig(target_modules=["qkv"], r=6, groups=3))
    with pytest.raises(ValueError, match="unknown init"):
        BottleneckConfig(init="zero")
