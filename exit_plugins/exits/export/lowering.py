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
    if query.dim() == 4 and isinstance(query.shape[1], int) and query.shape[1] == query.shape[2]:
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
            _shorten(ir, graph, node)
    optimizer.fold_constants(program.model)
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


def _shorten(ir: Any, graph: Any, node: Any) -> None:
    """Of Reshapes in a row the last is enough, and none that changes nothing."""
    before = node.inputs[0].producer()
    if before is not None and before.op_type == "Reshape":
        node.replace_input_with(0, before.inputs[0])
    given, changed = node.inputs[0], node.outputs[0]
    same = given.shape is not None and changed.shape is not None and list(given.shape) == list(changed.shape)
    if same and not changed.is_graph_output():
        ir.convenience.replace_all_uses_with(changed, given)
        graph.remove(node, safe=True)
