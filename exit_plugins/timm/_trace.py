"""Trace a timm network as a graph of its own modules, called by name; only the modules asked for are opened."""

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from ..exits.meta import meta_copy

__all__ = ["CONTAINERS", "Trace", "is_layer", "trace_network", "traceable_copy"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def traceable_copy(model: nn.Module) -> nn.Module:
    """``meta_copy`` without what keeps a network from being traced."""
    shadow = meta_copy(model)
    name = "grad_checkpointing"
    for module in shadow.modules():
        # A trace through torch.utils.checkpoint would stay in it for ever.
        if getattr(module, name, False):
            setattr(module, name, False)
        # Hooks on layers change no shape, and a temporal shift would ask for whole clips.
        module._forward_pre_hooks.clear()
    return shadow


class _Entry(nn.Module):
    """Calls a method of ``net`` with images alone: further arguments take their defaults."""

    def __init__(self, net: nn.Module, method: str) -> None:
        super().__init__()
        self.net, self.method = net, method

    def forward(self, x):
        return self.net(x) if self.method == "forward" else getattr(self.net, self.method)(x)


def last_node(graph: fx.Graph) -> fx.Node:
    """The newest node of a graph."""
    return next(iter(reversed(graph.nodes)))  # of torch 2.6 reversed nodes are no iterator


class _Tracer(fx.Tracer):
    """Records a graph, and for every module that ran what it returned and which node was the last by then."""

    proxy_buffer_attributes = True

    def __init__(self, opens: Callable[[str, nn.Module], bool], must_open: Callable[[str], bool]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.opens, self.must_open = opens, must_open
        self.calls: dict[str, list[tuple[Any, fx.Node]]] = {}
        self.failures: dict[str, Exception] = {}

    def call_module(self, m, forward, args, kwargs):
        name = self.path_of_module(m)
        last = last_node(self.graph)
        if self.opens(name, m):
            try:
                output = forward(*args, **kwargs)
            except Exception as error:
                if self.must_open(name):
                    raise
                self.failures[name.removeprefix("net.")] = error
                for node in reversed(self.graph.nodes):
                    if node is last:
                        break
                    self.graph.erase_node(node)
                output = self.create_proxy("call_module", name, args, kwargs)
        else:
            output = self.create_proxy("call_module", name, args, kwargs)
        self.calls.setdefault(name, []).append((output, last_node(self.graph)))
        return output

    def create_arg(self, a):
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_own(a):
            raise ValueError("it makes a tensor whose size or device does not come from the images")
        return super().create_arg(a)

    def _is_own(self, tensor: Tensor) -> bool:
        return any(tensor is buffer for buffer in self.root.buffers())


class Trace(NamedTuple):
    """What a trace found.

    Attributes:
        graph: Its targets are names in the network.
        calls: For each module that ran, one entry per call: what it returned (proxies) and the last node by then.
        failures: Of each module that was to be opened and could not be traced, why.
    """

    graph: fx.Graph
    calls: dict[str, list[tuple[Any, fx.Node]]]
    failures: dict[str, Exception]


def trace_network(
    shadow: nn.Module,
    opens: Callable[[str, nn.Module], bool],
    must_open: Callable[[str], bool] = lambda name: False,
    method: str = "forward",
) -> Trace:
    """Trace ``shadow(images)`` in the mode it is in.

    Args:
        shadow: The network, see ``traceable_copy``.
        opens: Given a module's name and itself, whether to trace what it does; else it is one node. A module that
            cannot be traced stays one node.
        must_open: Given a module's name, whether the trace must fail with it instead.
        method: What of the network to trace.
    """

    def stripped(name: str) -> str:
        return name.removeprefix("net").removeprefix(".")

    tracer = _Tracer(
        lambda name, module: name == "net" or opens(stripped(name), module),
        lambda name: name == "net" or must_open(stripped(name)),
    )
    graph = tracer.trace(_Entry(shadow, method))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = stripped(node.target)
    return Trace(graph, {stripped(name): calls for name, calls in tracer.calls.items()}, tracer.failures)


def is_layer(module: nn.Module, timm_layers: bool = True) -> bool:
    """Whether a module is a layer, as opposed to a container or a block that a model file defines.

    Without ``timm_layers`` those that timm composes of others (an attention, a squeeze-and-excitation) do not count.
    """
    if isinstance(module, tuple(get_notrace_modules())):
        return True
    homes = ("torch.nn", "timm.layers") if timm_layers else ("torch.nn",)
    return type(module).__module__.startswith(homes) and not isinstance(module, CONTAINERS)
