"""MSDNet's rule: thresholds from the share of the samples that is to leave at each exit, bit for bit as released."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..table import ExitTable

__all__ = ["SWEEPS", "closed_as_inf", "descending", "msdnet_shares", "msdnet_thresholds", "rule", "sweep_shares"]

# The release's own numbers: no confidence reaches the first, and every one the second.
NOBODY = np.float32(1e8)
EVERYBODY = np.float32(-1e8)


def msdnet_shares(num_exits: int, p: float) -> NDArray[Any]:
    """Shares (K,) float32 of samples per exit, ``p**k / sum_j p**j`` for k = 1..K (MSDNet, section 4.2).

    Computed in torch's float32, as the released rule is, so that the thresholds agree to the last bit.

    ValueError for no exits or a p that is not positive.
    """
    if num_exits < 1 or not p > 0:
        raise ValueError(f"expected at least one exit and p > 0, got {num_exits} and {p}.")
    shares = torch.exp(torch.log(torch.tensor([p], dtype=torch.float32)) * torch.arange(1, num_exits + 1).float())
    return (shares / shares.sum()).numpy()


# The two sweeps are those of the releases: MSDNet's p = i / 20 for i = 1..39, and Dyn-Perceiver's bases from 0.2 to 1
# and 20 / i for i = 20..5, of whose first three exits' shares it keeps these parts.
_DYN_PERCEIVER_KEEPS = (0.85, 1.0, 0.5)


def _msdnet_sweep(num_exits: int) -> NDArray[Any]:
    return np.stack([msdnet_shares(num_exits, i / 20) for i in range(1, 40)])


def _dyn_perceiver_sweep(num_exits: int) -> NDArray[Any]:
    bases = [*(round(0.05 * i, 2) for i in range(4, 21)), *(20 / i for i in range(20, 4, -1))]
    rows = np.stack([msdnet_shares(num_exits, q) for q in bases]).astype(np.float64)
    for j, factor in enumerate(_DYN_PERCEIVER_KEEPS[: num_exits - 1]):
        # What exit j gives up goes to the exits after it, in proportion.
        given = rows[:, j] * (1 - factor)
        later = rows[:, j + 1 :]
        later *= 1 + given[:, None] / later.sum(1, keepdims=True)
        rows[:, j] *= factor
    return rows.astype(np.float32)


SWEEPS: dict[str, Callable[[int], NDArray[Any]]] = {"msdnet": _msdnet_sweep, "dyn_perceiver": _dyn_perceiver_sweep}


def sweep_shares(num_exits: int, sweep: str = "msdnet") -> NDArray[Any]:
    """Shares (P, K) float32 that a published rule tries: ``msdnet`` (39 rows, p = i/20) or ``dyn_perceiver`` (33).

    ValueError for another name.
    """
    if sweep not in SWEEPS:
        raise ValueError(f"unknown sweep {sweep!r}; choose one of {', '.join(SWEEPS)}.")
    return SWEEPS[sweep](num_exits)


def msdnet_thresholds(table: ExitTable, shares: NDArray[Any] | Sequence[float]) -> NDArray[Any]:
    """Thresholds (K,) float32 that let the given share of samples leave at each exit, bit for bit as MSDNet's release.

    Exit after exit, the ``floor(N * share)``-th most confident sample that is still there sets the threshold, and
    everybody at or above it leaves; ties may therefore let more leave than the share says. The last entry is -1e8;
    1e8 marks an exit where nobody may leave.

    Args:
        table: labelled samples; the labels are not used.
        shares: (K,) taken as float32, as the product with N is.

    Raises:
        ValueError: not one share from 0 to 1 per exit.
    """
    shares = np.asarray(shares, dtype=np.float32)
    if shares.shape != (table.num_exits,):
        raise ValueError(f"expected one share per exit ({table.num_exits}), got shape {shares.shape}.")
    if not (shares >= 0).all():
        raise ValueError(f"shares must be numbers from 0 to 1, got {shares.tolist()}.")
    return rule(table.confidence, [descending(c) for c in table.confidence], shares)


def rule(confidence: NDArray[Any], orders: Sequence[NDArray[Any]], shares: NDArray[Any]) -> NDArray[Any]:
    """``msdnet_thresholds`` of confidences (K, N), where ``orders`` holds each exit's samples, surest first."""
    num_exits, num_samples = confidence.shape
    thresholds = np.full(num_exits, NOBODY, dtype=np.float32)
    gone = np.zeros(num_samples, dtype=bool)
    for k in range(num_exits - 1):
        count = int(np.floor(np.float32(num_samples) * shares[k]))
        waiting = orders[k][~gone[orders[k]]]
        if 1 <= count <= len(waiting) and not np.isnan(confidence[k, waiting[count - 1]]):
            thresholds[k] = confidence[k, waiting[count - 1]]
        gone |= confidence[k] >= thresholds[k]
    thresholds[-1] = EVERYBODY
    return thresholds


def descending(values: NDArray[Any]) -> NDArray[Any]:
    """Indices from the largest value to the smallest, NaN last."""
    return np.argsort(-values, kind="stable")


def closed_as_inf(thresholds: NDArray[Any]) -> NDArray[Any]:
    """Thresholds (K,) of the released rule, with +inf where its 1e8 closes an exit and -inf at the last one."""
    thresholds = np.where(thresholds == NOBODY, np.float32(np.inf), thresholds)
    thresholds[-1] = -np.inf
    return thresholds
