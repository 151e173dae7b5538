"""Cut a timm network into segments: traced once, and run on the network's own modules, which are called by name.

The trace opens only the modules that contain a cut; every other module is called whole, whatever wraps it by then. A
segment passes on what the network's own forward still reads behind the cut: the values that depend on the images, batch
first. Everything else (positions, sizes, the number of samples) is computed again where it is read, so that samples may
leave at any cut.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import get_model_input_config
from torch import Tensor, nn

from ._analysis import CannotCut, Cut, analyse, feature_info, map_layout, pool_features
from ._segments import Segment, make_segment
from ._trace import CONTAINERS, is_layer, traceable_copy

__all__ = [
    "Cut",
    "Split",
    "find_cuts",
    "is_layer",
    "map_layout",
    "traceable_copy",
    "place_cuts",
    "pool_features",
]


def find_cuts(
    model: nn.Module, input_size: Sequence[int] | None = None, also: Sequence[str] = (), at_least: int = 0
) -> list[Cut]:
    """Where a network can be cut with nothing else passing on than what one of its stages or blocks returned.

    These are the modules that timm's ``feature_info`` names, and behind the first of them the blocks of the model:
    modules that are no layers and stand in the model itself, in a container, or in a stage. Where several end at the
    same place (a stage and its last block), the one that ``feature_info`` names stands for it, else the outermost.

    Args:
        model: A timm classification model.
        input_size: (channels, height, width); the default is the model's own.
        also: Names of modules to cut behind in any case.
        at_least: How many cuts are needed.

    Returns:
        The cuts, shallow to deep.

    Raises:
        ValueError: The network cannot be traced, or has fewer cuts than that; the message says why.
    """
    return _find_cuts(model, input_size, also, at_least)[0]


def place_cuts(model: nn.Module, count: int, input_size: Sequence[int] | None = None) -> list[Cut]:
    """The ``count`` of ``find_cuts`` whose segments share the MACs most evenly (least sum of squares).

    Raises:
        ValueError: The network has fewer, or cannot be traced.
    """
    cuts, total = _find_cuts(model, input_size, (), count)
    macs = {-1: 0.0} | {index: cut.macs for index, cut in enumerate(cuts)}
    # With the last of the cuts chosen so far at a key: the least sum of squares, and which were chosen.
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for chosen in range(count):
        best = {
            index: min(
                (cost + (macs[index] - macs[before]) ** 2, (*path, index))
                for before, (cost, path) in best.items()
                if before < index
            )
            for index in range(chosen, len(cuts))
        }
    _, path = min((cost + (total - macs[last]) ** 2, path) for last, (cost, path) in best.items())
    return [cuts[index] for index in path]


def _find_cuts(
    model: nn.Module, input_size: Sequence[int] | None, also: Sequence[str], at_least: int
) -> tuple[list[Cut], float]:
    """The cuts, and the MACs of the whole network; ValueError if they are fewer than ``at_least``, and why."""
    shadow = traceable_copy(model).eval()
    input_size = input_size or get_model_input_config(model)["input_size"]
    analysis = analyse(shadow, input_size, lambda name, module: not is_layer(module))
    stages = [info["module"] for info in feature_info(shadow) if "module" in info]
    modules = dict(shadow.named_modules())

    def is_block(name: str) -> bool:
        parent = owner = name.rpartition(".")[0]
        while owner and isinstance(modules[owner], CONTAINERS):
            owner = owner.rpartition(".")[0]
        if is_layer(modules[name]) or ("." in owner and owner not in stages):
            return False
        # What stands in a stage beside its list of blocks is no block.
        listed = any(isinstance(child, CONTAINERS) for child in modules[owner].children())
        return not owner or owner != parent or not listed

    def rank(name: str) -> tuple[bool, bool, int]:
        return name not in also, name not in stages, name.count(".")

    found: dict[int, Cut] = {}
    failures = dict(analysis.failures)
    for name in sorted((name for name in analysis.calls if name), key=rank):
        if not (name in also or name in stages or is_block(name)):
            continue
        try:
            border = analysis.border(name)
            if border.end not in found and (border.narrow or name in also or name in stages):
                found[border.end] = analysis.cut(name)
        except CannotCut as error:
            if name in also:
                raise
            if name in stages:
                failures.setdefault(name, error)
    total = analysis.total_macs
    first = min((end for end, cut in found.items() if cut.name in stages), default=0)
    cuts = [cut for end, cut in sorted(found.items()) if cut.name in also or (end >= first and cut.macs < total)]
    if at_least > len(cuts):
        reasons = "".join(f" At {name}: {error}." for name, error in list(failures.items())[:1])
        raise ValueError(
            f"{type(model).__name__} has {len(cuts)} place{'' if len(cuts) == 1 else 's'} for early exits "
            f"({', '.join(cut.name for cut in cuts) or 'none'}), and {at_least} were asked for.{reasons}"
        )
    return cuts, total


class Split:
    """A network as a chain of segments. It holds no weights: every call is given the network, and uses its modules.

    Segment i ends behind the module of cut i; the last one, behind the last cut, gives what the network returns. The
    network may be changed in between: modules wrapped (adapters), replaced or fused, as long as the names of those that
    contain a cut stay. What holds for the whole network (class count, pooling) asks for a new split.

    Args:
        model: A timm classification model.
        names: The modules to cut behind, in the order they run.
        input_size: (channels, height, width) of the images shapes are checked with; the default is the model's own.
            Other sizes work wherever they work in the network.
        method: What of the network to run: its ``forward``, or ``forward_features``.

    Attributes:
        cuts: One ``Cut`` for each name.
        total_macs: Of one image through the whole network.
        output_shapes: Shape of each tensor the network returns, without the batch.
        alone: Whether one tensor alone passes each cut.
        feature_index: For each cut, which tensor of the state is what the cut's module returned; None if it is not
            read again, or not one tensor.

    Raises:
        ValueError: A name is unknown, or the network cannot be cut there; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        input_size: Sequence[int] | None = None,
        method: str = "forward",
    ) -> None:
        shadow = traceable_copy(model)
        input_size = tuple(input_size or get_model_input_config(model)["input_size"])
        _check_names(shadow, names)
        opened = {".".join(parts[:count]) for parts in (n.split(".") for n in names) for count in range(len(parts))}
        self._segments: dict[bool, list[Segment]] = {}
        for training in (True, False):
            shadow.train(training)
            try:
                analysis = analyse(shadow, input_size, lambda name, _: name in opened, opened.__contains__, method)
            except ValueError:
                # What the network itself does with a module's answer can ask for a look into that module.
                analysis = analyse(
                    shadow, input_size, lambda _, module: not is_layer(module), opened.__contains__, method
                )
            try:
                borders = [analysis.border(name) for name in names]
            except CannotCut as error:
                raise ValueError(f"{type(model).__name__} cannot be cut there: {error}.") from None
            if any(a.end >= b.end for a, b in zip(borders, borders[1:], strict=False)):
                ran = [b.name for b in sorted(borders, key=lambda b: b.end)]
                raise ValueError(f"give the modules in the order they run: {', '.join(ran)}.")
            self._segments[training] = [
                make_segment(analysis, before, after)
                for before, after in zip((None, *borders), (*borders, None), strict=True)
            ]
        self.cuts = tuple(analysis.cut(name) for name in names)
        self.total_macs = analysis.total_macs
        result = analysis.tensors(list(analysis.graph.nodes)[-1].args[0])
        self.output_shapes = tuple(tuple(t.shape[1:]) for t in result)
        self.feature_index = tuple(border.feature for border in borders)
        self.alone = all(len(b.carried) == 1 and not b.outlined and not b.sizes for b in borders)

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def run(self, net: nn.Module, index: int, state: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run segment ``index`` of ``net``, in the mode it is in.

        Args:
            net: The network this was made from, or a copy of it.
            index: Segment, from 0.
            state: What the segment before returned; before the first, ``(images,)``.

        Returns:
            What the cut's module returned, as a tuple of tensors (behind the last cut: what the network returns), and
            the state: tensors with the samples first, for the next segment.
        """
        return self._segments[net.training][index](net, state)


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown:
        first = unknown[0].partition(".")[0]
        near = [n for n in modules if n.startswith(first) and n.count(".") <= 2] or list(dict(model.named_children()))
        raise ValueError(
            f"{type(model).__name__} has no module {unknown[0]!r}; it has {', '.join(near[:20])}"
            f"{', ...' if len(near) > 20 else ''}."
        )
    double = {name for name in names if list(names).count(name) > 1}
    if double:
        raise ValueError(f"{', '.join(sorted(double))} given more than once.")
