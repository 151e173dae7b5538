"""timm's networks as chains of blocks or stages, cut by the timm wing's splitter, and their layers to adapt."""

import copy
from collections import defaultdict
from collections.abc import Iterable

import torch
from peft import PeftConfig
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..exits import MultiExit
from ..timm._networks import fuse_network
from ..timm.split import Split, find_cuts, is_layer, pool_features, traceable_copy
from ._host import HostModel, is_tuner_layer, method_of
from .family import Family, names_of

__all__ = ["TimmFamily", "fill_targets", "input_size", "is_timm", "timm_classifiers", "uncalled_adapters"]

# Last parts of the names that timm gives to the layers adapters are usually put on.
_ATTENTION = {"qkv", "q", "k", "v", "kv", "qk", "q_proj", "k_proj", "v_proj", "query", "key", "value"}
_MLP_IN, _MLP_OUT = {"fc1"}, {"fc2"}


def is_timm(model: HostModel) -> bool:
    """Whether ``model`` answers what timm's classification models answer."""
    return all(hasattr(model, name) for name in ("feature_info", "forward_features", "get_classifier", "num_features"))


def timm_classifiers(model: HostModel) -> list[str]:
    """Names of the layers that give a timm model's logits."""
    found = model.get_classifier()
    found = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return [part for module in found for name in names_of(model, module) for part in _parts(model, name)]


def _parts(model: HostModel, name: str) -> list[str]:
    """``name``, or the parts of that module where one of them is called as it is (``head`` and ``head.head``).

    PEFT goes by the ends of names, and would train both the whole and a copy of the part that nothing calls.
    """
    module = model.get_submodule(name)
    if not any(f"{name}.{inner}".endswith(name) for inner, _ in module.named_modules() if inner):
        return [name]
    return [f"{name}.{child}" for child, part in module.named_children() if next(part.parameters(), None) is not None]


def input_size(model: HostModel) -> tuple[int, int, int]:
    """(channels, height, width) that a timm model is made for."""
    channels, *size = get_model_input_config(model)["input_size"]
    # A model that was made by its class, and not by name, says its size here alone.
    return (channels, *(getattr(getattr(model, "patch_embed", None), "img_size", None) or size))


class TimmFamily(Family):
    """One timm network, cut behind its stages, or behind its blocks where it is the same width all the way.

    Stages and blocks are those that timm's ``feature_info`` names. The cuts are found in a trace without weights; what
    runs are the network's own modules, by name, whatever wraps them by then.

    Args:
        model: The network, without adapters, or what wraps it.
        place: Name of the network in ``model``; empty if it is the network.

    Raises:
        ValueError: The network cannot be traced, or has fewer than two places for exits.
    """

    def __init__(self, model: HostModel, place: str = "") -> None:
        self.place = f"{place}." if place else ""
        net = self.net(model)
        if isinstance(net, MultiExit):
            raise ValueError(f"{type(net).__name__} has exits of its own; adapt the network it is built over.")
        self.prepare(model)
        self.input_size = input_size(net)
        cuts = find_cuts(net, self.input_size, at_least=2)
        info = {entry["module"]: entry for entry in _feature_info(net) if "module" in entry}
        stages = [c for c in cuts if c.name in info and not _is_stem(c.name, net.get_submodule(c.name))]
        if len(stages) < 2:
            stages, info = cuts, {}
        names = [cut.name for cut in stages]
        even = len({entry.get("reduction") for name, entry in info.items() if name in names}) <= 1
        self.unit, self.interval = ("block", None) if even else ("stage", 1)
        self.name = f"timm {type(net).__name__}"
        self.split = Split(net, names, self.input_size)
        parts = [name.split(".") for name in names]
        self._opened = {".".join(part[:count]) for part in parts for count in range(len(part))}

    def net(self, model: HostModel) -> HostModel:
        """timm's own network in ``model``."""
        return model.get_submodule(self.place[:-1])

    def accepts(self, model: HostModel) -> bool:
        return is_timm(model)

    def prepare(self, model: HostModel) -> None:
        # With a fused bias timm reads qkv.weight and never calls qkv, so that an adapter around it has no effect.
        for module in model.modules():
            if getattr(module, "qkv", None) is not None and getattr(module, "qkv_bias_separate", None) is False:
                module.qkv_bias_separate = True

    def units(self, model: HostModel) -> list[str]:
        return [self.place + cut.name for cut in self.split.cuts]

    def widths(self, model: HostModel) -> list[int]:
        return [cut.width for cut in self.split.cuts]

    def has_class_token(self, model: HostModel) -> bool:
        token = getattr(self.net(model), "cls_token", None)
        return token is not None and all(any(cut.prefix_tokens) for cut in self.split.cuts)

    def classifiers(self, model: HostModel) -> list[str]:
        return [self.place + name for name in timm_classifiers(self.net(model))]

    def begin(self, model: HostModel, x: Tensor) -> Tensor:
        return x

    def run(self, model, index, state):
        net, state = self.net(model), state if isinstance(state, tuple) else (state,)
        if self._checkpoints(net):
            output, state = checkpoint(self.split.run, net, index, state, use_reentrant=False)
        else:
            output, state = self.split.run(net, index, state)
        # Most networks pass one tensor on: it is the state. One value that is a tuple (PiT's map and token) is none.
        return output, state[0] if len(state) == 1 and isinstance(state[0], Tensor) else state

    def _checkpoints(self, net: HostModel) -> bool:
        """Whether timm was told to trade computation for memory in a module that the segments replace, in training."""
        told = any(getattr(net.get_submodule(name), "grad_checkpointing", False) for name in self._opened)
        return told and net.training and torch.is_grad_enabled()

    def features(self, model, index, output, token):
        return pool_features(output, self.split.cuts[index], token)

    def finish(self, model, state):
        return self.run(model, len(self.split.cuts), state)[0][0]

    def fuse(self, model):
        net, names = self.net(model), [cut.name for cut in self.split.cuts]
        fuse_network(net, names)
        fused = copy.copy(self)  # other models may be run by this one
        fused.split = Split(net, names, self.input_size)
        return fused


def _is_stem(name: str, module: nn.Module) -> bool:
    """Whether ``feature_info`` names what stands before the first stage: a layer, or what is called a stem."""
    return name.startswith("stem") or is_layer(module)


def _feature_info(model: HostModel) -> list[dict]:
    info = model.feature_info
    return [entry for entry in getattr(info, "info", info) or [] if isinstance(entry, dict)]


def fill_targets(config: PeftConfig, model: HostModel, family: TimmFamily) -> None:
    """Name the layers to adapt where ``config`` leaves ``target_modules`` out, and print which they are.

    In transformers, the inputs of attention; for RepAdapter those of MLPs as well; for Bottleneck the outputs of MLPs.
    Without attention, the inputs of MLPs. In convolutional networks, 1 x 1 convolutions between channels, or, for
    methods that can, all convolutions where there are none of these. Layer norms for LN tuning.

    Raises:
        ValueError: There is nothing of the kind.
    """
    if not hasattr(config, "target_modules") or config.target_modules is not None:
        return
    method = method_of(config)
    units = family.units(model)
    # Not every stage ends in a unit: EfficientNet's feature_info leaves some out, which the next segment runs.
    homes = tuple(f"{unit.rpartition('.')[0] or unit}." for unit in units)
    inside = {name: module for name, module in model.named_modules() if name.startswith(homes)}
    seen = inputs_of(model, family.input_size, inside)
    # Convolutions that see one position alone are squeeze-and-excitation's.
    inside = {n: m for n, m in inside.items() if n in seen and not (len(seen[n]) == 4 and seen[n][2:].numel() == 1)}
    chosen = _norms(inside) if method == "LN_TUNING" else _layers(inside, method)
    if not chosen:
        first = f"{units[0]}."
        there = [name.removeprefix(first) for name, m in inside.items() if name.startswith(first) and is_layer(m)]
        raise ValueError(
            f"{method} has no usual layers to adapt in a {type(model).__name__}: give target_modules. Layers in "
            f"{units[0]} are called: {', '.join(there)}."
        )
    config.target_modules = _shortened(chosen, [name for name, _ in model.named_modules()])
    named = sorted(config.target_modules)
    shown = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
    print(f"target_modules left out: {method} adapts {len(chosen)} layers, {shown}")


def _layers(inside: dict[str, nn.Module], method: str) -> list[str]:
    linear = {name: name.rpartition(".")[2] for name, module in inside.items() if isinstance(module, nn.Linear)}
    attention = [name for name, last in linear.items() if last in _ATTENTION]
    mlp = [name for name, last in linear.items() if last in (_MLP_OUT if method == "BOTTLENECK" else _MLP_IN)]
    if method == "BOTTLENECK":
        attention = []
    if attention or mlp:
        return [*attention, *(mlp if method == "REPADAPTER" or not attention else [])]
    convolutions = {n: m for n, m in inside.items() if isinstance(m, nn.Conv2d) and m.groups == 1}
    # PEFT's LoRA leaves a dilation out of its own part.
    undilated = [name for name, module in convolutions.items() if module.dilation == (1, 1)]
    pointwise = [name for name, module in convolutions.items() if module.kernel_size == (1, 1)]
    in_branches = [name for name in pointwise if not {"downsample", "shortcut"} & set(name.split("."))]
    spatial_too = [] if method in ("REPADAPTER", "BOTTLENECK") else undilated
    return in_branches or spatial_too or pointwise or list(linear)


def _norms(inside: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in inside.items() if isinstance(module, nn.LayerNorm)]


def _shortened(chosen: list[str], names: list[str]) -> list[str]:
    """Endings of names that are those of the chosen modules and of no other: one part if that will do, else all."""
    by_ending = defaultdict(set)
    for name in names:
        by_ending[name.rpartition(".")[2]].add(name)
    result = set()
    for name in chosen:
        ending = name.rpartition(".")[2]
        result.add(ending if by_ending[ending] <= set(chosen) else name)
    return sorted(result)


def inputs_of(model: HostModel, size: tuple[int, int, int], names: Iterable[str]) -> dict[str, torch.Size]:
    """Shape of what a forward pass calls each of the modules ``names`` with; those it never calls are left out."""
    shadow = traceable_copy(model).eval()
    seen: dict[str, torch.Size] = {}

    def see(name: str, args: tuple) -> None:
        seen[name] = args[0].shape if args and isinstance(args[0], Tensor) else torch.Size()

    for name in names:
        shadow.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args))
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        shadow(torch.empty((2, *size), device="meta", dtype=dtype))
    return seen


def uncalled_adapters(model: HostModel, size: tuple[int, int, int]) -> list[str]:
    """Names of adapted layers that nothing calls, as timm reads some layers' weights directly: without effect."""
    adapted = [name for name, module in model.named_modules() if is_tuner_layer(module)]
    seen = inputs_of(model, size, adapted)
    return [name for name in adapted if name not in seen]
