"""Compiled segments: torch.compile once for every batch size, and CUDA graphs per segment and batch bucket."""

import contextlib
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .protocol import AnyModel, MultiExit, State, batch_size, check_multi_exit, map_state

__all__ = ["CompiledSegments"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # batch sizes a CUDA graph is captured at

# Threads that compile one segment at the same time use up torch's recompile limit, and run uncompiled from then on.
_COMPILING = threading.RLock()


def _own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """``function`` with a code object of its own.

    torch.compile keeps its compiled versions, and counts them against its recompile limit, per code object. Segments
    that shared one would use the limit up for each other.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class CompiledSegments(MultiExit, nn.Module):
    """A multi-exit model with every segment compiled, itself a multi-exit model.

    A segment is compiled at its first single sample and at its first larger batch, and those two serve every batch
    size; where a kernel's choice depends on the batch (some CPU convolutions do), torch adds one for the other range.
    The state before the first segment is the images, so that ``begin_exits`` is compiled with it.

    On a CUDA device each compiled segment is also captured as a CUDA graph for each of the batch sizes ``BUCKETS``
    that it meets; smaller batches run in the next larger one. What a segment returns there is valid until the same
    segment runs again.
    """

    def __init__(self, model: AnyModel) -> None:
        super().__init__()
        self.model = check_multi_exit(model)
        self.num_exits = self.model.num_exits
        self.num_classes = getattr(model, "num_classes", 0)
        self.sample_ndim = getattr(model, "sample_ndim", self.sample_ndim)
        self._begin()
        self.eval()

    def _begin(self) -> None:
        """Nothing is compiled yet."""
        self._segments = [self._compile(index) for index in range(self.num_exits)]
        self._compiled: set[tuple[int, bool]] = set()  # segments, and whether of a single sample
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled is bound to this model's weights: copies, and what is read from a file, compile their own.
        compiled = ("_segments", "_compiled", "_graphs")
        return {name: value for name, value in self.__dict__.items() if name not in compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._begin()

    def train(self, mode: bool = True) -> "CompiledSegments":
        if mode:
            raise RuntimeError("compiled segments only run inference; train the model they were compiled from.")
        return super().train(False)

    def _compile(self, index: int) -> Callable[[State], tuple[Tensor, State]]:
        model = self.model

        def segment(state: State) -> tuple[Tensor, State]:
            return model.forward_exit(index, model.begin_exits(state) if index == 0 else state)

        return torch.compile(_own_code(segment, f"segment_{index}"))

    def begin_exits(self, x: Tensor) -> Tensor:
        # Under inference_mode images made outside it are of another kind than what gathers and segments return. Where
        # later segments read the images again they would be compiled for both.
        return x if x.is_inference() == torch.is_inference_mode_enabled() else x.clone()

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        rows = batch_size(state)
        leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        if leaves[0].is_cuda and rows <= BUCKETS[-1]:
            return self._replay(index, state, leaves, rows)
        return self._run(index, state)

    def _run(self, index: int, state: State) -> tuple[Tensor, State]:
        def mark(leaf: Tensor) -> Tensor:
            leaf = _plain(leaf)
            if leaf.shape[0] > 1:
                leaf = leaf[:]  # other threads may be at the same tensor, whose mark guards are compared with
                torch._dynamo.maybe_mark_dynamic(leaf, 0)
            return leaf

        kind = (index, batch_size(state) == 1)
        with contextlib.nullcontext() if kind in self._compiled else _COMPILING:
            answer = self._segments[index](map_state(mark, state))
        self._compiled.add(kind)
        return answer

    def _replay(self, index: int, state: State, leaves: list[Tensor], rows: int) -> tuple[Tensor, State]:
        bucket = next(size for size in BUCKETS if size >= rows)
        key = (index, bucket, *((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves))
        if key not in self._graphs:
            self._graphs[key] = _Graph(lambda padded: self._run(index, padded), state, bucket)
        return self._graphs[key](state, rows)


def _plain(leaf: Tensor) -> Tensor:
    """A leaf whose layout does not depend on how many samples there are, or torch would compile for each."""
    if leaf.shape[0] == 1:  # the stride between samples is that of the batch it was taken from
        return leaf[0].unsqueeze(0)
    return leaf.contiguous() if leaf.stride(0) == 0 else leaf


class _Graph:
    """One segment captured at one batch size: copies a state in, replays, and returns the first rows of the answer.

    Rows beyond the batch hold whatever was there before; samples do not influence each other.
    """

    def __init__(self, segment: Callable[[State], tuple[Tensor, State]], state: State, bucket: int) -> None:
        def pad(leaf: Tensor) -> Tensor:
            return torch.cat((leaf, leaf[:1].expand(bucket - len(leaf), *leaf.shape[1:])))

        self.inputs = map_state(pad, state)
        # Compilation, cuDNN's choice of kernels and lazy initialisation must lie behind before a capture.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                segment(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = segment(self.inputs)

    def __call__(self, state: State, rows: int) -> tuple[Tensor, State]:
        for mine, given in zip(pytree.tree_leaves(self.inputs), pytree.tree_leaves(state), strict=True):
            mine[:rows].copy_(given)
        self.graph.replay()
        logits, state = self.outputs
        return logits[:rows], map_state(lambda leaf: leaf[:rows], state)
