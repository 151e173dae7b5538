"""Which layer of a multi-scale dense network reads, computes and returns what: planned as data, before any is built.

As in MSDNet (Huang et al., ICLR 2018), whose scales are dropped with depth; ``trim_plan`` cuts the layers down to what
exits and feature taps read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["LayerPlan", "plan_layers", "trim_plan"]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer reads, computes and passes on, by scale (0 is the finest).

    Attributes:
        reads: scales of the maps it is given, ascending.
        computes: scales it computes new features at.
        returns: those of them that later layers or an exit read.
        fuses: scales whose new features also come from the next finer scale.
        in_width, out_width: base channel counts before the layer and after its transition, if it has one; the map at
            scale s has the base count times the growth factor of s.
        transition: whether a 1x1 convolution reduces every returned map.
    """

    reads: tuple[int, ...]
    computes: tuple[int, ...]
    returns: tuple[int, ...]
    fuses: tuple[int, ...]
    in_width: int
    out_width: int
    transition: bool = False


def plan_layers(
    num_layers: int,
    num_scales: int,
    width: int,
    growth: int,
    prune: str = "max",
    reduction: float = 0.5,
    drops_between: bool = False,
) -> list[LayerPlan]:
    """The layers of a multi-scale dense network as its paper has them.

    Args:
        num_layers: N, all layers of the network.
        num_scales: S.
        width: base channel count of the stem.
        growth: base channel count each layer adds.
        prune: ``max`` drops a scale every ceil(N / S) layers and reduces the width there. ``min`` keeps a scale for as
            long as the last exit can still read it and reduces the width after one and two thirds of the layers.
        reduction: factor of the width at a transition; 0 for no transitions.
        drops_between: where ``max`` drops a scale. MSDNet does it inside a layer, which still reads the scale it drops,
            and reduces the width behind that layer. CHASE does it between two layers: the width is reduced behind the
            last layer that has the scale, and the next one no longer reads it.
    """
    plans = []
    for layer in range(1, num_layers + 1):
        if prune == "max":
            interval = math.ceil(num_layers / num_scales)
            scales_in = num_scales - max(0, layer - 2) // interval
            scales_out = num_scales - (layer - 1) // interval
            drops_next = layer % interval == 0 and layer < num_layers
            transition = drops_next if drops_between else scales_in > scales_out
        elif prune == "min":
            scales_in = min(num_scales, num_layers - layer + 2)
            scales_out = min(num_scales, num_layers - layer + 1)
            transition = layer in (num_layers // 3, 2 * num_layers // 3)
        else:
            raise ValueError(f"prune must be 'max' or 'min', got {prune!r}.")
        first_in, first_out = num_scales - scales_in, num_scales - scales_out
        reads = tuple(range(first_out if drops_between else first_in, num_scales))
        kept = tuple(range(first_out, num_scales))
        transition = transition and reduction > 0
        out_width = width + growth
        if transition:
            out_width = math.floor(reduction * out_width)
            if out_width < 1:
                raise ValueError(f"reduction={reduction} leaves no channel of {width + growth}; take a larger one.")
        plans.append(LayerPlan(reads, kept, kept, tuple(s for s in kept if s > reads[0]), width, out_width, transition))
        width = out_width
    return plans


def trim_plan(
    plans: Sequence[LayerPlan], wanted: Sequence[set[int]], fuses_new: bool
) -> tuple[list[LayerPlan], tuple[int, ...]]:
    """Cut the layers down to what is read, so that no map and no parameter is there for nothing.

    Args:
        plans: the layers in order.
        wanted: for each layer, the scales that are read behind it by something that is not a layer (an exit, a tap).
        fuses_new: whether a fusing scale reads the finer scale's new features (CHASE) or its input (MSDNet).

    Returns:
        The trimmed layers, and the scales that the first of them reads.
    """
    trimmed: list[LayerPlan] = []
    needed: set[int] = set()
    for plan, extra in zip(reversed(plans), reversed(wanted), strict=True):
        returns = needed | extra
        computes: set[int] = set(returns)
        reads: set[int] = set()
        for scale in sorted(plan.fuses, reverse=True):  # coarse to fine: one need leads to the next finer one
            if scale in computes:
                (computes if fuses_new else reads).add(scale - 1)
        needed = reads | computes
        trimmed.append(
            replace(
                plan,
                reads=tuple(sorted(needed)),
                computes=tuple(sorted(computes)),
                returns=tuple(sorted(returns)),
                fuses=tuple(s for s in plan.fuses if s in computes),
            )
        )
    return trimmed[::-1], tuple(sorted(needed))
