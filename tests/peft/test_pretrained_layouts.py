"""Weights of a backbone from the files of classifiers, of MoCo v3 and of MAE."""

import pytest
import timm
import torch

from exit_plugins.peft.checkpoints import load_backbone

KWARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def vit(seed, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **KWARGS | kwargs)


def moco(source):
    """MoCo v3: two encoders whose heads are projectors, a predictor, all inside DataParallel."""
    state = {}
    for name, model in (("base_encoder", source), ("momentum_encoder", vit(9, num_classes=0))):
        state |= {f"module.{name}.{k}": v for k, v in model.state_dict().items() if not k.startswith("head")}
        state |= {
            f"module.{name}.head.0.weight": torch.zeros(8, 32),
            f"module.{name}.head.1.running_mean": torch.zeros(8),
        }
    state |= {"module.predictor.0.weight": torch.zeros(8, 8)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def mae(source):
    """MAE: the encoder as it is, beside the decoder it was trained with."""
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("head")}
    state |= {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 32)}
    return {"model": state | {"decoder_blocks.0.norm1.weight": torch.zeros(16)}}


LAYOUTS = {
    "plain": lambda source: source.state_dict(),
    "training script": lambda source: {"state_dict": vit(3).state_dict(), "state_dict_ema": source.state_dict()},
    "moco v3": moco,
    "mae": mae,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_but_the_classifier_is_loaded(layout, tmp_path):
    source, target = vit(0, num_classes=7).eval(), vit(1, num_classes=5).eval()
    head = target.head.weight.clone()
    torch.save(LAYOUTS[layout](source), tmp_path / "w.pth")
    assert load_backbone(target, tmp_path / "w.pth") is target
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(target.forward_features(x), source.forward_features(x))
    assert torch.equal(target.head.weight, head)


def test_another_size_is_resampled_and_what_does_not_fit_is_named(tmp_path):
    source = vit(0)
    torch.save(mae(source), tmp_path / "w.pth")
    larger = load_backbone(vit(1, img_size=64), tmp_path / "w.pth")
    assert larger.pos_embed.shape == (1, 65, 32)
    with pytest.raises(ValueError, match=r"does not hold.*missing keys \(blocks.2"):
        load_backbone(vit(1, depth=3), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not hold.*is \(.*32"):
        load_backbone(vit(1, embed_dim=48), tmp_path / "w.pth")
