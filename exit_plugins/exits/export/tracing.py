"""From torch to ONNX, without bookkeeping of shapes: any module, and every segment with a free batch."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..protocol import MultiExitModule, State
from .lowering import PlainOperations, simplify
from .runtimes import leaf_names, require

__all__ = ["onnx_program", "onnx_segments"]

_OPSET = 20
_MANY = 2**31 - 1  # torch 2.6 exports an unfold, as DVT cuts images by, for a batch that has an end alone


class _Segment(nn.Module):
    """One segment as a function from the leaves of its state to logits and the leaves of the next one."""

    def __init__(self, model: MultiExitModule, index: int, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model, self.index, self.spec = model, index, spec

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        state = pytree.tree_unflatten(leaves, self.spec)
        if self.index == 0:
            state = self.model.begin_exits(state)
        logits, state = self.model.forward_exit(self.index, state)
        outputs = [logits]
        if self.index < self.model.num_exits - 1:
            outputs += pytree.tree_leaves(state)
        # What is handed on unchanged or twice must be a value of its own: one name in the file cannot stand for two.
        taken = [id(leaf) for leaf in leaves]
        for position, output in enumerate(outputs):
            if id(output) in taken:
                outputs[position] = output.clone()
            taken.append(id(output))
        return tuple(outputs)


@torch.no_grad()
def onnx_program(
    module: nn.Module,
    args: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Any = None,
) -> Any:
    """Any module as a torch.onnx program in the operations that exports are written in; ``.save(path)`` writes it.

    Args:
        module: in evaluation mode.
        args: what it is traced on.
        input_names, output_names: a name for each tensor of ``args``, and for each it answers with.
        dynamic_shapes: as of ``torch.export.export``; None: all shapes are those of ``args``.
    """
    require("onnx")
    require("onnxscript")
    return _written(_traced(module, args, dynamic_shapes), input_names, output_names)


def _traced(module: nn.Module, args: tuple[Tensor, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    # oneDNN's choice of kernels would bind the batch to a range; the exported graph has no such kernels.
    with _quietly(), torch.backends.mkldnn.flags(enabled=False), PlainOperations():
        return torch.export.export(module, args, dynamic_shapes=dynamic_shapes)


def _written(program: torch.export.ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> Any:
    with _quietly(), torch.backends.mkldnn.flags(enabled=False):
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
            optimize=False,
        )
        return simplify(written)


@torch.no_grad()
def onnx_segments(model: MultiExitModule, images: Tensor) -> Iterable[Any]:
    """Each segment as a torch.onnx program, with inputs leaf_0... and outputs logits, next_0... and a free batch.

    Leaves are (B, ...), logits (B, num_classes). ValueError for a segment that has the batch size built in.
    """
    require("onnx")
    require("onnxscript")
    state: State = images[:3]
    for index in range(model.num_exits):
        flat, spec = pytree.tree_flatten(state)
        leaves = tuple(leaf.clone(memory_format=torch.contiguous_format) for leaf in flat)
        segment = _Segment(model, index, spec).eval()
        dynamic = (tuple({0: torch.export.Dim("batch", max=_MANY)} for _ in leaves),)
        try:
            program = _traced(segment, leaves, dynamic)
        except Exception as error:
            raise ValueError(
                f"segment {index} of {type(model).__name__} cannot be exported with a free batch size: "
                f"{str(error).splitlines()[0]} (write x.shape[0] rather than len(x), and no branches on values)."
            ) from error
        outputs = segment(*leaves)
        yield _written(program, leaf_names(len(leaves)), ["logits", *(f"next_{i}" for i in range(len(outputs) - 1))])
        if index < model.num_exits - 1:
            state = model.begin_exits(state) if index == 0 else state
            _, state = model.forward_exit(index, state)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks on their own progress."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
