"""What a dynamic model refuses, so that no exits stand over weights they do not belong to and no adapter is lost."""

import peft
import pytest
import torch
from peft import LoraConfig
from peft_backbones import make_backbone, make_images, plain_logits
from torch import nn

from exit_plugins import DynConfig, RepAdapterConfig, get_dyn_peft_model
from exit_plugins.peft import exit_weights

REP = dict(target_modules=["qkv", "fc1"], r=4)


def make(vit):
    return get_dyn_peft_model(vit, RepAdapterConfig(**REP), DynConfig(exit_interval=1))


def trained():
    """A model in evaluation whose adapter and heads have moved from where they start."""
    dyn, generator = make(make_backbone("vit")).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in dyn.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return dyn


def test_no_folder_is_written_without_an_adapter_in_the_model(tmp_path):
    for take_out in (lambda dyn: dyn.merge_and_unload(), lambda dyn: dyn.unload()):
        dyn = trained()
        dyn.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        take_out(dyn)
        with pytest.raises(ValueError, match="no adapter is left"):
            dyn.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no adapter is left"):
            dyn.save_pretrained(tmp_path / "new")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_adapter_whose_exits_are_in_use_is_merged():
    dyn = trained()
    dyn.add_adapter("b", RepAdapterConfig(**REP))
    x = make_images()
    before = dyn.forward_exits(x)
    for merge in (dyn.merge_adapter, dyn.merge_and_unload):
        for names in (["b"], ["default", "b"], []):
            with pytest.raises(ValueError, match="active is default"):
                merge(adapter_names=names)
    assert all(map(torch.equal, dyn.forward_exits(x), before))
    dyn.merge_adapter(["default"])
    torch.testing.assert_close(dyn.forward_exits(x), before, atol=1e-5, rtol=1e-4)
    with pytest.warns(UserWarning, match="Unmerging"):
        dyn.set_adapter("b")
    dyn.set_adapter("default")
    torch.testing.assert_close(dyn.forward_exits(x), before, atol=1e-5, rtol=1e-4)
    merged = dyn.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(merged.forward_exits(x), before, atol=1e-5, rtol=1e-4)


def test_a_backbone_with_adapters_is_no_base_for_others():
    for adapt in (
        lambda vit: peft.get_peft_model(vit, LoraConfig(target_modules=["qkv"])),
        make,
    ):
        vit = make_backbone("vit")
        adapted = adapt(vit)  # noqa: F841  as a user holds on to it
        with pytest.raises(ValueError, match="holds adapters already"):
            make(vit)
    vit = make_backbone("vit")
    expected = plain_logits(vit, make_images())
    vit = peft.get_peft_model(vit, LoraConfig(target_modules=["qkv"])).unload()
    assert torch.equal(make(vit).eval()(make_images()), expected)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_labels_that_are_no_classes_need_a_criterion(problem):
    backbone = make_backbone("hf_vit")
    backbone.config.problem_type = problem
    dyn = get_dyn_peft_model(backbone, RepAdapterConfig(target_modules=["fc1"]), DynConfig(exit_interval=1))
    labels = torch.rand(3, 5)
    with pytest.raises(ValueError, match=f"problem_type='{problem}'.*criterion"):
        dyn(pixel_values=make_images(), labels=labels)
    dyn.criterion = nn.functional.binary_cross_entropy_with_logits
    dyn.eval()
    expected = [nn.functional.binary_cross_entropy_with_logits(z, labels) for z in dyn.forward_exits(make_images())]
    weighted = sum(w * z for w, z in zip(exit_weights(4, 0.0), expected, strict=True))
    torch.testing.assert_close(dyn(pixel_values=make_images(), labels=labels).loss, weighted)
    dyn.criterion, backbone.config.problem_type = None, "single_label_classification"
    assert dyn(pixel_values=make_images(), labels=torch.tensor([0, 3, 4])).loss.isfinite()
