"""Dyn-Adapter on clips: frames as one batch with the mean at every exit, and VideoMAE's joint tokens."""

import copy

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor

from exit_plugins import AdaptiveModel, DynConfig, DynPeftModel, ExitPolicy, RepAdapterConfig, exit_costs
from exit_plugins import get_dyn_peft_model as get_dyn
from exit_plugins.peft.multi_exit import MultiExitBackbone

DYN = dict(exit_interval=1, head_widths=(16, 0))


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **size).eval()


def videomae() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_labels=5,
    )
    return transformers.VideoMAEForVideoClassification(config).eval()


def adapters(*modules: str) -> RepAdapterConfig:
    return RepAdapterConfig(target_modules=list(modules), r=4, groups=2)


def settle(model: torch.nn.Module) -> None:
    """Move what learns off its start, where adapters do nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def clips(frames: int = 3) -> Tensor:
    return torch.randn(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pair() -> tuple[DynPeftModel, DynPeftModel]:
    """A dynamic model of images, and the same over clips of three frames."""
    images = get_dyn(vit(), adapters("qkv", "fc1"), DynConfig(**DYN)).eval()
    settle(images)
    model = get_dyn(vit(), adapters("qkv", "fc1"), DynConfig(**DYN), num_frames=3).eval()
    model.load_state_dict(images.state_dict())
    return images, model


@torch.no_grad()
def test_every_exit_is_the_mean_over_the_frames(pair):
    images, model = pair
    x = clips()
    for found, expected in zip(
        model.forward_exits(x), zip(*(images.forward_exits(clip) for clip in x), strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(expected).mean(1))
    assert exit_costs(model, (3, 3, 32, 32)).macs == pytest.approx(3 * exit_costs(images, (3, 32, 32)).macs)
    policy = ExitPolicy([0.0] * model.num_exits)
    assert AdaptiveModel(model, policy)(x).exit_index.tolist() == [0, 0]
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.forward_exits(x), model.forward_exits(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_of_the_exits_are_those_of_every_frame(pair):
    images, model = pair
    x = clips()
    merged = copy.deepcopy(model).merge_and_unload().eval()
    expected = [torch.stack(found) for found in zip(*(images.exit_features(clip) for clip in x), strict=True)]
    assert expected[0].shape == (2, 3, 32)
    for found in (model.exit_features(x), merged.exit_features(x)):
        torch.testing.assert_close(found, tuple(expected), rtol=1e-4, atol=1e-5)
    for head, feature, logits in zip(
        model.early_heads, model.exit_features(x)[:-1], model.forward_exits(x)[:-1], strict=True
    ):
        torch.testing.assert_close(torch.stack([head(frame) for frame in feature.unbind(1)]).mean(0), logits)
    with pytest.raises(ValueError, match="expected clips"):
        model.exit_features(x[:, 0])


def test_trainers_of_the_transformers_kind_get_their_loss(pair):
    _, model = pair
    out = model.train()(pixel_values=clips(), labels=torch.tensor([1, 2]))
    out.loss.backward()
    assert out.exit_logits.shape == (2, model.num_exits, 5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert isinstance(model(clips()), tuple) and model.eval()(clips()).shape == (2, 5)


@torch.no_grad()
def test_saved_folders_remember_the_frames(pair, tmp_path):
    _, model = pair
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = DynPeftModel.from_pretrained(vit(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded.forward_exits(clips()), model.forward_exits(clips()))
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = MultiExitBackbone.from_pretrained(tmp_path / "merged", vit())
    torch.testing.assert_close(again.forward_exits(clips()), merged.forward_exits(clips()))
    with pytest.raises(ValueError, match="all adapters of one model take the same samples"):
        model.add_adapter("other", adapters("qkv"), dyn_config=DynConfig(**DYN))


@torch.no_grad()
def test_videomae_has_exits_over_its_joint_tokens(tmp_path):
    base = videomae()
    x = clips(frames=4)
    expected = base(x).logits
    base.save_pretrained(tmp_path / "videomae")  # the layout of its published weights
    backbone = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "videomae").eval()
    names = {name.rpartition(".")[2] for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
    model = get_dyn(backbone, adapters(*sorted(names - {"classifier"})), DynConfig(**DYN)).eval()
    torch.testing.assert_close(model.forward_exits(x)[-1], expected, rtol=1e-4, atol=1e-5)  # adapters do nothing yet
    assert model.num_exits == 4 and model.sample_ndim == 4
    costs = exit_costs(model, (4, 3, 32, 32))
    assert len(costs.macs) == 4 and (np.diff(costs.macs) > 0).all()
    assert AdaptiveModel(model, ExitPolicy([0.0] * 4))(x).exit_index.tolist() == [0, 0]
    assert not torch.allclose(model.forward_exits(x)[-1], model.forward_exits(x.flip(1))[-1], atol=1e-4)
    with pytest.raises(ValueError, match="takes clips already"):
        get_dyn(videomae(), adapters(*sorted(names - {"classifier"})), DynConfig(**DYN), num_frames=4)
