"""``DynConfig``: where early exits stand, what their heads are, and how they are trained."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from .family import Family

__all__ = ["DynConfig"]


def _optional(kind: type) -> Callable[[str], Any]:
    """Reader of an option of this kind that may be none."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it where a value cannot be read
    return read


@dataclass
class DynConfig:
    """Early heads and training of Dyn-Adapter.

    The defaults are for ViT-B of 12 blocks. Stated by the paper (section 4.1): an exit every 3 blocks, the dropouts 0.5
    and 0.1, a mask over 0.1 of the gradient, and 0.5 as the weight that shallow and deep exits meet at. Our reading,
    where it gives a principle and no figure: the weights they start from and their linear course, the widths of the
    early heads, that these read the class token, and that the mask covers heads as well as adapters.

    Args:
        exit_interval: Blocks per exit, T; it divides the number of blocks. Left out: a quarter of them (the largest
            divisor that is no more), and for hierarchical models one stage.
        num_classes: Classes of the task; what the backbone's classifier must have. Left out: what it has.
        token: What early heads read: ``"cls"``, the class token, or ``"mean"``, the mean of the patch tokens. Left out:
            the class token where there is one.
        head_widths: Hidden width of each early head from the front, 0 for a linear one; heads beyond are linear. Left
            out: the shallow half of the exits gets MLPs, from 96 wide down to 48 (section 3.2, "Head Balance").
        last_head_width: Hidden width of the last exit's head, in place of the backbone's own linear classifier; 0 keeps
            that one (section 3.2; table 5b puts heavier heads at shallow exits, at deep ones, at both). A plain
            ``PeftModel`` reads such an adapter no longer.
        lambda_shallow, lambda_deep: First and last weight of the losses of the shallow and of the deep exits
            (section 3.2, "Adaptive Prioritization"). Equal ends switch the schedule off.
        dropout_shallow, dropout_deep: Dropout of adapters in the first half of the blocks and in the second (section
            3.3). None leaves the adapter's own.
        mask: ``"gradient"`` or ``"update"`` (eq. 8; see ``GradientMask``), or None for none.
        mask_share: Share p_m of the entries that a step leaves out.
        mask_scope: What is masked: ``"all"``, ``"adapters"`` or ``"heads"``.
        mask_seed: Seed of the masks.
        label_smoothing: Of the loss at every exit.
        num_frames: Samples are clips of so many frames, which the backbone sees as images; each exit answers with the
            mean of its frames' logits. Left out: samples are what the backbone takes.
    """

    exit_interval: int | None = None
    num_classes: int | None = None
    token: str | None = None
    head_widths: Sequence[int] | None = None
    last_head_width: int = 0
    lambda_shallow: tuple[float, float] = (0.1, 0.5)
    lambda_deep: tuple[float, float] = (1.0, 0.5)
    dropout_shallow: float | None = 0.5
    dropout_deep: float | None = 0.1
    mask: str | None = "gradient"
    mask_share: float = 0.1
    mask_scope: str = "all"
    mask_seed: int = 0
    label_smoothing: float = 0.0
    num_frames: int | None = None

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

        if self.last_head_width < 0:
            raise ValueError(f"last_head_width is a hidden width, or 0 for a linear head; got {self.last_head_width}.")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser, without: Sequence[str] = ()) -> None:
        """Give a command line one option per field, ``--exit-interval`` and so on; ``none`` stands for None."""
        group = parser.add_argument_group("exits and their training, see DynConfig")
        for name, kind in get_type_hints(cls).items():
            if name in without:
                continue
            default = getattr(cls, name)
            several = {"nargs": "*"} if name == "head_widths" else {"nargs": 2} if isinstance(default, tuple) else {}
            elements: dict[str, type] = {"head_widths": int, "lambda_shallow": float, "lambda_deep": float}
            element = elements.get(name) or next(t for t in (int, float, str) if t in (kind, *get_args(kind)))
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=f"dyn_{name}",
                type=_optional(element),
                default=default,
                metavar=element.__name__.upper(),
                help=f"default: {shown}",
                **several,
            )

    @classmethod
    def from_arguments(cls, arguments: Namespace, **settings: Any) -> "DynConfig":
        """The configuration that options made by ``add_arguments`` ask for; ``settings`` go before them."""
        prefix = "dyn_"
        given = {k.removeprefix(prefix): v for k, v in vars(arguments).items() if k.startswith(prefix)}
        return cls(**given | settings)

    def exit_after(self, family: Family, units: int) -> tuple[int, ...]:
        """How many of the backbone's ``units`` have run at each exit.

        ValueError if ``exit_interval`` does not divide them into two or more parts.
        """
        usual = family.interval or max(d for d in range(1, max(units // 4, 1) + 1) if units % d == 0)
        interval = self.exit_interval or usual
        if interval < 1 or units % interval or units == interval:
            fitting = [d for d in range(1, units) if units % d == 0]
            raise ValueError(
                f"exit_interval={interval} does not cut {units} {family.unit}s of {family.name} into two or more equal "
                f"parts; choose one of {fitting}."
            )
        return tuple(range(interval, units + 1, interval))

    def hidden_widths(self, num_exits: int) -> list[int]:
        """Hidden width of each of the ``num_exits - 1`` early heads, 0 for linear ones.

        ValueError if more were given than there are heads.
        """
        early, widths = num_exits - 1, self.head_widths
        if widths is None:
            heavy = num_exits // 2
            widths = [round(96 - 48 * index / max(heavy - 1, 1)) for index in range(min(heavy, early))]
        if len(widths) > early:
            raise ValueError(f"{len(widths)} head_widths were given for {early} early heads.")
        return [*widths, *[0] * (early - len(widths))]
