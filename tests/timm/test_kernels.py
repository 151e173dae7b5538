"""The kernels of the inference forms against the layers they stand for."""

import pytest
import torch
from torch import nn

from exit_plugins.timm import kernels
from exit_plugins.timm.kernels import PointwiseConv, TokenLinear
from exit_plugins.timm.layers import fuse_convolutions


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_pointwise_convolution_equals_torchs(maker, batch, stride, layout, monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: maker)
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1, stride=stride, bias=batch == 1).double().eval()
    x = torch.randn(batch, 6, 7, 8, dtype=torch.float64).to(memory_format=layout)
    pointwise = PointwiseConv.of(conv)
    y = pointwise(x)
    torch.testing.assert_close(y, conv(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(pointwise)(x), y)
    assert pointwise.weight is conv.weight and pointwise.state_dict().keys() == conv.state_dict().keys()


@pytest.mark.parametrize("shape", [(6,), (7, 6), (3, 7, 6), (16, 7, 6), (9, 2, 5, 6), (9, 2, 2, 5, 6), (0, 7, 6)])
@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", ""])
@pytest.mark.parametrize("threads", [1, 2])
def test_token_linear_equals_torchs(threads, maker, shape, monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: maker)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 10, bias=len(shape) != 4).double().eval(), torch.randn(shape, dtype=torch.float64)
    ours = TokenLinear.of(linear)
    inputs = [x.clone().requires_grad_(), linear.weight]
    expected, found = linear(inputs[0]), ours(inputs[0])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), linear(x))
    assert ours.weight is linear.weight and ours.state_dict().keys() == linear.state_dict().keys()


def test_exported_graphs_keep_the_linear_layer(monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(
        TokenLinear.of(nn.Linear(3, 4).eval()), (torch.randn(9, 5, 3),), dynamic_shapes=batch
    )
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]


def test_exported_graphs_keep_the_convolution(monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: "GenuineIntel")
    layer, x = PointwiseConv.of(nn.Conv2d(3, 4, 1).eval()), torch.randn(1, 3, 5, 5)
    exported = torch.export.export(layer, (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default"]
    called = [node.kind() for node in torch.jit.trace(layer, (x,)).inlined_graph.nodes()]
    assert "aten::_convolution" in called and "aten::linear" not in called


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm")
def test_layers_that_others_compute_or_listen_to_stay():
    normed, heard = nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 5)
    calls = []
    heard.register_forward_hook(lambda *_: calls.append(1))
    network, x = nn.Sequential(normed, heard, nn.Linear(5, 6)).double().eval(), torch.randn(7, 2, 3).double()
    expected = network(x)
    torch.testing.assert_close(kernels.use_faster_products(network)(x), expected)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Linear, TokenLinear] and len(calls) == 2


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
