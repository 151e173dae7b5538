"""What Dyn-Adapter changes during training: weights of the exits, dropout by depth, and the masked gradient."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._host import is_tuner_layer

__all__ = ["GradientMask", "exit_weights", "match_modes", "set_dropout"]

# What PEFT calls dropout and is none of features: it drops blocks of the matrices that the weight is multiplied by.
# Where its rate is 0 there stands an identity, as in every other method, so that only the name tells.
_OF_WEIGHTS = ("boft_dropout", "oft_dropout")


def exit_weights(
    num_exits: int, progress: float, shallow: tuple[float, float] = (0.1, 0.5), deep: tuple[float, float] = (1.0, 0.5)
) -> list[float]:
    """Weights lambda of the exits' losses (Dyn-Adapter eq. 5), at ``progress`` in [0, 1].

    The exits' shallow half (the smaller one of an odd number) goes linearly from ``shallow[0]`` to ``shallow[1]``, the
    deep half from ``deep[0]`` to ``deep[1]``. Equal ends make constant weights. The paper says that the deep weights
    fall and the shallow ones rise until they meet at 0.5; where they start, and that the way is linear, is our reading.

    ValueError for a progress outside of [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is the share of training done, in [0, 1]; got {progress}.")
    low, high = (start + (end - start) * progress for start, end in (shallow, deep))
    return [low if index < num_exits // 2 else high for index in range(num_exits)]


def match_modes(model: nn.Module, training: bool) -> None:
    """Put what PEFT has added to the layers of ``model`` in the mode of the model around them.

    New modules start in training mode, those of some methods in the mode of the layer they stand at; a backbone may be
    in evaluation mode beneath a model in training, as transformers' ``from_pretrained`` gives it.
    """
    for layer in model.modules():
        if is_tuner_layer(layer):
            layer.training = training
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(training)


def set_dropout(
    model: nn.Module, adapter_name: str, units: Sequence[str], shallow: float | None, deep: float | None
) -> int:
    """Set the dropout of an adapter in the first half of ``units`` and in the second (Dyn-Adapter, section 3.3).

    Works on every PEFT method that drops features and keeps that dropout in a dictionary by adapter name. A rate of
    None leaves the method's own, and so is what drops parts of weights left, as in OFT and BOFT. Returns how many
    layers were set; warns if there were none to set.
    """
    count, wanted, depth = 0, shallow is not None or deep is not None, -1
    for name, layer in model.named_modules():
        if name in units:
            depth = units.index(name)
        if not is_tuner_layer(layer):
            continue
        # What stands between two units runs with the later one.
        within = depth >= 0 and (name == units[depth] or name.startswith(f"{units[depth]}."))
        rate = shallow if (depth if within else depth + 1) < len(units) // 2 else deep
        for child_name, child in layer.named_children():
            if not (child_name.endswith("dropout") and isinstance(child, nn.ModuleDict) and adapter_name in child):
                continue
            if child_name in _OF_WEIGHTS or not isinstance(child[adapter_name], nn.Dropout | nn.Identity):
                continue
            count += 1
            if rate is not None:
                # PEFT puts an identity where the rate is 0; a new dropout layer starts in training mode.
                child[adapter_name] = nn.Dropout(rate).train(layer.training)
    if wanted and not count:
        warnings.warn(
            "no layer of this PEFT method has dropout of features to set: dropout_shallow and dropout_deep have no "
            "effect. Set both to None to say that this is meant.",
            stacklevel=3,
        )
    return count


class GradientMask:
    """Leaves a random share of the entries out of every optimiser step (Dyn-Adapter eq. 8).

    Args:
        parameters: what is masked.
        share: probability p_m with which an entry is left out, drawn anew for each step.
        mode: ``"gradient"`` sets the left-out entries of the gradient to zero, without rescaling the others; an
            optimiser with momentum or weight decay may still move them. ``"update"`` lets no left-out entry move,
            whatever the optimiser.
        seed: of the draws. They depend on the seed and the number of the step alone, and so agree in all processes of
            distributed training and after resuming (set ``step``).

    ``attach(optimizer)`` makes it act from within ``optimizer.step()``: once for each real step, also under gradient
    accumulation and gradient scaling, in any loop. Of ``step(closure)`` it masks what every call of the closure leaves,
    by one draw.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], share: float = 0.1, mode: str = "gradient", seed: int = 0
    ) -> None:
        if not 0.0 <= share < 1.0:
            raise ValueError(f"the masked share must lie in [0, 1), got {share}.")
        if mode not in ("gradient", "update"):
            raise ValueError(f"unknown mask mode {mode!r}; choose gradient or update.")
        self.parameters = list(parameters)
        self.share, self.mode, self.seed = share, mode, seed
        self.step = 0
        self._handles: list = []
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def attach(self, optimizer: Any) -> "GradientMask":
        """Act on every step of ``optimizer``, torch's; wrappers around it (accelerate's) are seen through.

        ValueError if the optimizer has none of the parameters.
        """
        while not hasattr(optimizer, "register_step_pre_hook") or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self.parameters and not any(id(p) in known for p in self.parameters):
            raise ValueError(
                "the optimiser has none of the masked parameters; make it from the dynamic model's parameters, after "
                "get_dyn_peft_model and after moving the model to its device."
            )
        self.detach()
        self._handles = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        return self

    def detach(self) -> None:
        """Act no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def draw(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Boolean masks of this step, True where an entry may move; one draw over all parameters of a device."""
        masks: dict[int, Tensor] = {}
        for device in {p.device for p in parameters}:
            mine = [index for index, p in enumerate(parameters) if p.device == device]
            generator = torch.Generator(device=device).manual_seed(self.seed * 1_000_003 + self.step)
            sizes = [parameters[index].numel() for index in mine]
            keep = torch.rand(sum(sizes), generator=generator, device=device) >= self.share
            for index, mask in zip(mine, keep.split(sizes), strict=True):
                masks[index] = mask.view(parameters[index].shape)
        return [masks[index] for index in range(len(parameters))]

    def _before(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Mask the gradients that are there, or have the step's closure mask those it makes."""
        self._held.clear()  # of a step that failed
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._mask()
            return None

        def masked_closure() -> Any:
            result = closure()
            self._mask()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": masked_closure}
        return (args[0], masked_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _mask(self) -> None:
        parameters = [p for p in self.parameters if p.grad is not None]
        # Some optimisers call their closure several times a step; what is held is what stood before the first.
        if self.share and parameters and not self._held:
            for p, mask in zip(parameters, self.draw(parameters), strict=True):
                if self.mode == "update":
                    self._held.append((p, mask, p.detach().clone()))
                elif p.grad is not None:
                    p.grad.mul_(mask)

    @torch.no_grad()
    def _after(self) -> None:
        for p, mask, before in self._held:
            p.copy_(torch.where(mask, p, before))
        self._held.clear()
        self.step += 1
