"""``DynConfig``: where early exits stand, what their heads are, and how they are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from .families import Family

__all__ = ["DynConfig"]


@dataclass
class DynConfig:
    """Early heads and training of Dyn-Adapter. The defaults are the paper's, for ViT-B of 12 blocks.

    Args:
        exit_interval: Blocks per exit, T; it divides the number of blocks. Left out: a quarter of them, and for
            hierarchical models one stage.
        num_classes: Classes of the task; what the backbone's classifier must have. Left out: what it has.
        token: What early heads read: ``"cls"``, the class token, or ``"mean"``, the mean of the patch tokens. Left out:
            the class token where there is one.
        head_widths: Hidden width of each early head from the front, 0 for a linear one; heads beyond are linear. Left
            out: the shallow half of the exits gets MLPs, from 96 wide down to 48 (section 3.2, "Head Balance").
        lambda_shallow, lambda_deep: First and last weight of the losses of the shallow and of the deep exits
            (section 3.2, "Adaptive Prioritization"). Equal ends switch the schedule off.
        dropout_shallow, dropout_deep: Dropout of adapters in the first half of the blocks and in the second (section
            3.3). None leaves the adapter's own.
        mask: ``"gradient"`` or ``"update"`` (eq. 8; see ``GradientMask``), or None for none.
        mask_share: Share p_m of the entries that a step leaves out.
        mask_scope: What is masked: ``"all"``, ``"adapters"`` or ``"heads"``.
        mask_seed: Seed of the masks.
        label_smoothing: Of the loss at every exit.
    """

    exit_interval: int | None = None
    num_classes: int | None = None
    token: str | None = None
    head_widths: Sequence[int] | None = None
    lambda_shallow: tuple[float, float] = (0.1, 0.5)
    lambda_deep: tuple[float, float] = (1.0, 0.5)
    dropout_shallow: float | None = 0.5
    dropout_deep: float | None = 0.1
    mask: str | None = "gradient"
    mask_share: float = 0.1
    mask_scope: str = "all"
    mask_seed: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.token not in (None, "cls", "mean"):
            raise ValueError(f"unknown token {self.token!r}; choose cls or mean, or leave it out.")
        if self.mask not in (None, "gradient", "update"):
            raise ValueError(f"unknown mask {self.mask!r}; choose gradient or update, or None for no mask.")
        if self.mask_scope not in ("all", "adapters", "heads"):
            raise ValueError(f"unknown mask_scope {self.mask_scope!r}; choose all, adapters or heads.")
        for name in ("dropout_shallow", "dropout_deep", "mask_share", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {value}.")
        for name in ("lambda_shallow", "lambda_deep"):
            pair = tuple(float(value) for value in getattr(self, name))
            if len(pair) != 2 or min(pair) < 0:
                raise ValueError(f"{name} is a pair of weights that are not negative, first and last; got {pair}.")
            setattr(self, name, pair)
        if self.head_widths is not None:
            self.head_widths = tuple(int(width) for width in self.head_widths)
            if any(width < 0 for width in self.head_widths):
                raise ValueError(f"head_widths are hidden widths, or 0 for a linear head; got {self.head_widths}.")

    def exit_after(self, family: Family, units: int) -> tuple[int, ...]:
        """How many of the backbone's ``units`` have run at each exit."""
        interval = self.exit_interval or family.interval or max(units // 4, 1)
        if interval < 1 or units % interval or units == interval:
            fitting = [d for d in range(1, units) if units % d == 0]
            raise ValueError(
                f"exit_interval={interval} does not cut {units} {family.unit}s of {family.name} into two or more equal "
                f"parts; choose one of {fitting}."
            )
        return tuple(range(interval, units + 1, interval))

    def hidden_widths(self, num_exits: int) -> list[int]:
        """Hidden width of each of the ``num_exits - 1`` early heads, 0 for linear ones."""
        early, widths = num_exits - 1, self.head_widths
        if widths is None:
            heavy = num_exits // 2
            widths = [round(96 - 48 * index / max(heavy - 1, 1)) for index in range(min(heavy, early))]
        if len(widths) > early:
            raise ValueError(f"{len(widths)} head_widths were given for {early} early heads.")
        return [*widths, *[0] * (early - len(widths))]
