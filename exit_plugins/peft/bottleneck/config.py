"""Configuration of the bottleneck adapter."""

from dataclasses import dataclass, field

from .._host import add_peft_type
from ..tuner import AdapterConfig

PEFT_TYPE = add_peft_type("BOTTLENECK")

_INITIALISATIONS = ("xavier", "identity")


@dataclass
class BottleneckConfig(AdapterConfig):
    """Configuration of the bottleneck adapter (Houlsby et al., 2019), as vision papers use it.

    An adapter behind a linear layer, ``h + W2 dropout(GELU(W1 h))`` with biases, where h is the layer's output. As
    published it stands behind the MLP of every block: ``["fc2"]`` (timm: take care that nothing else is called so).
    It is not linear and cannot be merged.

    Args:
        init: ``"xavier"``, both weights Xavier-uniform and biases of standard deviation 1e-6, as in the papers' vision
            baselines; ``"identity"``, W2 and its bias zero, so that training starts from the base model's outputs,
            the better start over convolutional networks, of which the published one changes every layer's output.

    The other arguments are those of ``AdapterConfig`` and of ``peft.PeftConfig``.
    """

    init: str = field(default="xavier", metadata={"help": "'xavier', as published, or 'identity'."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.init not in _INITIALISATIONS:
            raise ValueError(f"unknown init {self.init!r}; choose one of {', '.join(_INITIALISATIONS)}.")
