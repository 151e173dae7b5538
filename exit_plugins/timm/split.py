"""Cut a timm network into segments: traced once, and run on the network's own modules, which are called by name.

The trace opens only the modules that contain a cut; every other module is called whole, whatever wraps it by then. A
segment passes on what the network's own forward still reads behind the cut: the values that depend on the images, batch
first. Everything else (positions, sizes, the number of samples) is computed again where it is read, so that samples may
leave at any cut.
"""

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models._input import get_model_input_config
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Cut",
    "Split",
    "find_cuts",
    "is_layer",
    "map_layout",
    "meta_copy",
    "place_cuts",
    "pool_features",
    "trace_network",
]

_BATCHES = (2, 3)  # shapes are compared between these, to see what follows the number of samples
_SIZES = ("shape", "ndim", "dtype", "device", "is_cuda", "itemsize", "nbytes")  # attributes that need no values
_SIZE_METHODS = ("size", "dim", "numel", "stride", "is_floating_point", "type")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Cut:
    """A place where a network can be cut: behind one of its modules.

    Attributes:
        name: The module, as in ``model.named_modules()``.
        macs: Multiply-accumulates of one image from the input up to here.
        shapes: Shape of each tensor the module returns, without the batch.
        layouts: Of each tensor: ``NCHW``, ``NHWC``, ``NLC`` (tokens) or ``NC``.
        prefix_tokens: Of each tensor: how many of its tokens are no positions of the image (class token, registers).
    """

    name: str
    macs: float
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    prefix_tokens: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each tensor."""
        return tuple(s[0] if fmt == "NCHW" else s[-1] for s, fmt in zip(self.shapes, self.layouts, strict=True))

    @property
    def width(self) -> int:
        """Number of features ``pool_features`` gives."""
        return sum(self.widths)


def pool_features(features: Sequence[Tensor], cut: Cut, token: str = "mean") -> Tensor:
    """What a linear head reads behind ``cut``, (B, ``cut.width``): the mean over positions, or the class token.

    Args:
        features: The tensors the cut's module returned.
        cut: The cut.
        token: ``mean``, or ``cls`` for the first token.

    Raises:
        ValueError: The class token was asked for where there is none.
    """
    pooled = []
    for x, layout, prefix in zip(features, cut.layouts, cut.prefix_tokens, strict=True):
        if token == "cls":
            if layout != "NLC" or not prefix:
                raise ValueError(f"there is no class token behind {cut.name}; use the mean over positions.")
            pooled.append(x[:, 0])
        elif layout == "NLC":
            pooled.append((x[:, prefix:] if prefix else x).mean(1))
        elif layout == "NC":
            pooled.append(x)
        else:
            pooled.append(x.mean((2, 3) if layout == "NCHW" else (1, 2)))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without weights, on the meta device; nothing is copied but the modules."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    # Without gradients, or a view of a parameter trips the counter's backward hooks even under no_grad.
    shadow = copy.deepcopy(model, memo).requires_grad_(False)
    for module in shadow.modules():
        # A trace through torch.utils.checkpoint would stay in it for ever.
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
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
        last = next(reversed(self.graph.nodes))
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
        self.calls.setdefault(name, []).append((output, next(reversed(self.graph.nodes))))
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
        shadow: The network, see ``meta_copy``.
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


def _plain(value: Any) -> Any:
    """``value`` with new lists, tuples and dictionaries of the plain kinds."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is tuple or isinstance(value, list):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    return value


class _Profiler(fx.Interpreter):
    """Runs a graph on the meta device and keeps every node's value and the MACs up to it."""

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        super().__init__(net, graph=graph)
        self.seen: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, float] = {}

    def profile(self, x: Tensor) -> None:
        self.counter = FlopCounterMode(display=False)
        with torch.no_grad(), self.counter:
            self.run(x)

    def fetch_args_kwargs_from_env(self, n):
        # As the generated code passes them: plain lists, which some modules change.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def run_node(self, n):
        value = super().run_node(n)
        self.seen[n] = value
        self.macs[n] = self.counter.get_total_flops() / 2 / _BATCHES[0]
        return value


# What segments do at their borders. They are globals of the generated code.


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors a module returned, flat."""
    return tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def copied(value: Any) -> Any:
    """Tuples and lists anew, so that what a module puts into them does not reach the state."""
    return pytree.tree_map(lambda leaf: leaf, value)


def outline(x: Tensor) -> Tensor:
    """A tensor (B, 0, ...) without elements, whose shape says that of ``x`` (B, ...)."""
    return x.new_empty((x.shape[0], 0, *x.shape[1:]))


def from_outline(outlined: Tensor) -> Tensor:
    """A tensor of the shape, type and device of the one ``outline`` was given, and without memory of its own."""
    return outlined.new_empty(()).expand(outlined.shape[0], *outlined.shape[2:])


def numbers(like: Tensor, *values: int) -> Tensor:
    """Sizes ``values`` as the shape (B, 0, ...) of a tensor without elements."""
    return like.new_empty((like.shape[0], 0, *values))


def number(outlined: Tensor, index: int) -> int:
    """Size ``index`` of those ``numbers`` was given."""
    return outlined.shape[index + 2]


def number_tuple(outlined: Tensor, index: int, count: int) -> tuple[int, ...]:
    """The ``count`` sizes from ``index`` on."""
    return tuple(outlined.shape[index + 2 : index + 2 + count])


class _CannotCut(ValueError):
    pass


class _Analysis:
    """A traced network with what is known of every value: its shape, and whether it depends on the images' pixels."""

    def __init__(
        self,
        shadow: nn.Module,
        input_size: Sequence[int],
        opens: Callable[[str, nn.Module], bool],
        must_open: Callable[[str], bool] = lambda name: False,
        method: str = "forward",
    ) -> None:
        self.shadow, self.input_size = shadow, tuple(input_size)
        self.graph, self.calls, self.failures = trace_network(shadow, opens, must_open, method)
        profilers = []
        dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
        for batch in _BATCHES:
            profilers.append(_Profiler(shadow, self.graph))
            profilers[-1].profile(torch.empty((batch, *self.input_size), device="meta", dtype=dtype))
        self.values = [profiler.seen for profiler in profilers]
        self.macs = profilers[0].macs
        self._gather_items()
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.data: dict[fx.Node, bool] = {}
        for node in self.graph.nodes:
            self.data[node] = (
                node.op == "placeholder"
                or (node.op == "call_module" or not self._reads_sizes(node))
                and any(self.data[n] for n in node.all_input_nodes)
            )

    def _gather_items(self) -> None:
        """Take the elements of tuples and lists right where these appear, so that no cut lies between."""
        for node in list(self.graph.nodes):
            if node.target is operator.getitem and node.args[0].op != "placeholder":
                source = node.args[0]
                if isinstance(self.values[0][source], (tuple, list, dict)) and not isinstance(node.args[1], fx.Node):
                    last = source
                    while last.next.target is operator.getitem and last.next.args[0] is source:
                        last = last.next
                    if last is not node:
                        last.append(node)

    @staticmethod
    def _reads_sizes(node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in _SIZE_METHODS
        return node.target is getattr and node.args[1] in _SIZES

    @property
    def total_macs(self) -> float:
        return self.macs[next(reversed(self.graph.nodes))]

    def end_of(self, name: str) -> tuple[int, Any]:
        """Position in the graph behind the module ``name``, and what it returned as nodes."""
        calls = self.calls.get(name, [])
        if len(calls) != 1:
            raise _CannotCut(
                f"{name} runs {len(calls)} times in one forward pass" if calls else f"{name} is not called by itself"
            )
        output, last = calls[0]
        nodes = pytree.tree_map_only(fx.Proxy, lambda proxy: proxy.node, output)
        end = max(self.order[n] for n in (*pytree.tree_leaves(nodes), last) if isinstance(n, fx.Node))
        sequence = list(self.graph.nodes)
        while sequence[end + 1].target is operator.getitem and self.order[sequence[end + 1].args[0]] <= end:
            if not isinstance(self.values[0][sequence[end + 1].args[0]], (tuple, list, dict)):
                break
            end += 1
        return end, nodes

    def tensors(self, nodes: Any, which: int = 0) -> list[Tensor]:
        """The tensors (on meta) that nodes stand for."""
        values = pytree.tree_map_only(fx.Node, lambda node: self.values[which][node], nodes)
        return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]

    def batch_first(self, nodes: Any) -> bool:
        return all(
            t.ndim >= 1 and t.shape[0] == batch
            for which, batch in enumerate(_BATCHES)
            for t in self.tensors(nodes, which)
        )

    def border(self, name: str) -> "_Border":
        return _Border(self, name, *self.end_of(name))

    def cut(self, name: str) -> Cut:
        end, nodes = self.end_of(name)
        shapes = [tuple(t.shape[1:]) for t in self.tensors(nodes)]
        layouts, prefixes = [], []
        for shape in shapes:
            layout, prefix = _layout(self.shadow, shape, self.input_size)
            layouts.append(layout)
            prefixes.append(prefix)
        macs = self.macs[list(self.graph.nodes)[end]]
        return Cut(name, macs, tuple(shapes), tuple(layouts), tuple(prefixes))


def _layout(model: nn.Module, shape: tuple[int, ...], input_size: tuple[int, ...]) -> tuple[str, int]:
    """Layout of a value of ``shape`` (without the batch), and how many prefix tokens it has."""
    if len(shape) == 1:
        return "NC", 0
    height, width = input_size[1:]
    if len(shape) == 3:
        channels_first, channels_last = (
            abs(math.log(height * columns / (width * rows))) for rows, columns in (shape[1:], shape[:2])
        )
        if channels_first == channels_last:
            return getattr(model, "output_fmt", None) or "NCHW", 0
        return ("NCHW" if channels_first < channels_last else "NHWC"), 0
    if len(shape) != 2:
        raise _CannotCut(f"it returns values of shape (batch, {', '.join(map(str, shape))})")
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    grids = set()
    for info in _feature_info(model):
        for divide in (lambda side, by: side // by, lambda side, by: -(-side // by)):
            grids.add(divide(height, int(info["reduction"])) * divide(width, int(info["reduction"])))
    return "NLC", prefix if prefix and shape[0] not in grids and shape[0] - prefix in grids else 0


def map_layout(model: nn.Module, shape: tuple[int, ...], input_size: tuple[int, ...]) -> str:
    """Layout of a value of ``shape`` (without the batch) in ``model``, see ``Cut``; ValueError where there is none."""
    return _layout(model, shape, input_size)[0]


class _Border:
    """What passes a cut: ``carried`` values, ``outlined`` values of which sizes alone are read, ``sizes``."""

    def __init__(self, analysis: _Analysis, name: str, end: int, output: Any) -> None:
        self.analysis, self.name, self.end, self.output = analysis, name, end, output
        if not analysis.tensors(output):
            raise _CannotCut(f"{name} returns no tensor")
        if not analysis.batch_first(output):
            raise _CannotCut(f"what {name} returns has not the samples first")
        self.carried: list[fx.Node] = []
        self.outlined: list[fx.Node] = []
        self.sizes: list[fx.Node] = []
        self.again: set[fx.Node] = set()  # computed again behind the cut
        order = analysis.order
        for node in analysis.graph.nodes:
            if order[node] > end:
                for used in node.all_input_nodes:
                    if order[used] <= end:
                        self._need(used, node)
        self.outlined = [node for node in self.outlined if node not in self.carried]
        for kind in (self.carried, self.outlined, self.sizes):
            kind.sort(key=order.__getitem__)
        if not self.carried:
            raise _CannotCut(f"nothing behind {name} reads the image")

    def _need(self, node: fx.Node, user: fx.Node) -> None:
        analysis = self.analysis
        if node in self.carried or node in self.sizes or node in self.again:
            return
        if node.op == "get_attr":
            self.again.add(node)
        elif not analysis.data[node]:
            self.again.add(node)
            for used in node.all_input_nodes:
                if analysis.data[used] and isinstance(analysis.values[0][used], Tensor):
                    if used not in self.outlined:
                        self._check_samples(used)
                        self.outlined.append(used)
                else:
                    self._need(used, node)
        elif analysis.tensors(node):
            self._check_samples(node)
            value = analysis.values[0][node]
            leaves = pytree.tree_leaves(value)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise _CannotCut(f"{user} reads tensors and numbers in one ({node}) behind {self.name}")
            self.carried.append(node)
        else:
            first, second = (values[node] for values in analysis.values)
            sizes = first if isinstance(first, (tuple, list)) else (first,)
            if first != second or not all(type(size) is int and size >= 0 for size in sizes):
                raise _CannotCut(f"{user} reads {node} behind {self.name}, a number that samples share ({first!r})")
            self.sizes.append(node)

    def _check_samples(self, node: fx.Node) -> None:
        if not self.analysis.batch_first(node):
            shape = [tuple(t.shape) for t in self.analysis.tensors(node)]
            raise _CannotCut(f"{node}, read behind {self.name}, has not the samples first: {shape} of {_BATCHES[0]}")

    @property
    def feature(self) -> int | None:
        """Index in the state of what the module returned, if it is one tensor and passed on."""
        return self.carried.index(self.output) if self.output in self.carried else None

    @property
    def narrow(self) -> bool:
        """Whether nothing else of the image passes here than what the module returned."""
        own = {n for n in pytree.tree_leaves(self.output) if isinstance(n, fx.Node)}
        return all(node in own or node.target is operator.getitem and node.args[0] in own for node in self.carried)


class _Segment:
    """Generated code of what lies between two cuts. Pickles as its source."""

    def __init__(self, source: str, scope: dict[str, Any]) -> None:
        self.source, self.scope = source, scope
        self._compile()

    def _compile(self) -> None:
        namespace = dict(self.scope)
        exec(compile(self.source, "<segment of a traced network>", "exec"), namespace)
        self.function: Callable[..., tuple[tuple[Tensor, ...], tuple[Any, ...]]] = namespace["forward"]

    def __call__(self, net: nn.Module, state: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return self.function(net, *state)

    def __getstate__(self):
        modules = {name: value.__name__ for name, value in self.scope.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self.scope.items() if name not in modules}
        return {"source": self.source, "modules": modules, "others": others}

    def __setstate__(self, state):
        modules = {name: import_module(module) for name, module in state["modules"].items()}
        self.__init__(state["source"], {**modules, **state["others"]})

    def __deepcopy__(self, memo):
        return self  # it holds no tensors and never changes


def _segment(analysis: _Analysis, before: _Border | None, after: _Border | None) -> _Segment:
    """Code of the nodes between two borders; None is the network's beginning or end."""
    graph, new = fx.Graph(), {}
    nodes = list(analysis.graph.nodes)
    if before is None:
        start = 0
    else:
        start = before.end + 1
        for node in before.carried:
            new[node] = graph.placeholder(node.name)
            if not isinstance(analysis.values[0][node], Tensor):
                new[node] = graph.call_function(copied, (new[node],))
        for node in before.outlined:
            new[node] = graph.call_function(from_outline, (graph.placeholder(f"{node.name}_outline"),))
        if before.sizes:
            sizes = graph.placeholder("sizes")
            index = 0
            for node in before.sizes:
                value = analysis.values[0][node]
                if isinstance(value, (tuple, list)):
                    new[node] = graph.call_function(number_tuple, (sizes, index, len(value)))
                    if isinstance(value, list):
                        new[node] = graph.call_function(list, (new[node],))
                    index += len(value)
                else:
                    new[node] = graph.call_function(number, (sizes, index))
                    index += 1
        for node in nodes[:start]:
            if node in before.again:
                new[node] = graph.node_copy(node, new.__getitem__)
        # Placeholders come first in a graph.
        first = next(n for n in graph.nodes if n.op == "placeholder")
        for placeholder in [n for n in graph.nodes if n.op == "placeholder"][1:]:
            first.append(placeholder)
            first = placeholder
    for node in nodes[start : len(nodes) - 1 if after is None else after.end + 1]:
        new[node] = graph.node_copy(node, new.__getitem__)
    if after is None:
        output = pytree.tree_map_only(fx.Node, new.__getitem__, nodes[-1].args[0])
        graph.output(((output,), ()))
    else:
        features = pytree.tree_map_only(fx.Node, new.__getitem__, after.output)
        if isinstance(after.output, fx.Node) and isinstance(analysis.values[0][after.output], Tensor):
            features = (features,)
        else:
            features = graph.call_function(tensors_of, (features,))
        state = [new[node] for node in after.carried]
        state += [graph.call_function(outline, (new[node],)) for node in after.outlined]
        if after.sizes:
            like = next(n for n in after.carried if isinstance(analysis.values[0][n], Tensor))
            sizes = []
            for node in after.sizes:
                value = analysis.values[0][node]
                if isinstance(value, (tuple, list)):
                    sizes += [graph.call_function(operator.getitem, (new[node], i)) for i in range(len(value))]
                else:
                    sizes.append(new[node])
            state.append(graph.call_function(numbers, (new[like], *sizes)))
        graph.output((features, tuple(state)))
    graph.eliminate_dead_code(lambda node: node.op not in ("get_attr",) and not _is_pure(node))
    code = graph.python_code("self")
    return _Segment(code.src, code.globals)


def _is_pure(node: fx.Node) -> bool:
    return node.target in (outline, from_outline, copied, number, number_tuple, numbers, getattr, operator.getitem)


def is_layer(module: nn.Module, timm_layers: bool = True) -> bool:
    """Whether a module is a layer, as opposed to a container or a block that a model file defines.

    Without ``timm_layers`` those that timm composes of others (an attention, a squeeze-and-excitation) do not count.
    """
    if isinstance(module, tuple(get_notrace_modules())):
        return True
    homes = ("torch.nn", "timm.layers") if timm_layers else ("torch.nn",)
    return type(module).__module__.startswith(homes) and not isinstance(module, _CONTAINERS)


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    info = getattr(info, "info", info)
    return [entry for entry in info if isinstance(entry, dict)]


def find_cuts(model: nn.Module, input_size: Sequence[int] | None = None, also: Sequence[str] = ()) -> list[Cut]:
    """Where a network can be cut with nothing else passing on than what one of its stages or blocks returned.

    These are the modules that timm's ``feature_info`` names, and behind the first of them the blocks of the model:
    modules that are no layers and stand in the model itself, in a container, or in a stage. Where several end at the
    same place (a stage and its last block), the one that ``feature_info`` names stands for it, else the outermost.

    Args:
        model: A timm classification model.
        input_size: (channels, height, width); the default is the model's own.
        also: Names of modules to cut behind in any case.

    Returns:
        The cuts, shallow to deep.

    Raises:
        ValueError: The network cannot be traced.
    """
    return _find_cuts(model, input_size, also)[0]


def place_cuts(model: nn.Module, count: int, input_size: Sequence[int] | None = None) -> list[Cut]:
    """The ``count`` of ``find_cuts`` whose segments share the MACs most evenly (least sum of squares).

    Raises:
        ValueError: The network has fewer, or cannot be traced.
    """
    cuts, total, failures = _find_cuts(model, input_size, ())
    if count > len(cuts):
        reasons = "".join(f" At {name}: {error}." for name, error in list(failures.items())[:1])
        raise ValueError(
            f"{type(model).__name__} has {len(cuts)} places for early exits "
            f"({', '.join(cut.name for cut in cuts) or 'none'}), and {count} were asked for.{reasons}"
        )
    macs = {-1: 0.0} | {index: cut.macs for index, cut in enumerate(cuts)}
    # With the last of the cuts chosen so far at a key: the least sum of squares, and which were chosen.
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for chosen in range(count):
        best = {
            index: min(
                (cost + (macs[index] - macs[before]) ** 2, (*path, index))
                for before, (cost, path) in best.items()
                if before < index
            )
            for index in range(chosen, len(cuts))
        }
    _, path = min((cost + (total - macs[last]) ** 2, path) for last, (cost, path) in best.items())
    return [cuts[index] for index in path]


def _find_cuts(
    model: nn.Module, input_size: Sequence[int] | None, also: Sequence[str]
) -> tuple[list[Cut], float, dict[str, Exception]]:
    """The cuts, the MACs of the whole network, and why there are none in what cannot be traced or cut."""
    shadow = meta_copy(model).eval()
    input_size = input_size or get_model_input_config(model)["input_size"]
    analysis = _analyse(shadow, input_size, lambda name, module: not is_layer(module))
    stages = [info["module"] for info in _feature_info(shadow) if "module" in info]
    modules = dict(shadow.named_modules())

    def is_block(name: str) -> bool:
        parent = owner = name.rpartition(".")[0]
        while owner and isinstance(modules[owner], _CONTAINERS):
            owner = owner.rpartition(".")[0]
        if is_layer(modules[name]) or ("." in owner and owner not in stages):
            return False
        # What stands in a stage beside its list of blocks is no block.
        listed = any(isinstance(child, _CONTAINERS) for child in modules[owner].children())
        return not owner or owner != parent or not listed

    def rank(name: str) -> tuple[bool, bool, int]:
        return name not in also, name not in stages, name.count(".")

    found: dict[int, Cut] = {}
    failures = dict(analysis.failures)
    for name in sorted((name for name in analysis.calls if name), key=rank):
        if not (name in also or name in stages or is_block(name)):
            continue
        try:
            border = analysis.border(name)
            if border.end not in found and (border.narrow or name in also or name in stages):
                found[border.end] = analysis.cut(name)
        except _CannotCut as error:
            if name in also:
                raise
            if name in stages:
                failures.setdefault(name, error)
    total = analysis.total_macs
    first = min((end for end, cut in found.items() if cut.name in stages), default=0)
    cuts = [cut for end, cut in sorted(found.items()) if cut.name in also or (end >= first and cut.macs < total)]
    return cuts, total, failures


def _analyse(
    shadow: nn.Module, input_size: Sequence[int], opens, must_open=lambda name: False, method: str = "forward"
) -> _Analysis:
    try:
        return _Analysis(shadow, input_size, opens, must_open, method)
    except Exception as error:
        mode = "training" if shadow.training else "evaluation"
        raise ValueError(
            f"{type(shadow).__name__} cannot be cut: its forward cannot be traced in {mode} mode with images of "
            f"{tuple(input_size)} ({type(error).__name__}: {error})."
        ) from error


class Split:
    """A network as a chain of segments. It holds no weights: every call is given the network, and uses its modules.

    Segment i ends behind the module of cut i; the last one, behind the last cut, gives what the network returns. The
    network may be changed in between: modules wrapped (adapters), replaced or fused, as long as the names of those that
    contain a cut stay. What holds for the whole network (class count, pooling) asks for a new split.

    Args:
        model: A timm classification model.
        names: The modules to cut behind, in the order they run.
        input_size: (channels, height, width) of the images shapes are checked with; the default is the model's own.
            Other sizes work wherever they work in the network.
        method: What of the network to run: its ``forward``, or ``forward_features``.

    Attributes:
        cuts: One ``Cut`` for each name.
        total_macs: Of one image through the whole network.
        output_shapes: Shape of each tensor the network returns, without the batch.
        alone: Whether one tensor alone passes each cut.
        feature_index: For each cut, which tensor of the state is what the cut's module returned; None if it is not
            read again, or not one tensor.

    Raises:
        ValueError: A name is unknown, or the network cannot be cut there; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_size: Sequence[int] | None = None,
        method: str = "forward",
    ) -> None:
        shadow = meta_copy(model)
        input_size = tuple(input_size or get_model_input_config(model)["input_size"])
        _check_names(shadow, names)
        opened = {".".join(parts[:count]) for parts in (n.split(".") for n in names) for count in range(len(parts))}
        self._segments: dict[bool, list[_Segment]] = {}
        for training in (True, False):
            shadow.train(training)
            try:
                analysis = _analyse(shadow, input_size, lambda name, _: name in opened, opened.__contains__, method)
            except ValueError:
                # What the network itself does with a module's answer can ask for a look into that module.
                analysis = _analyse(
                    shadow, input_size, lambda _, module: not is_layer(module), opened.__contains__, method
                )
            try:
                borders = [analysis.border(name) for name in names]
            except _CannotCut as error:
                raise ValueError(f"{type(model).__name__} cannot be cut there: {error}.") from None
            if any(a.end >= b.end for a, b in zip(borders, borders[1:], strict=False)):
                ran = [b.name for b in sorted(borders, key=lambda b: b.end)]
                raise ValueError(f"give the modules in the order they run: {', '.join(ran)}.")
            self._segments[training] = [
                _segment(analysis, before, after)
                for before, after in zip((None, *borders), (*borders, None), strict=True)
            ]
        self.cuts = tuple(analysis.cut(name) for name in names)
        self.total_macs = analysis.total_macs
        result = analysis.tensors(list(analysis.graph.nodes)[-1].args[0])
        self.output_shapes = tuple(tuple(t.shape[1:]) for t in result)
        self.feature_index = tuple(border.feature for border in borders)
        self.alone = all(len(b.carried) == 1 and not b.outlined and not b.sizes for b in borders)

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def run(self, net: nn.Module, index: int, state: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run segment ``index`` of ``net``, in the mode it is in.

        Args:
            net: The network this was made from, or a copy of it.
            index: Segment, from 0.
            state: What the segment before returned; before the first, ``(images,)``.

        Returns:
            What the cut's module returned, as a tuple of tensors (behind the last cut: what the network returns), and
            the state: tensors with the samples first, for the next segment.
        """
        return self._segments[net.training][index](net, state)


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        first = unknown[0].partition(".")[0]
        near = [n for n in modules if n.startswith(first) and n.count(".") <= 2] or list(dict(model.named_children()))
        raise ValueError(
            f"{type(model).__name__} has no module {unknown[0]!r}; it has {', '.join(near[:20])}"
            f"{', ...' if len(near) > 20 else ''}."
        )
    double = {name for name in names if list(names).count(name) > 1}
    if double:
        raise ValueError(f"{', '.join(sorted(double))} given more than once.")
