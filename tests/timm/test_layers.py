"""Building blocks of the inference forms against the layers they stand for."""

import pytest
import torch
from torch import nn

from exit_plugins.timm.layers import PointwiseConv, fuse_convolutions


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_pointwise_convolution_equals_torchs(batch, stride, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1, stride=stride, bias=batch == 1).double().eval()
    x = torch.randn(batch, 6, 7, 8, dtype=torch.float64).to(memory_format=layout)
    pointwise = PointwiseConv.of(conv)
    y = pointwise(x)
    torch.testing.assert_close(y, conv(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(pointwise)(x), y)
    assert pointwise.weight is conv.weight and pointwise.state_dict().keys() == conv.state_dict().keys()


def test_exported_graphs_keep_the_convolution():
    exported = torch.export.export(PointwiseConv.of(nn.Conv2d(3, 4, 1).eval()), (torch.randn(1, 3, 5, 5),))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default"]


def test_only_plain_pointwise_convolutions_are_replaced():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 1, padding="same"),
        nn.Conv2d(8, 4, 1, padding="valid"),
    ).double()
    network(torch.randn(16, 4, 6, 6, dtype=torch.float64))  # batch statistics that folding has to get right
    network.eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = network(x)
    fused = fuse_convolutions(network)
    assert [type(layer) for layer in fused] == [
        PointwiseConv, nn.Identity, nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Conv2d, PointwiseConv,
    ]  # fmt: skip
    torch.testing.assert_close(fused(x), expected)
