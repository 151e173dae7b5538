"""The one idea all else is written against: a multi-exit model is a chain of segments, segment i ends in exit i."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "COMPILED",
    "MEMBERS",
    "METHODS",
    "AnyModel",
    "MultiExit",
    "MultiExitModule",
    "State",
    "batch_size",
    "check_input_size",
    "check_multi_exit",
    "evaluating",
    "exit_device",
    "forward_exits",
    "in_precision_of",
    "is_multi_exit",
    "map_state",
    "sample_dimensions",
    "select_samples",
    "unwrapped",
]

State: TypeAlias = Any  # a pytree of tensors, batch first in every leaf

# What makes a module a multi-exit model, whatever its class.
METHODS = ("begin_exits", "forward_exit")
MEMBERS = ("num_exits", *METHODS)

COMPILED = "_orig_mod"  # where torch.compile keeps the module it was given


class _Segments(Protocol):
    """The members of the protocol alone."""

    num_exits: int

    def begin_exits(self, x: Tensor, /) -> State: ...

    def forward_exit(self, index: int, state: State, /) -> tuple[Tensor, State]: ...


class MultiExitModule(_Segments, Protocol):
    """The type of a multi-exit model: the three members of the protocol, and what every ``nn.Module`` has.

    A type checker takes every ``nn.Module`` that mixes in ``MultiExit`` for one, and any other that defines the three.
    ``check_multi_exit`` and ``is_multi_exit`` tell at run time.
    """

    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> "Self": ...

    def train(self, mode: bool = True) -> "Self": ...

    def to(self, *args: Any, **kwargs: Any) -> "Self": ...

    def cpu(self) -> "Self": ...

    def requires_grad_(self, requires_grad: bool = True) -> "Self": ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self) -> Mapping[str, Any]: ...


# What the toolkit's doors take, and check: hosts' factories promise no more than an nn.Module.
AnyModel: TypeAlias = nn.Module | MultiExitModule


class MultiExit:
    """Mixin of an ``nn.Module`` whose computation can stop at several exits.

    A model says what it is in three members; the rest follows:

    * ``num_exits``: how many exits there are, K.
    * ``begin_exits(x)``: images (B, C, H, W), or samples of another shape, to the state the first segment starts from.
    * ``forward_exit(index, state)``: runs only what lies between exit ``index - 1`` and exit ``index`` (0-based) and
      returns that exit's logits (B, num_classes) and the state the next segment starts from.

    The state is a pytree (tuples, lists, dicts) of tensors with the batch first in every leaf, so that samples can
    leave at any exit and the others go on: ``forward_exit(i + 1, select_samples(state, index))`` is always valid.
    It carries exactly what later segments read.

    In training ``forward`` returns the tuple of every exit's logits, in evaluation the last exit's logits.

    ``exit_loss``, where an architecture sets it, names the preset of ``MultiExitLoss`` that its paper trains it with.
    """

    num_exits: int
    exit_loss = ""
    training: bool  # of the nn.Module that this is mixed into
    sample_ndim: int = 3  # dimensions of one sample: an image's (C, H, W), unless the model says otherwise

    def begin_exits(self, x: Tensor) -> State:
        raise NotImplementedError(f"{type(self).__name__} must define begin_exits(x) -> state")

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        raise NotImplementedError(f"{type(self).__name__} must define forward_exit(index, state) -> (logits, state)")

    def forward_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, num_classes) of every exit, shallow to deep, in either mode."""
        return forward_exits(self, x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.forward_exits(x)
        return outputs if self.training else outputs[-1]


def forward_exits(model: _Segments, x: Tensor) -> tuple[Tensor, ...]:
    """Logits (B, num_classes) of every exit of ``model``, shallow to deep: one segment after the other."""
    state = model.begin_exits(x)
    outputs = []
    for index in range(model.num_exits):
        logits, state = model.forward_exit(index, state)
        outputs.append(logits)
    return tuple(outputs)


def is_multi_exit(model: object) -> TypeGuard[MultiExitModule]:
    """Whether ``model`` has the members of the protocol, whatever its class."""
    return all(hasattr(model, name) for name in MEMBERS)


def check_multi_exit(model: object) -> MultiExitModule:
    """Return ``model`` if it follows the protocol, whatever its class; TypeError naming what is missing if not.

    Of what torch.compile made of a model it is the model inside: segments run uncompiled in either, and only inside are
    its names, its class and its arguments its own.
    """
    if is_multi_exit(model):
        model = unwrapped(model)
    kind = type(model).__name__
    if is_multi_exit(model):
        if int(model.num_exits) >= 1:
            return model
        raise TypeError(f"{kind}.num_exits is {model.num_exits}; a multi-exit model has at least one.")
    missing = ", ".join(name for name in MEMBERS if not hasattr(model, name))
    raise TypeError(
        f"{kind} is not a multi-exit model: it has no {missing}. Expected a module that follows exit_plugins.MultiExit "
        "(num_exits, begin_exits(x), forward_exit(index, state)); if it is wrapped (DataParallel, DDP, EMA), pass the "
        "module inside."
    )


def unwrapped(model: Any) -> Any:
    """The module inside what torch.compile, DataParallel and DistributedDataParallel make of it; any other itself."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
            continue
        # By name: torch imports the class of compiled modules, which takes it seconds, at the first compilation only.
        inner = next((child for name, child in model.named_children() if name == COMPILED), None)
        if inner is None:
            break
        model = inner
    return model


def sample_dimensions(model: AnyModel) -> tuple[str, ...]:
    """Names of the dimensions of one of the model's samples, an image or a clip."""
    ndim = int(getattr(model, "sample_ndim", MultiExit.sample_ndim))
    names = ("frames", "channels", "height", "width")[-ndim:]
    return names if len(names) == ndim else tuple(f"dimension {i + 1}" for i in range(ndim))


def check_input_size(model: AnyModel, input_size: Sequence[int]) -> None:
    """ValueError unless ``input_size`` can be the shape of one of the model's samples."""
    dimensions = sample_dimensions(model)
    if len(input_size) != len(dimensions) or min(input_size) < 1:
        raise ValueError(f"input_size is ({', '.join(dimensions)}), positive numbers, got {tuple(input_size)}.")


@contextlib.contextmanager
def evaluating(model: AnyModel) -> Iterator[None]:
    """``model`` in evaluation mode while this is open; then every module in it is in the mode it was in before.

    One flag for all would set frozen norms, which whoever trains keeps in evaluation, to training.
    """
    modes = [(module, module.training) for module in model.modules()]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            model.train()  # and what a model does beside when its mode changes
        for module, mode in modes:
            module.training = mode


def in_precision_of(model: AnyModel, images: Tensor) -> Tensor:
    """``images`` (B, ...) in the precision of the weights; ValueError unless they are floating point numbers."""
    if not images.is_floating_point():
        raise ValueError(f"expected images normalised to floating point numbers, got {images.dtype}.")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if weight is None else images.to(weight.dtype)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """``state`` with ``function`` applied to every tensor in it. Leaves are (B, ...)."""
    return pytree.tree_map_only(Tensor, function, state)


def select_samples(state: State, index: Tensor) -> State:
    """The state of the samples in ``index`` (int64, 1-d): one gather per leaf, in the leaf's own memory layout."""

    def gather(leaf: Tensor) -> Tensor:
        if leaf.stride(0) == 0:  # an expanded tensor: every sample has the same row
            return leaf[:1].expand(len(index), *leaf.shape[1:])
        # index_select answers in the default layout, which would silently undo channels_last at the first exit.
        order = [0, *sorted(range(1, leaf.ndim), key=leaf.stride, reverse=True)]
        back = sorted(range(leaf.ndim), key=order.__getitem__)
        return leaf.permute(order).index_select(0, index).permute(back)

    return map_state(gather, state)


def batch_size(state: State) -> int:
    """Number of samples in ``state``; ValueError if its leaves disagree or there is none."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1:
        raise ValueError(f"every leaf of a state has the batch first; found leading sizes {sorted(sizes) or 'none'}.")
    return sizes.pop()


def exit_device(model: AnyModel) -> torch.device:
    """Device of the model's first parameter or buffer (CPU if it has neither)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
