"""Code of what lies between two cuts of a traced network, which runs on the network's own modules."""

import operator
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ._analysis import Analysis, Border

__all__ = ["Segment", "make_segment"]


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


class Segment:
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
        self.source, self.scope = state["source"], {**modules, **state["others"]}
        self._compile()

    def __deepcopy__(self, memo):
        return self  # it holds no tensors and never changes


def make_segment(analysis: Analysis, before: Border | None, after: Border | None) -> Segment:
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
            flat: list[Any] = []
            for node in after.sizes:
                value = analysis.values[0][node]
                if isinstance(value, (tuple, list)):
                    flat += [graph.call_function(operator.getitem, (new[node], i)) for i in range(len(value))]
                else:
                    flat.append(new[node])
            state.append(graph.call_function(numbers, (new[like], *flat)))
        graph.output((features, tuple(state)))
    graph.eliminate_dead_code(lambda node: node.op not in ("get_attr",) and not _is_pure(node))
    code = graph.python_code("self")
    return Segment(code.src, code.globals)


def _is_pure(node: fx.Node) -> bool:
    return node.target in (outline, from_outline, copied, number, number_tuple, numbers, getattr, operator.getitem)
