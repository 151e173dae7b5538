"""Which samples a table or a policy has seen, in a record small enough to travel in a file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SampleRecord"]

_KEPT = 4096  # digests a record holds; enough to estimate an overlap to about 1.5 % and small enough for a JSON file


@dataclass(frozen=True)
class SampleRecord:
    """Which samples something was made from, small enough to travel in a policy.

    Attributes:
        count: how many samples.
        digests: the lowest 4,096 of their digests (n,) uint64, sorted and without repeats (a bottom-k sketch: a random
            sample of them, since digests are random); None where the samples have none.
        limit: the highest digest kept, all up to it are here; None when all are.
    """

    count: int
    digests: NDArray[Any] | None = None
    limit: int | None = None

    @classmethod
    def of(cls, sample: NDArray[Any] | None, count: int) -> "SampleRecord":
        """Of a table's digests (N,), or of ``count`` samples that have none."""
        if sample is None:
            return cls(count)
        unique = np.unique(sample)
        return cls(count, unique[:_KEPT], int(unique[_KEPT - 1]) if len(unique) > _KEPT else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "digests": None if self.digests is None else [f"{int(digest):016x}" for digest in self.digests],
            "limit": None if self.limit is None else f"{self.limit:016x}",
        }

    @classmethod
    def of_json(cls, value: Any) -> "SampleRecord | None":
        """What ``to_json`` wrote, or a plain count, as older policies have it; ValueError for anything else."""
        if value is None:
            return None
        if type(value) is int and value >= 0:
            return cls(value)
        if not isinstance(value, Mapping) or set(value) - {"count", "digests", "limit"}:
            raise ValueError(f"samples are a count, digests and a limit, got {str(value)[:80]}.")
        count, digests, limit = value.get("count"), value.get("digests"), value.get("limit")
        if type(count) is not int or count < 0:
            raise ValueError(f"samples have a count, got {count!r}.")
        if digests is not None and not isinstance(digests, list):
            raise ValueError(f"samples have a list of digests, got {str(digests)[:40]!r}.")
        numbers = None if digests is None else np.array(sorted(map(_from_hex, digests)), dtype=np.uint64)
        return cls(count, numbers, None if limit is None else _from_hex(limit))

    def overlap(self, sample: NDArray[Any]) -> int:
        """How many of the digests ``sample`` (N,) are among these; an estimate where not all are kept."""
        if self.digests is None:
            return 0
        seen = int(np.isin(sample, self.digests).sum())
        if self.limit is None:
            return seen
        kept = (self.limit + 1) / 2**64
        return min(len(sample), max(seen, round(seen / kept)))


def _from_hex(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{16}", text):
        raise ValueError(f"a sample's digest is 16 hexadecimal digits, got {str(text)[:40]!r}.")
    return int(text, 16)
