"""Clips as samples: an image network over the frames of a clip, whose answer at every exit is their consensus.

Frames meet in the batch inside a segment only. Between segments every leaf of the state is (B, T, ...), so that a clip
leaves as a whole and the clips that stay keep all their frames. Nothing else on this floor knows of clips.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from .protocol import METHODS, MultiExit, State, map_state

__all__ = ["FrameNetwork", "frames_of", "over_clips", "sample_size"]


Network = TypeVar("Network", bound=nn.Module)


def over_clips(model: Network, num_frames: int, keep_forward: bool = False) -> Network:
    """Let an image network take clips (B, ``num_frames``, C, H, W): change ``model`` in place and return it.

    At each exit the clip's logits are the mean of its frames' logits: the consensus of TSM, which Dyn-Perceiver
    follows (its appendix B). What an exit tells a later one stays each frame's own. A network without exits becomes a
    model of one exit, the mean of its answers.

    Parameters, buffers and their names stay as they are: an image checkpoint loads unchanged. As with
    ``torch.nn.utils.parametrize`` the module's class becomes a subclass of what it was. All it has besides the
    protocol and ``forward`` goes on taking frames, clip after clip in the batch.

    Args:
        model: a multi-exit module, or a classifier.
        num_frames: T.
        keep_forward: its own ``forward`` asks ``forward_exits`` for the answers, and stays.

    Raises:
        ValueError: ``num_frames`` is not a positive number, or the model takes clips already.
    """
    if not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be a positive number of frames, got {num_frames!r}.")
    if getattr(model, "sample_ndim", 3) != 3:
        frames = f" of {model.num_frames} frames" if isinstance(model, _Clips) else ""
        raise ValueError(f"{type(model).__name__} takes clips{frames} already.")
    made: Any = _clip_class(type(model), keep_forward)  # type: ignore[arg-type]  # classes are hashable
    model.__class__ = made
    assert isinstance(model, _Clips)
    model.num_frames = num_frames
    return model


def frames_of(clips: Tensor) -> Tensor:
    """Clips (B, T, ...) as a batch of frames (B*T, ...): a view where the memory allows it."""
    return clips.flatten(0, 1)


def _clips_of(frames: Tensor, num_frames: int) -> Tensor:
    """The other way: a batch of frames (B*T, ...) as clips (B, ``num_frames``, ...)."""
    clips: Tensor = frames.unflatten(0, (-1, num_frames))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return clips


def sample_size(model: nn.Module, image_size: Sequence[int]) -> tuple[int, ...]:
    """Shape of one of the model's samples, an image or a clip of images of ``image_size`` (C, H, W)."""
    return (model.num_frames, *image_size) if isinstance(model, _Clips) else tuple(image_size)


if TYPE_CHECKING:

    class _Network(MultiExit, nn.Module):
        """What the classes below are mixed into."""

else:
    _Network = object


class _Clips(_Network):
    """What the classes made here have in common."""

    num_frames: int
    sample_ndim = 4

    def _check(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != self.num_frames:
            raise ValueError(
                f"expected clips (batch, {self.num_frames}, channels, height, width), got shape {tuple(x.shape)}."
                + ("" if x.ndim != 5 else f" For other clips build the model with num_frames={x.shape[1]}.")
            )
        return x

    def _clips(self, state: State) -> State:
        return map_state(lambda leaf: _clips_of(leaf, self.num_frames), state)

    forward_exits = MultiExit.forward_exits

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: copies and pickles name the one it was made from.
        return _bare, (type(self).__bases__[1], not isinstance(self, _WithForward)), self.__dict__


class _ClipExits(_Clips):
    def begin_exits(self, x: Tensor) -> State:
        """State before the first segment, from clips (B, T, C, H, W)."""
        return self._clips(super().begin_exits(frames_of(self._check(x))))

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        """Consensus logits (B, num_classes) of exit ``index``, and the next state, every leaf (B, T, ...)."""
        logits, state = super().forward_exit(index, map_state(frames_of, state))
        return _clips_of(logits, self.num_frames).mean(1), self._clips(state)


class _WithForward(_ClipExits):
    """The classes whose image network's forward went another way than the protocol."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Clips (B, T, C, H, W) to the last exit's logits in evaluation, to the tuple of every exit's in training."""
        return MultiExit.forward(self, x)


class _ClipNetwork(_Clips):
    """The same for a network without exits."""

    num_exits = 1

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self._check(x),)

    def forward_exit(self, index: int, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[()]]:
        if index != 0:
            raise IndexError(f"this network has one exit, 0, got {index}.")
        logits: Any = super().forward(frames_of(state[0]))
        return _clips_of(logits, self.num_frames).mean(1), ()

    def forward(self, x: Tensor) -> Tensor:
        """Clips (B, T, C, H, W) to logits (B, num_classes), in either mode: what the host's trainer expects of it."""
        return self.forward_exit(0, self.begin_exits(x))[0]


class FrameNetwork(MultiExit, nn.Module):
    """The image network inside a clip model, for frames (B, C, H, W): its modules are the clip model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, _Clips):
            raise TypeError(f"{type(model).__name__} takes images; expected a model of clips, as over_clips makes it.")
        self.model = model
        self.num_exits = model.num_exits
        self.num_classes = getattr(model, "num_classes", 0)
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)
        self.train(model.training)

    def begin_exits(self, x: Tensor) -> State:
        if isinstance(self.model, _ClipNetwork):
            return (x,)
        return self._network.begin_exits(self.model, x)

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        if isinstance(self.model, _ClipNetwork):
            return self._network.forward(self.model, state[0]), ()
        answer: tuple[Tensor, State] = self._network.forward_exit(self.model, index, state)
        return answer

    @property
    def _network(self) -> Any:
        """The class of the image network, under the class made here."""
        return type(self.model).__bases__[1]


@cache
def _clip_class(cls: type[nn.Module], keep_forward: bool = False) -> type[nn.Module]:
    has_exits = all(hasattr(cls, name) for name in METHODS)
    mixin = (_ClipExits if keep_forward else _WithForward) if has_exits else _ClipNetwork
    return type(f"Clip{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _bare(cls: type[nn.Module], keep_forward: bool) -> nn.Module:
    """An instance of the clip class of ``cls`` without attributes yet."""
    made = _clip_class(cls, keep_forward)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)
