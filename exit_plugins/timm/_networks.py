"""What a model built around another timm network does with it: parameter groups, and its form for inference."""

from collections.abc import Callable, Sequence

from timm.models import group_parameters
from timm.utils.model import reparameterize_model
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ._host import TimmModel
from ._trace import is_layer, trace_network, traceable_copy
from .kernels import is_closed, use_faster_products
from .layers import fold_pair

__all__ = ["check_not_fused", "fuse_network", "groups_of_part"]


def groups_of_part(part: TimmModel, prefix: str, coarse: bool) -> Callable[[str], tuple[float, ...]]:
    """Group matcher of a model with ``part`` under ``prefix``: the part's own groups, and all else in the last."""
    groups = group_parameters(part, part.group_matcher(coarse=coarse), reverse=True)
    last = max(groups.values(), default=0)

    def group(name: str) -> tuple[float, ...]:
        return (groups.get(name.removeprefix(prefix), last),)

    return group


def check_not_fused(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is in its form for inference: what is saved of that is not its architecture's."""
    if getattr(model, "fused", False):
        raise ValueError(
            f"this {type(model).__name__} is in its form for inference, whose state dict is not its architecture's: "
            "save the model as it was before fuse()."
        )


def fuse_network(net: nn.Module, exit_names: Sequence[str] = ()) -> None:
    """Put the inference form of a timm network in place; what the modules ``exit_names`` return stays as it is.

    A network without exits that cannot be traced keeps its batch norms. Layers with hooks or computed weights stay; a
    network that has any keeps the blocks that timm could reparameterise.
    """
    if is_closed(net):
        reparameterize_model(net, inplace=True)
    use_faster_products(_fold_batch_norms(net, exit_names))


def _fold_batch_norms(net: nn.Module, exit_names: Sequence[str]) -> nn.Module:
    """Fold each batch norm into the convolution whose output it alone reads, as a trace shows; return ``net``."""
    try:
        graph, calls, _ = trace_network(
            traceable_copy(net).eval(), lambda name, module: not is_layer(module, timm_layers=False)
        )
    except Exception:  # whatever the network's own code raises at a proxy
        if exit_names:
            raise
        return net
    read_by_heads = {leaf.node for name in exit_names for leaf in tree_leaves(calls[name][0][0])}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        name, before_name = str(node.target), str(before.target)
        alone = len(before.users) == 1 and before not in read_by_heads
        if alone and len(calls[name]) == len(calls[before_name]) == 1:
            fold_pair(net, before_name, name)
    return net
