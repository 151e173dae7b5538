"""The PEFT wing: RepAdapter and bottleneck adapters as PEFT methods, and early exits over any adapter.

Importing it makes PEFT know the methods REPADAPTER and BOTTLENECK.
"""

from .bottleneck import BottleneckConfig, BottleneckModel
from .repadapter import RepAdapterConfig, RepAdapterModel

__all__ = ["BottleneckConfig", "BottleneckModel", "RepAdapterConfig", "RepAdapterModel"]
