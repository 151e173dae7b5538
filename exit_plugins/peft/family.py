"""What a family of backbones is: how models that somebody else wrote are cut into a chain of blocks or stages.

A new family is one subclass of ``Family`` with the four steps of its forward, registered by ``register_family``.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..timm.kernels import use_faster_products
from ._host import AuxiliaryTrainingWrapper, HostModel

__all__ = ["FAMILIES", "Family", "names_of", "register_family"]


class Family(ABC):
    """How the models of one family are cut into a chain of units (blocks, or stages), each of which may end in an exit.

    Every method is given the model, adapters included, and calls its modules, so that whatever wraps them is in effect.
    The state between units is a pytree of tensors with the batch first.

    Attributes:
        name: what the family is called in messages.
        sample_ndim: dimensions of a sample, 3 for images (C, H, W) and 4 for clips (T, C, H, W).
        unit: ``"block"`` or ``"stage"``.
        interval: units per exit where nothing is said; None for a quarter of the units.
    """

    name: str
    sample_ndim = 3
    unit = "block"
    interval: int | None = None

    @abstractmethod
    def accepts(self, model: HostModel) -> bool:
        """Whether this family's forward is the model's."""

    def prepare(self, model: HostModel) -> None:  # noqa: B027  most families have nothing to do
        """Change what would keep adapters from being called, without changing what the model computes."""

    @abstractmethod
    def units(self, model: HostModel) -> list[str]:
        """Names of the units in the order they run."""

    def widths(self, model: HostModel) -> list[int]:
        """Number of features behind each unit."""
        return [model.num_features] * len(self.units(model))

    def has_class_token(self, model: HostModel) -> bool:
        """Whether ``features`` can be asked for the class token."""
        return False

    @abstractmethod
    def classifiers(self, model: HostModel) -> list[str]:
        """Names of the linear layers that give the last exit's logits."""

    @abstractmethod
    def begin(self, model: HostModel, x: Tensor) -> Any:
        """Images (B, C, H, W) to the state the first unit reads."""

    @abstractmethod
    def run(self, model: HostModel, index: int, state: Any) -> tuple[Any, Any]:
        """What unit ``index`` returned, and the state that the next unit reads."""

    @abstractmethod
    def features(self, model: HostModel, index: int, output: Any, token: str) -> Tensor:
        """What an early head reads of what unit ``index`` returned, (B, width).

        ``token`` is ``"cls"``, the class token, or ``"mean"``, the mean over positions.
        """

    @abstractmethod
    def finish(self, model: HostModel, state: Any) -> Tensor:
        """The last exit's logits (B, C), by the backbone's own norm and head."""

    def fuse(self, model: HostModel) -> "Family":
        """Put the form for inference of a model without adapters in place; return the family that runs it."""
        use_faster_products(model)
        return self


FAMILIES: list[Family] = []


def register_family(family: type[Family]) -> type[Family]:
    """Class decorator: make a family known to ``get_dyn_peft_model``. Families registered later are asked first."""
    FAMILIES.insert(0, family())
    return family


def names_of(model: HostModel, module: nn.Module) -> list[str]:
    """Names under which ``module`` stands in ``model``, without PEFT's wrappers around it."""
    wrapped = [w for w in model.modules() if isinstance(w, AuxiliaryTrainingWrapper) and module in set(w.modules())]
    wanted = wrapped[0] if wrapped else module
    return [name for name, found in model.named_modules() if found is wanted]
