"""Base models in half precision and quantised ones: train, save, load, merge, or be told why not."""

import pytest
import torch
from peft import LoraConfig
from peft_backbones import make_backbone, make_images
from torch import nn

from exit_plugins import BottleneckConfig, DynConfig, DynPeftModel, RepAdapterConfig, get_dyn_peft_model

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
@pytest.mark.parametrize("quantise", [int8_by_torchao, int8_by_bitsandbytes], ids=["torchao", "bitsandbytes"])
def test_over_a_quantised_base_all_but_merging_works(quantise, method, tmp_path):
    dyn = trained(quantise(), METHODS[method]())
    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(quantise(), tmp_path)
    before = exits(loaded)
    torch.testing.assert_close(before, exits(dyn))
    with pytest.raises(TypeError, match="cannot be merged into a quantised layer.*unquantised"):
        loaded.merge_and_unload()
    assert torch.equal(exits(loaded), before)  # and nothing has changed
    if method == "repadapter":
        with pytest.raises(TypeError, match="cannot be merged into a quantised layer.*unquantised"):
            loaded.base_model.merge_adapter()


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
