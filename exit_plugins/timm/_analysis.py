"""What is known of every value of a traced network: shape, cost, layout, and whether it depends on the images.

From that follows what passes a cut behind one of its modules, and whether the network can be cut there at all.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ._trace import last_node, trace_network

__all__ = ["Analysis", "Border", "CannotCut", "Cut", "analyse", "feature_info", "map_layout", "pool_features"]

_BATCHES = (2, 3)  # shapes are compared between these, to see what follows the number of samples
_SIZES = ("shape", "ndim", "dtype", "device", "is_cuda", "itemsize", "nbytes")  # attributes that need no values
_SIZE_METHODS = ("size", "dim", "numel", "stride", "is_floating_point", "type")


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


class CannotCut(ValueError):
    pass


class Analysis:
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
        return self.macs[last_node(self.graph)]

    def end_of(self, name: str) -> tuple[int, Any]:
        """Position in the graph behind the module ``name``, and what it returned as nodes."""
        calls = self.calls.get(name, [])
        if len(calls) != 1:
            raise CannotCut(
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

    def border(self, name: str) -> "Border":
        return Border(self, name, *self.end_of(name))

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
        raise CannotCut(f"it returns values of shape (batch, {', '.join(map(str, shape))})")
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    grids = set()
    for info in feature_info(model):
        for divide in (lambda side, by: side // by, lambda side, by: -(-side // by)):
            grids.add(divide(height, int(info["reduction"])) * divide(width, int(info["reduction"])))
    return "NLC", prefix if prefix and shape[0] not in grids and shape[0] - prefix in grids else 0


def map_layout(model: nn.Module, shape: tuple[int, ...], input_size: tuple[int, ...]) -> str:
    """Layout of a value of ``shape`` (without the batch) in ``model``, see ``Cut``; ValueError where there is none."""
    return _layout(model, shape, input_size)[0]


class Border:
    """What passes a cut: ``carried`` values, ``outlined`` values of which sizes alone are read, ``sizes``."""

    def __init__(self, analysis: Analysis, name: str, end: int, output: Any) -> None:
        self.analysis, self.name, self.end, self.output = analysis, name, end, output
        if not analysis.tensors(output):
            raise CannotCut(f"{name} returns no tensor")
        if not analysis.batch_first(output):
            raise CannotCut(f"what {name} returns has not the samples first")
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
            raise CannotCut(f"nothing behind {name} reads the image")

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
                raise CannotCut(f"{user} reads tensors and numbers in one ({node}) behind {self.name}")
            self.carried.append(node)
        else:
            first, second = (values[node] for values in analysis.values)
            sizes = first if isinstance(first, (tuple, list)) else (first,)
            if first != second or not all(type(size) is int and size >= 0 for size in sizes):
                raise CannotCut(f"{user} reads {node} behind {self.name}, a number that samples share ({first!r})")
            self.sizes.append(node)

    def _check_samples(self, node: fx.Node) -> None:
        if not self.analysis.batch_first(node):
            shape = [tuple(t.shape) for t in self.analysis.tensors(node)]
            raise CannotCut(f"{node}, read behind {self.name}, has not the samples first: {shape} of {_BATCHES[0]}")

    @property
    def feature(self) -> int | None:
        """Index in the state of what the module returned, if it is one tensor and passed on."""
        return self.carried.index(self.output) if self.output in self.carried else None

    @property
    def narrow(self) -> bool:
        """Whether nothing else of the image passes here than what the module returned."""
        own = {n for n in pytree.tree_leaves(self.output) if isinstance(n, fx.Node)}
        return all(node in own or node.target is operator.getitem and node.args[0] in own for node in self.carried)


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    info = getattr(info, "info", info)
    return [entry for entry in info if isinstance(entry, dict)]


def analyse(
    shadow: nn.Module, input_size: Sequence[int], opens, must_open=lambda name: False, method: str = "forward"
) -> Analysis:
    try:
        return Analysis(shadow, input_size, opens, must_open, method)
    except Exception as error:
        mode = "training" if shadow.training else "evaluation"
        raise ValueError(
            f"{type(shadow).__name__} cannot be cut: its forward cannot be traced in {mode} mode with images of "
            f"{tuple(input_size)} ({type(error).__name__}: {error})."
        ) from error
