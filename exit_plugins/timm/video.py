"""Temporal shift: image networks that read clips, by moving channels from frame to frame.

Papers: "TSM: Temporal Shift Module for Efficient Video Understanding" (Lin et al., ICCV 2019), and "Dynamic Perceiver
for Efficient Visual Recognition" (Han et al., ICCV 2023), which puts its network in the place of TSM's (figure 10) and
shifts its latents as well (appendix B). The shift has no weights: checkpoints of the image network load unchanged.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import model_entrypoint, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..exits.adaptive import AdaptiveModel, ExitOutput
from ..exits.clips import FrameNetwork, over_clips
from ..exits.policy import ExitPolicy
from ..exits.protocol import State
from . import dynperceiver
from ._host import TimmModel
from ._switches import check_switches
from .dynperceiver import DynPerceiver
from .kernels import Network

__all__ = ["FrameStream", "TemporalShift", "shift_frames", "shifts_of", "temporal_shift"]


def temporal_shift(
    model: Network,
    num_frames: int = 8,
    latent: bool = True,
    features: bool = True,
    *,
    online: bool = False,
    fold_div: int = 8,
) -> Network:
    """Let an image network read clips (B, ``num_frames``, C, H, W): change ``model`` in place and return it.

    In every residual block of the convolutional network, before the first convolution of the residual branch, a part
    of the channels comes from the frame before and as large a part from the frame after; the identity path keeps its
    own frame (TSM's residual shift). In a Dyn-Perceiver the channels of the latents are shifted too, on entering the
    attention branch of every self-attention block. The paper says only that there is a shift "in self-attention
    blocks"; that it stands behind the norm, and that the residual path is left alone, is our reading, after the
    feature branch. At each exit the frames' logits are averaged (``exits.clips.over_clips``).

    State dict, parameter groups and everything else of the model stay as they are. Shift first, ``fuse()`` afterwards.

    Args:
        model: a Dyn-Perceiver, a timm CNN, or one that was given exits. A network without exits becomes a model with
            one.
        num_frames: T, frames in a clip.
        latent: shift the latents of a Dyn-Perceiver; without effect on networks that have none.
        features: shift the feature maps. With neither, clips are classified by the mean over their frames.
        online: take channels from the frame before only, so that no frame waits for a later one (TSM's online mode;
            ``FrameStream`` runs it frame by frame).
        fold_div: one channel in so many is taken from each of the neighbours; 8 in the paper.

    Raises:
        ValueError: no residual blocks are found to shift, the model takes clips already or is fused, or a number is
            not positive.
    """
    check_switches(temporal_shift, {"latent": latent, "features": features, "online": online})
    if not isinstance(fold_div, int) or fold_div < 2:
        raise ValueError(f"fold_div is at least 2, so that both neighbours have channels; got {fold_div!r}.")
    if getattr(model, "fused", False):
        raise ValueError("this model is fused for inference; shift a model before fuse().")
    entrances = list(_residual_entrances(model)) if features else []
    attentions = list(_latent_attentions(model)) if latent else []
    if features and not entrances:
        raise ValueError(
            f"found no residual blocks with convolutions in {type(model).__name__}: temporal shift is for residual "
            "CNNs. With features=False its clips are classified by the mean over their frames."
        )
    over_clips(model, num_frames)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and not str(config.get("architecture")).startswith("tsm_"):
        config["architecture"] = f"tsm_{config.get('architecture')}"  # policies of the image network are not its own
    for modules, dim in ((entrances, 1), (attentions, 2)):
        for module in modules:
            module.register_forward_pre_hook(TemporalShift(num_frames, dim, online, fold_div))
    return model


def _residual_entrances(model: nn.Module) -> Iterator[nn.Conv2d]:
    """The first convolution of the residual branch of every residual block, in order.

    timm's residual blocks have a ``drop_path``; ``has_skip`` or ``use_shortcut`` says of the inverted ones whether they
    add their input. Convolutions are registered in the order they run; a block's shortcut is named as one.
    """
    for block in model.modules():
        if not (type(block).__module__.startswith("timm.") and hasattr(block, "drop_path")):
            continue
        if not getattr(block, "has_skip", getattr(block, "use_shortcut", True)):
            continue
        for name, module in block.named_modules():
            if isinstance(module, nn.Conv2d) and name.partition(".")[0] not in ("downsample", "shortcut"):
                yield module
                break


def _latent_attentions(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, DynPerceiver):
        for block in model.stages.modules():
            if isinstance(block, Block):
                yield block.attn


def shift_frames(x: Tensor, num_frames: int, dim: int = 1, online: bool = False, fold_div: int = 8) -> Tensor:
    """Frames (B*T, ...) with 1/``fold_div`` of the channels in ``dim`` from the frame before, as many from the next.

    Beyond the ends of a clip they are zero. ``online``: only those from the frame before.
    """
    if dim == 1 and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        # The concatenation below would answer in the default layout.
        return shift_frames(x.permute(0, 2, 3, 1), num_frames, 3, online, fold_div).permute(0, 3, 1, 2)
    fold = x.shape[dim] // fold_div
    clips = x.unflatten(0, (-1, num_frames))
    forward, backward, rest = clips.split([fold, fold, x.shape[dim] - 2 * fold], dim + 1)
    edge = torch.zeros_like(forward[:, :1])
    forward = torch.cat((edge, forward[:, :-1]), 1)
    if not online:
        backward = torch.cat((backward[:, 1:], edge), 1)
    return torch.cat((forward, backward, rest), dim + 1).flatten(0, 1)


class TemporalShift:
    """``shift_frames`` as a forward pre-hook: what a module is given is shifted on entering it.

    A hook, since a module in the way would rename the parameters behind it. Within ``FrameStream`` it is given one
    frame at a time, and the channels that come from the frame before are kept in ``memory``.
    """

    def __init__(self, num_frames: int, dim: int, online: bool = False, fold_div: int = 8) -> None:
        self.num_frames, self.dim, self.online, self.fold_div = num_frames, dim, online, fold_div
        self.memory: dict[str, Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        if self.memory is not None:
            return (self._after_the_last(x, self.memory), *others)
        return (shift_frames(x, self.num_frames, self.dim, self.online, self.fold_div), *others)

    def _after_the_last(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """One frame (1, ...) behind the frame that came here last, or the first of its clip."""
        fold = x.shape[self.dim] // self.fold_div
        own = x.narrow(self.dim, 0, fold)
        before = memory.get("before")
        # A copy: what lies around the channels need not be kept, and may be written to.
        memory["before"] = own.clone()
        x = x.clone()
        x.narrow(self.dim, 0, fold).copy_(torch.zeros_like(own) if before is None else before)
        return x


def shifts_of(model: nn.Module) -> list[TemporalShift]:
    """The temporal shifts in a model, in the order of its modules."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, TemporalShift)]


class FrameStream:
    """Runs a clip model on a stream, frame by frame: each leaves as soon as its exit is sure enough of the clip so far.

    What a frame takes from the one before is kept where it is shifted, 1/8 of the channels there, so that a frame costs
    what a frame costs in a clip. At an exit the logits are the mean over the last ``window`` frames that came as far.
    Where no frame leaves early that is the clip's own consensus, and after ``num_frames`` frames of a clip every exit
    says what the model says of the clip.

    Where frames leave early, the layers behind their exits have not seen them: a later frame that goes on finds there
    the channels of the last frame that came as far.

    Args:
        model: made by ``temporal_shift(..., online=True)``, or registered and built with ``online=True``; it is put in
            evaluation mode. While a stream runs a frame, nothing else may run the model; copy it for other threads.
        policy: thresholds for it.
        window: frames in the mean, 1 for each frame's own logits; by default the model's ``num_frames``.

    ``stream(frame)`` takes a frame (C, H, W) or (1, C, H, W) and returns an ExitOutput of one sample; ``reset()``
    starts another clip. A frame that is refused, or on which the model fails, leaves the stream as it was.

    Raises:
        TypeError: the model takes no clips.
        ValueError: its shift looks at the next frame, or the policy is for another model; of a frame, that it is not
            one, or of another shape than the frames before it.
    """

    def __init__(self, model: nn.Module, policy: ExitPolicy, window: int | None = None) -> None:
        self.frames = _StreamedNetwork(model, window)
        self.shifts = shifts_of(model)
        if not all(shift.online for shift in self.shifts):
            raise ValueError(
                "this model's shift takes channels from the next frame too, which a stream does not have yet; build "
                "(and train) it with online=True."
            )
        self.adaptive = AdaptiveModel(self.frames, policy, fuse=False)
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far."""
        self.frames.reset()
        self.shape: torch.Size | None = None
        self.memories: list[dict[str, Tensor]] = [{} for _ in self.shifts]

    def __call__(self, frame: Tensor) -> ExitOutput:
        frame = frame[None] if frame.ndim == 3 else frame
        if frame.ndim != 4 or len(frame) != 1:
            raise ValueError(f"a stream takes one frame (1, C, H, W) at a time, got shape {tuple(frame.shape)}.")
        if self.shape is not None and frame.shape != self.shape:
            raise ValueError(
                f"got a frame of shape {tuple(frame.shape[1:])} after frames of {tuple(self.shape[1:])}; resize it, or "
                "call reset() where another clip begins."
            )
        # The frame's own copies: what it leaves behind counts only once it has got through.
        memories, said = [dict(memory) for memory in self.memories], self.frames.said
        self.frames.said = [deque(logits, self.frames.window) for logits in said]
        try:
            for shift, memory in zip(self.shifts, memories, strict=True):
                shift.memory = memory
            output = self.adaptive(frame)
        except BaseException:
            self.frames.said = said
            raise
        finally:
            for shift in self.shifts:
                shift.memory = None
        self.memories, self.shape = memories, frame.shape
        return output


class _StreamedNetwork(FrameNetwork):
    """The image network of a clip model, answering with the mean over the frames so far."""

    def __init__(self, model: TimmModel, window: int | None) -> None:
        super().__init__(model)
        self.window: int = model.num_frames if window is None else window
        if self.window < 1:
            raise ValueError(f"window must be a positive number of frames, got {self.window}.")
        self.reset()

    def reset(self) -> None:
        self.said: list[deque[Tensor]] = [deque(maxlen=self.window) for _ in range(self.num_exits)]

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        logits, state = super().forward_exit(index, state)
        self.said[index].append(logits)
        return torch.stack(tuple(self.said[index])).mean(0), state


# Every Dyn-Perceiver, on clips, with its own weights of images. The paper's are those on ResNet.


def _register(image_name: str) -> None:
    build = model_entrypoint(image_name)
    name = f"tsm_{image_name}"

    def create(
        pretrained: bool = False,
        num_frames: int = 8,
        latent: bool = True,
        features: bool = True,
        online: bool = False,
        fold_div: int = 8,
        **kwargs: Any,
    ) -> DynPerceiver:
        if kwargs.get("features_only"):
            raise ValueError(f"{name} classifies clips; for feature maps of frames build {image_name}.")
        image_model = build(pretrained, **kwargs)
        return temporal_shift(image_model, num_frames, latent, features, online=online, fold_div=fold_div)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"``{image_name}`` on clips: see ``temporal_shift`` for num_frames, latent, features and online."
    globals()[name] = register_model(create)


default_cfgs = {f"tsm_{name}": cfg for name, cfg in dynperceiver.default_cfgs.items()}
for _name in dynperceiver.default_cfgs:
    _register(_name)
