"""Building blocks of the inference forms against the layers they stand for."""

import pytest
import torch
import torch.nn.functional as F

from exit_plugins.timm.layers import AdaptiveAverage, adaptive_average


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
