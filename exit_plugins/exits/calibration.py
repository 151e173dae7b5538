"""How far an exit's confidence can be believed: calibration error, failure prediction, selective risk."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .table import ExitTable, check_not_empty

__all__ = ["Calibration", "calibration"]


@dataclass(frozen=True)
class Calibration:
    """How far an exit's confidence can be believed.

    Attributes:
        ece: expected calibration error over equal-width bins (Guo et al. 2017, eq. 3), in [0, 1].
        auroc: probability that a right answer has a higher confidence than a wrong one (failure prediction); NaN when
            all answers are right or all wrong.
        aurc: area under the risk-coverage curve: the mean error among the most confident, over all coverages.
        bin_confidence, bin_accuracy, bin_share: (bins,) of the reliability diagram; NaN in an empty bin.
    """

    exit_index: int
    ece: float
    auroc: float
    aurc: float
    bin_confidence: NDArray[Any]
    bin_accuracy: NDArray[Any]
    bin_share: NDArray[Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "exit_index": self.exit_index,
            "ece": self.ece,
            "auroc": None if np.isnan(self.auroc) else self.auroc,
            "aurc": self.aurc,
        }


# How far confidences that others computed may lie beyond [0, 1]: ours, about ten times what float32 rounds.
_ROUNDING = 1e-6


def calibration(table: ExitTable, bins: int = 15) -> list[Calibration]:
    """Calibration of every exit. Confidences must lie in [0, 1]; samples whose confidence is NaN are left out.

    ValueError for no bins, or an exit none of whose confidences lies there.
    """
    from scipy.stats import rankdata

    check_not_empty(table)
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}.")
    found = []
    for k in range(table.num_exits):
        known = ~np.isnan(table.confidence[k])
        sure, right = table.confidence[k][known].astype(np.float64), table.correct[k][known].astype(np.float64)
        if len(sure) == 0 or sure.min() < -_ROUNDING or sure.max() > 1 + _ROUNDING:
            raise ValueError(f"exit {k + 1} has no confidences in [0, 1] to be calibrated.")
        sure = sure.clip(0, 1)
        place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # (low, high], zero in the first
        count = np.bincount(place, minlength=bins)
        with np.errstate(invalid="ignore"):
            bin_confidence = np.bincount(place, weights=sure, minlength=bins) / count
            bin_accuracy = np.bincount(place, weights=right, minlength=bins) / count
        share = count / len(sure)
        gaps = np.where(count > 0, np.abs(bin_confidence - bin_accuracy), 0.0)
        positives = right.sum()
        negatives = len(right) - positives
        auroc = np.nan
        if positives and negatives:
            ranks = rankdata(sure)
            auroc = (ranks[right == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)
        found.append(
            Calibration(k, float(share @ gaps), float(auroc), _aurc(sure, right), bin_confidence, bin_accuracy, share)
        )
    return found


def _aurc(sure: NDArray[Any], right: NDArray[Any]) -> float:
    # Samples with equal confidence are accepted together; each takes the mean error of its group's coverages.
    order = np.argsort(-sure, kind="stable")
    values, wrong = sure[order], 1 - right[order]
    ends = np.flatnonzero(np.append(values[:-1] != values[1:], True))
    sizes = np.diff(ends, prepend=-1)
    return float(np.repeat(np.cumsum(wrong)[ends] / (ends + 1), sizes).mean())
