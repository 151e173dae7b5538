"""What the tests of MSDNet and CHASE share: which features a layer reads, seen while it runs and as the papers say."""

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

Source = tuple[int, int]  # new features of (layer, scale); layer 0 is the stem


class Reads(NamedTuple):
    """For each (layer, scale): the sources its function h reads, and those f reads (None where there is no f)."""

    h: dict[Source, frozenset]
    f: dict[Source, frozenset | None]
    heads: list[frozenset]


def random_config(seed: int) -> dict:
    """Arguments of a small network."""
    draw = random.Random(seed)
    scales = draw.choice([2, 3, 4])
    return dict(
        blocks=draw.choice([2, 3, 4]),
        base=draw.choice([1, 2, 3]),
        step=draw.choice([1, 2]),
        step_mode=draw.choice(["even", "lin_grow"]),
        width=8,
        growth=4,
        growth_factors=tuple(draw.choice([1, 2, 4]) for _ in range(scales)),
        reduction=draw.choice([0.5, 0.7, 0]),
    )


def layer_counts(config: dict) -> list[int]:
    """Layers in front of each exit."""
    counts = [config["base"]]
    for i in range(1, config["blocks"]):
        counts.append(counts[-1] + (config["step"] if config["step_mode"] == "even" else config["step"] * i + 1))
    return counts


def stated_reads(config: dict, new_finer: bool) -> Reads:
    """The papers' connectivity, written out, with everything no exit depends on left away.

    Args:
        new_finer: f reads the finer scale's features of layers 0..l (CHASE, eq. 1 and table I), not 0..l-1 (MSDNet).
    """
    scales, exits = len(config["growth_factors"]), layer_counts(config)
    interval = -(-exits[-1] // scales)

    def kept(layer: int) -> range:
        return range((layer - 1) // interval, scales) if layer else range(scales)

    def features(scale: int, last: int) -> frozenset:
        return frozenset((i, scale) for i in range(last + 1) if scale in kept(i))

    h, f = {}, {}
    for layer in range(1, exits[-1] + 1):
        for scale in kept(layer):
            h[layer, scale] = features(scale, layer - 1)
            finer = scale - 1
            if new_finer:
                f[layer, scale] = features(finer, layer) if finer in kept(layer) else None
            else:
                f[layer, scale] = features(finer, layer - 1) if finer in kept(layer - 1) else None
    heads = [features(scales - 1, last) for last in exits]
    wanted = set().union(*heads)
    while True:
        more = set().union(*(h[s] | (f[s] or set()) for s in wanted if s in h)) - wanted
        if not more:
            break
        wanted |= more
    return Reads({s: v for s, v in h.items() if s in wanted}, {s: v for s, v in f.items() if s in wanted}, heads)


class Watcher:
    """Replaces every function of a network by one that writes its name into its output and notes what it reads.

    Each output channel holds a number that stands for a set of sources; a transition's channels stand for all that it
    read, for it mixes them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sets: list[frozenset] = [frozenset()]
        self.reads = Reads({}, {}, [])
        scales = len(model.growth_factors)
        parts = [model.stem.finest, *model.stem.coarser]
        for scale in range(scales):
            if scale < len(parts):
                parts[scale] = _Spy(self, parts[scale], None, (0, scale))
        model.stem.finest, model.stem.coarser = parts[0], nn.ModuleList(parts[1:])
        for index, layer in enumerate(model.layers, start=1):
            if not hasattr(layer, "scales"):
                continue
            for key, part in layer.scales.items():
                source = (index, int(key))
                part.normal = _Spy(self, part.normal, self.reads.h, source)
                self.reads.f[source] = None
                if part.down is not None:
                    part.down = _Spy(self, part.down, self.reads.f, source)
                if not isinstance(part.transition, nn.Identity):
                    part.transition = _Spy(self, part.transition, None, None)
        for head in model.heads:
            head.convs.register_forward_pre_hook(lambda _, args: self.reads.heads.append(self.sources(args[0])))

    def sources(self, x: Tensor) -> frozenset:
        return frozenset().union(*(self.sets[int(number)] for number in x[0, :, 0, 0].unique()))

    def number(self, sources: frozenset) -> int:
        self.sets.append(sources)
        return len(self.sets) - 1


class _Spy(nn.Module):
    def __init__(self, watcher: Watcher, module: nn.Module, notes: dict | None, source: Source | None) -> None:
        super().__init__()
        self.module = module
        self.watcher, self.notes, self.source = [watcher], notes, source

    def forward(self, x: Tensor) -> Tensor:
        watcher = self.watcher[0]
        stem = self.source is not None and self.source[0] == 0
        read = frozenset() if stem else watcher.sources(x)
        if self.notes is not None:
            self.notes[self.source] = read
        # The real module says how wide and how large its output is.
        number = watcher.number(frozenset([self.source]) if self.source else read)
        return torch.full_like(self.module(x), number)


def watched_reads(model: nn.Module, size: int) -> Reads:
    """What the network's functions and exits read, seen while it runs."""
    watcher = Watcher(model.eval())
    with torch.no_grad():
        model.forward_exits(torch.zeros(1, model.in_chans, size, size))
    return watcher.reads
