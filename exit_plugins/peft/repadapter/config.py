"""Configuration of RepAdapter."""

from dataclasses import dataclass, field
from typing import Any

from .._host import add_peft_type, get_pattern_key
from ..tuner import AdapterConfig

PEFT_TYPE = add_peft_type("REPADAPTER")


@dataclass
class RepAdapterConfig(AdapterConfig):
    """Configuration of RepAdapter (Luo et al., 2023, arXiv:2302.08106).

    An adapter in front of a linear layer, ``x + scale * B(dropout(A x + a)) + scale * b`` with B block-diagonal over
    ``groups``. As it is linear, it can be folded into the layer it stands in front of. As published it stands in front
    of the attention's and the MLP's input projections: ``["qkv", "fc1"]`` in timm,
    ``["q_proj", "k_proj", "v_proj", "fc1"]`` in transformers.

    Args:
        groups: Groups of the second projection; divides ``r`` and the width of every adapted layer.
        scale: s. The authors search it in {0.1, 0.5, 1, 5, 10}.
        scale_pattern: Other ``scale`` for the modules whose name ends in, or matches, the key.
        share_qkv: One adapter for query, key and value projections that stand side by side, as for one fused layer.

    The other arguments are those of ``AdapterConfig`` and of ``peft.PeftConfig``.
    """

    groups: int = field(default=2, metadata={"help": "Groups of the second projection."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    scale_pattern: dict = field(default_factory=dict, metadata={"help": "Module name or pattern to another scale."})
    share_qkv: bool = field(default=True, metadata={"help": "One adapter for separate q, k and v projections."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}.")
        for rank in (self.r, *self.rank_pattern.values()):
            if rank % self.groups:
                raise ValueError(f"groups={self.groups} does not divide the adapter's width r={rank}.")

    def of_layer(self, name: str) -> dict[str, Any]:
        scale = self.scale_pattern.get(get_pattern_key(list(self.scale_pattern), name), self.scale)
        return {**super().of_layer(name), "scale": scale}
