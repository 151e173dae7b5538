"""The exits' heads over a backbone: early ones by adapter, and a wider last one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ._host import AuxiliaryTrainingWrapper

__all__ = ["EarlyHead", "ExitHeads", "WideClassifier", "widen_classifiers"]


class EarlyHead(nn.Module):
    """LayerNorm and a linear classifier, or an MLP of one hidden layer (GELU) if ``hidden`` is not 0.

    Input (B, width), output (B, num_classes), in the head's own precision.
    """

    def __init__(self, width: int, num_classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mlp(self.norm(x.to(self.norm.weight.dtype))))


class WideClassifier(nn.Linear):
    """A backbone's linear classifier with one hidden layer (GELU) in front (Dyn-Adapter, table 5b).

    Input (..., width), output (..., num_classes). It is a linear layer of the hidden width, as hosts expect to find one
    where the number of classes and the precision are read and set.
    """

    def __init__(self, width: int, num_classes: int, hidden: int) -> None:
        super().__init__(hidden, num_classes)
        inner = nn.Linear(width, hidden)
        self.mlp = nn.Sequential(inner, nn.GELU())
        for layer in (inner, self):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.mlp(x))


def widen_classifiers(model: nn.Module, names: Sequence[str], hidden: int) -> None:
    """Put a ``WideClassifier`` in the place of each of the linear classifiers; ``hidden`` 0 leaves them.

    Raises:
        ValueError: they have been widened before, to another width.
    """
    for name in names:
        old = model.get_submodule(name)
        old = next(iter(old.modules_to_save.values())) if isinstance(old, AuxiliaryTrainingWrapper) else old
        there = old.in_features if isinstance(old, WideClassifier) else 0
        if there == hidden:
            continue
        if there or not isinstance(old, nn.Linear) or isinstance(model.get_submodule(name), AuxiliaryTrainingWrapper):
            raise ValueError(
                f"last_head_width={hidden} was asked for, and the backbone's {name} is made and trained with {there}; "
                "all adapters of one backbone share the last head's shape."
            )
        wide = WideClassifier(old.in_features, old.out_features, hidden)
        model.set_submodule(name, wide.to(old.weight.device, old.weight.dtype).train(old.training))


class ExitHeads(nn.ModuleDict, AuxiliaryTrainingWrapper):  # type: ignore[misc]  # PEFT's update is never called here
    """Early heads by adapter name, (K - 1) of them each.

    PEFT asks modules of this kind what of them belongs to an adapter, so that ``peft.get_peft_model_state_dict`` and
    ``set_peft_model_state_dict`` carry the early heads, under ``exit_heads.``, as they carry ``modules_to_save``.
    """

    __getattr__ = nn.Module.__getattr__  # the wrapper's looks for a wrapped module, of which there is none

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._apart = False

    def adapter_state_dict(  # type: ignore[override]  # PEFT gives the state dict, which its base class forgets
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of the state dict of this module, the entries of the adapter, without its name. Tensors keep their shapes."""
        prefix = f"{adapter_name}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Of every entry of the adapter, its name in a file and its name in this module."""
        if self._apart or adapter_name not in self:
            return {}
        return {key: f"{adapter_name}.{key}" for key in self[adapter_name].state_dict()}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the block PEFT loads an adapter whose early heads stand in a file of their own."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False
