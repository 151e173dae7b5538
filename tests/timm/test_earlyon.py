"""The same exits on the same network, run by another library: the same answers at the same thresholds.

earlyon 0.3 stops a forward pass by an exception from a hook, one image at a time; here whole batches run, samples
leaving one by one.
"""

import pytest
import timm
import torch
from torch import nn

from exit_plugins import AdaptiveModel, ExitPolicy, add_exits

earlyon_models = pytest.importorskip("earlyon.models.custom")

LAYERS = ["layer1", "layer2", "layer3"]


class Pooled(nn.Module):
    """One of earlyon's heads, called as ours are."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features):
        return self.head(features[0])


@torch.no_grad()
def test_same_answers_at_the_same_thresholds():
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=5).eval()
    theirs = earlyon_models.custom_ee(network, LAYERS, 5, input_shape=(1, 3, 64, 64)).eval()
    heads = list(theirs.exit_heads.values())
    for head in heads:
        for parameter in head.parameters():
            parameter.mul_(4)  # logits far enough apart to tell images by
    images = torch.randn(12, 3, 64, 64)
    made = iter(heads)
    ours = add_exits(network, exits=LAYERS, head=lambda cut, num_classes: Pooled(next(made))).eval()
    thresholds = [logits.softmax(-1).amax(-1).quantile(0.7).item() for logits in ours.forward_exits(images)[:-1]]
    theirs.config.confidence_thresholds = thresholds
    out = AdaptiveModel(ours, ExitPolicy([*thresholds, 0.0]))(images)
    assert len(out.exit_index.unique()) == 4
    for image, logits, index in zip(images, out.logits, out.exit_index.tolist(), strict=True):
        other = theirs(image[None])
        assert other.exit_taken % 4 == index
        torch.testing.assert_close(logits, other.prediction[0], rtol=1e-4, atol=1e-5)
