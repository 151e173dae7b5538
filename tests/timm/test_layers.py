"""Building blocks of the inference forms against the layers they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exit_plugins.timm import layers
from exit_plugins.timm.layers import (
    AdaptiveAverage,
    PointwiseConv,
    TokenLinear,
    adaptive_average,
    fuse_convolutions,
)


def graph_of_any_size(kind: str, dtype: torch.dtype):
    """``AdaptiveAverage`` as a graph made from one size, to be run at others."""
    seen = torch.randn(2, 3, 14, 10, dtype=dtype)
    if kind == "trace":
        return torch.jit.trace(AdaptiveAverage(7, 5), (seen,), check_trace=False)
    if kind == "script":
        return torch.jit.script(AdaptiveAverage(7, 5))
    if kind == "export":
        free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
        return torch.export.export(AdaptiveAverage(7, 5), (seen,), dynamic_shapes=(free,)).module()
    return torch.fx.symbolic_trace(AdaptiveAverage(7, 5))


@pytest.mark.parametrize("kind", ["trace", "script", "export", "fx"])
def test_adaptive_average_is_torchs_at_any_size_in_every_graph(kind):
    graph = graph_of_any_size(kind, torch.float64)
    for height, width in [(14, 10), (7, 5), (3, 2), (8, 8), (64, 61), (200, 336), (2, 40)]:
        x = torch.randn(4, 3, height, width, dtype=torch.float64)
        expected = F.adaptive_avg_pool2d(x, (7, 5))
        torch.testing.assert_close(graph(x), expected, rtol=0, atol=1e-14)
        assert torch.equal(adaptive_average(x, 7, 5), expected)
    # Large values of half precision: their sums would overflow, their means do not.
    graph, large = graph_of_any_size(kind, torch.float16), torch.rand(4, 3, 100, 200).half() * 500 + 1000
    torch.testing.assert_close(graph(large), F.adaptive_avg_pool2d(large.float(), (7, 5)).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_pointwise_convolution_equals_torchs(maker, batch, stride, layout, monkeypatch):
    monkeypatch.setattr(layers, "processor", lambda: maker)
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1, stride=stride, bias=batch == 1).double().eval()
    x = torch.randn(batch, 6, 7, 8, dtype=torch.float64).to(memory_format=layout)
    pointwise = PointwiseConv.of(conv)
    y = pointwise(x)
    torch.testing.assert_close(y, conv(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(pointwise)(x), y)
    assert pointwise.weight is conv.weight and pointwise.state_dict().keys() == conv.state_dict().keys()


@pytest.mark.parametrize("shape", [(6,), (7, 6), (3, 7, 6), (9, 7, 6), (9, 2, 5, 6), (9, 2, 2, 5, 6), (0, 7, 6)])
@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", ""])
def test_token_linear_equals_torchs(maker, shape, monkeypatch):
    monkeypatch.setattr(layers, "processor", lambda: maker)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 10, bias=len(shape) != 4).double().eval(), torch.randn(shape, dtype=torch.float64)
    ours = TokenLinear.of(linear)
    torch.testing.assert_close(ours(x), linear(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), linear(x))
    assert ours.weight is linear.weight and ours.state_dict().keys() == linear.state_dict().keys()


def test_exported_graphs_keep_the_linear_layer(monkeypatch):
    monkeypatch.setattr(layers, "processor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(
        TokenLinear.of(nn.Linear(3, 4).eval()), (torch.randn(9, 5, 3),), dynamic_shapes=batch
    )
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]


def test_exported_graphs_keep_the_convolution(monkeypatch):
    monkeypatch.setattr(layers, "processor", lambda: "GenuineIntel")
    layer, x = PointwiseConv.of(nn.Conv2d(3, 4, 1).eval()), torch.randn(1, 3, 5, 5)
    exported = torch.export.export(layer, (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default"]
    called = [node.kind() for node in torch.jit.trace(layer, (x,)).inlined_graph.nodes()]
    assert "aten::_convolution" in called and "aten::linear" not in called


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
