"""Base models in half precision and quantised ones: train, save, load, merge, or be told why not."""

import pytest
import timm
import torch
from peft import LoraConfig
from peft_backbones import make_backbone, make_images
from torch import nn

from exit_plugins import BottleneckConfig, DynConfig, DynPeftModel, RepAdapterConfig, exit_costs, get_dyn_peft_model

METHODS = {
    "repadapter": lambda: RepAdapterConfig(target_modules=["qkv", "fc1"], r=4),
    "lora": lambda: LoraConfig(target_modules=["qkv", "fc1"]),
    "bottleneck": lambda: BottleneckConfig(target_modules=["fc2"]),
}


def int8_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = make_backbone("vit")
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    return model


def int8_by_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    model = make_backbone("vit")
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            quantised = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            quantised.load_state_dict(layer.state_dict())
            model.blocks.set_submodule(name, quantised)
    return model.to("cpu")


class Int8(nn.Linear):
    """As bitsandbytes' layers are: what it computes with hangs on the parameter, and no copy without weights has it."""

    @classmethod
    def of(cls, layer):
        made = cls(layer.in_features, layer.out_features)
        made.bias = layer.bias
        scale = layer.weight.detach().abs().amax() / 127
        made.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        made.weight.scale = scale
        return made

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.weight.scale, self.bias)


def int8_by_hand():
    model = make_backbone("vit")
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            model.blocks.set_submodule(name, Int8.of(layer))
    return model


def nf4_by_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # Its layers repack weights on some processors, for which widths are multiples of its blocks of 64.
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=5)
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            quantised = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32
            )
            quantised.load_state_dict(layer.state_dict())
            model.blocks.set_submodule(name, quantised)
    return model.to("cpu").eval()


def trained(backbone, config, dtype=torch.float32, steps=3):
    torch.manual_seed(1)
    dyn = get_dyn_peft_model(backbone, config, DynConfig())
    x, target = make_images().to(dtype), torch.tensor([0, 3, 4])
    optimizer = torch.optim.AdamW([p for p in dyn.parameters() if p.requires_grad], lr=1e-2)
    dyn.attach_mask(optimizer)
    losses = []
    for step in range(steps):
        dyn.train().set_progress(step / steps)
        optimizer.zero_grad()
        loss = dyn.loss(dyn(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return dyn.eval()


@torch.no_grad()
def exits(model, dtype=torch.float32):
    return torch.stack([z.float() for z in model.forward_exits(make_images().to(dtype))])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "quantise", [int8_by_hand, int8_by_torchao, int8_by_bitsandbytes], ids=["hand", "torchao", "bitsandbytes"]
)
def test_over_a_quantised_base_all_but_merging_works(quantise, method, tmp_path):
    dyn = trained(quantise(), METHODS[method]())
    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(quantise(), tmp_path)
    before = exits(loaded)
    torch.testing.assert_close(before, exits(dyn))
    plain = get_dyn_peft_model(make_backbone("vit"), METHODS[method](), DynConfig())
    assert exit_costs(loaded, (3, 32, 32)).macs.tolist() == exit_costs(plain, (3, 32, 32)).macs.tolist()
    with pytest.raises(TypeError, match="cannot be merged into a quantised layer.*unquantised"):
        loaded.merge_and_unload()
    assert torch.equal(exits(loaded), before)  # and nothing has changed
    if method == "repadapter":
        with pytest.raises(TypeError, match="cannot be merged into a quantised layer.*unquantised"):
            loaded.base_model.merge_adapter()


@pytest.mark.parametrize("method", METHODS)
def test_over_a_four_bit_base_folders_hold_what_was_said_before_saving(method, tmp_path):
    dyn = trained(nf4_by_bitsandbytes(), METHODS[method]())
    before = exits(dyn)
    dyn.save_pretrained(tmp_path)  # on some processors bitsandbytes rounds the scales of this one at its state_dict()
    loaded = DynPeftModel.from_pretrained(nf4_by_bitsandbytes(), tmp_path)
    torch.testing.assert_close(exits(loaded), before)
    with pytest.raises(TypeError, match="cannot be merged into a quantised layer.*unquantised"):
        loaded.merge_and_unload()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_over_a_half_precision_base_everything_trained_is_in_single(dtype, method, tmp_path):
    config = METHODS[method]()
    config.modules_to_save = ["norm1"]  # in the middle of the network, and the classifier at its end
    dyn = trained(make_backbone("vit").to(dtype), config, dtype)
    assert {p.dtype for p in dyn.parameters() if p.requires_grad} == {torch.float32}
    assert all(z.dtype == torch.float32 for z in dyn.forward_exits(make_images().to(dtype)))
    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(make_backbone("vit").to(dtype), tmp_path)
    assert torch.equal(exits(loaded, dtype), exits(dyn, dtype))
    if method != "bottleneck":
        merged = loaded.merge_and_unload()
        assert {p.dtype for p in merged.backbone.parameters()} == {dtype}
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in merged.modules())
        scale = exits(dyn, dtype).abs().max()
        assert (exits(merged, dtype) - exits(dyn, dtype)).abs().max() < 0.03 * scale
    kept = get_dyn_peft_model(make_backbone("vit").to(dtype), config, autocast_adapter_dtype=False)
    assert dtype in {p.dtype for p in kept.parameters() if p.requires_grad}
