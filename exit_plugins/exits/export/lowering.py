"""The operations an exported segment is written in: on fixed shapes, but for the batch.

torch's exporter says attention, unpacking and changes of shape so that they hold for any rank, shape and type: it reads
shapes when the graph runs, computes other shapes from them and casts their numbers. An engine does not see through
that, and on the small products of an early exit it takes longer than the arithmetic. Here every shape but the batch is
known, and is written down.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .runtimes import require

__all__ = ["PlainOperations", "simplify"]


class PlainOperations(TorchFunctionMode):
    """While a segment is traced: attention as two products and a softmax, unpacking as one selection a part.

    ONNX Runtime and OpenVINO know these patterns and fuse them: the scale and the transposed keys go into the product.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            plain = _attention(*args, **kwargs)
            return func(*args, **kwargs) if plain is None else plain
        if func in (torch.unbind, Tensor.unbind):
            return _unbind(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``F.scaled_dot_product_attention``; None for the kinds that are left to torch's exporter."""
    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return None
    heads_and_queries = query.shape[1:3]
    if query.dim() == 4 and all(isinstance(size, int) for size in heads_and_queries) and len({*heads_and_queries}) == 1:
        return _attention_in_three_dimensions(query, key, value, attn_mask, scale)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _attention_in_three_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Attention of (B, H, L, D) with batch and heads as one dimension: for as many heads as queries.

    OpenVINO (2026.4.1) takes the changes of dimensions around attention into its kernel, (B, L, H, D) to (B, H, L, D),
    and where L = H confuses the two: what it answers then is wrong at every fixed batch size. Around three dimensions
    it leaves them alone.
    """
    batch, heads, queries, width = query.shape
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = attn_mask.expand(batch, heads, queries, key.shape[2]).flatten(0, 1)
    attended = _attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask, scale=scale)
    return None if attended is None else attended.view(batch, heads, queries, value.shape[3])


def _unbind(x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return tuple(x.select(dim, index) for index in range(x.shape[dim]))


def simplify(program: Any) -> Any:
    """Write shapes down and fold constants in a torch.onnx program, in place; return it.

    The folding is onnxscript's, without its rewriting of operations, which got attention with random features wrong.
    """
    require("onnxscript")
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = program.model.graph
    for node in list(graph):
        if node.op_type == "Reshape":
            _fix_shape(ir, graph, node)
    for node in list(graph):
        if node.op_type == "Reshape":
            _shorten(ir, node)
    optimizer.fold_constants(program.model)
    ir.passes.common.ShapeInferencePass()(program.model)  # the exporter notes types and shapes of the torch graph only
    for node in list(graph):
        if node.op_type in _MAY_DO_NOTHING:
            _leave_out(ir, graph, node)
    optimizer.remove_unused_nodes(program.model)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    return program


def _fix_shape(ir: Any, graph: Any, node: Any) -> None:
    """The shape a Reshape computes is a constant, with -1 for what depends on the batch."""
    shape = node.outputs[0].shape
    if shape is None or node.inputs[1].const_value is not None:
        return
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or 0 in sizes:  # not one number's to find; 0 would stand for the input's
        return
    name = f"{node.outputs[0].name}_shape"
    graph.initializers.add(
        fixed := ir.Value(
            name=name,
            shape=ir.Shape([len(sizes)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array(sizes, dtype=np.int64), name=name),
        )
    )
    node.replace_input_with(1, fixed)


def _shorten(ir: Any, node: Any) -> None:
    """Of changes of shape in a row that end in a Reshape, it is enough: they keep the order of the elements."""
    before, shape = node.inputs[0].producer(), ir.convenience.get_const_tensor(node.inputs[1])
    if shape is not None and 0 in shape.numpy():  # may stand for a size of the input
        return
    if before is not None and before.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        node.replace_input_with(0, before.inputs[0])


def _leave_out(ir: Any, graph: Any, node: Any) -> None:
    """A node that changes nothing: torch writes a Slice for each ``:`` before a dimension, a Cast for every index."""
    given, left = node.inputs[0], node.outputs[0]
    if left.is_graph_output() or not _MAY_DO_NOTHING[node.op_type](ir, node, given, left):
        return
    ir.convenience.replace_all_uses_with(left, given)
    graph.remove(node, safe=True)


def _keeps_order(ir: Any, node: Any, given: Any, left: Any) -> bool:
    axes = node.attributes.get("perm")  # without it they are turned round
    return axes is not None and list(axes.as_ints()) == sorted(axes.as_ints())


def _takes_everything(ir: Any, node: Any, given: Any, left: Any) -> bool:
    steps = None
    if len(node.inputs) > 4 and node.inputs[4] is not None:  # without steps they are ones
        steps = ir.convenience.get_const_tensor(node.inputs[4])
        if steps is None or (steps.numpy() < 0).any():  # may turn elements round
            return False
    return _same_shape(given.shape, left.shape)


_MAY_DO_NOTHING: dict[str, Callable[[Any, Any, Any, Any], bool]] = {
    "Cast": lambda ir, node, given, left: (
        given.dtype is not None and int(given.dtype) == node.attributes["to"].as_int()
    ),
    "Reshape": lambda ir, node, given, left: _same_shape(given.shape, left.shape),
    "Slice": _takes_everything,
    "Transpose": _keeps_order,
}


def _same_shape(one: Any, other: Any) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    # Sizes that have neither a number nor a name are equal to nothing.
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True))
