"""Certificates: how much an early exit may differ from the last one, guaranteed from a finite calibration split.

A path of policies runs from cheap to full (``exits.thresholds.policy_path``). On samples apart from those the path was
solved on, the cheapest policy is taken whose risk is certified to be at most epsilon:

* ``crc``: conformal risk control (Angelopoulos et al. 2022, eq. 4): the expected loss is at most epsilon.
* ``ucb``: the upper confidence bound of Waudby-Smith and Ramdas (Bates et al. 2021, proposition 5): with probability
  1 - delta over the calibration split, the risk is at most epsilon.
* ``ltt``: Learn then Test (Angelopoulos et al. 2021), fixed-sequence testing from the full end: the same promise.

All assume that calibration samples and later samples are exchangeable: under drift a certificate says nothing.
"Fast yet Safe" (Jazbec et al. 2024) applies them to early exits.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .policy import ExitPolicy, check_path, check_same_origin
from .samples import SampleRecord
from .table import ExitTable, check_not_empty

__all__ = ["LOSSES", "RISK_METHODS", "certified_step", "certify", "path_losses", "samples_needed", "wsr_bound"]


def _disagreement(table: ExitTable, exits: NDArray[Any]) -> NDArray[Any]:
    differs: NDArray[Any] = table.prediction[exits, np.arange(table.num_samples)] != table.prediction[-1]
    return differs.astype(np.float64)


def _gap(table: ExitTable, exits: NDArray[Any]) -> NDArray[Any]:
    lost: NDArray[Any] = table.correct[-1].astype(np.float64) - table.correct[exits, np.arange(table.num_samples)]
    return lost


# Name -> (loss per sample, its least and its greatest value).
LOSSES = {"disagreement": (_disagreement, 0.0, 1.0), "gap": (_gap, -1.0, 1.0)}


def path_losses(path: Sequence[ExitPolicy], table: ExitTable, loss: str = "disagreement") -> NDArray[Any]:
    """Loss (S, N) of each sample under each policy of the path.

    ``disagreement``: 1 where the answer is not the last exit's (needs no labels). ``gap``: the last exit's correctness
    minus the answer's, so that the mean is the accuracy lost; from -1 to 1.

    ValueError for an unknown loss or an empty path.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(LOSSES)}.")
    check_not_empty(table, "nothing can be certified on it")
    if len(path) == 0:
        raise ValueError("a path needs at least one policy.")
    for policy in path:
        check_same_origin(policy, table, weights=False)
    return np.stack([LOSSES[loss][0](table, policy.choose(table.confidence)) for policy in path])


# ---------------------------------------------------------------------------------------------------------------------
# Which steps are safe: from losses (S, N) ordered from cheap to full
# ---------------------------------------------------------------------------------------------------------------------


def _log_wealth(losses: NDArray[Any], risk: float, delta: float) -> NDArray[Any]:
    """Log of the highest wealth (S,) of a gambler who bets that the mean of ``losses`` (S, N) in [0, 1] is below risk.

    A wealth above 1/delta happens with probability at most delta when the mean is ``risk`` or more (Ville), so the
    inverse of the highest wealth is a p-value. The bets are those of Bates et al. 2021, proposition 5.
    """
    n = losses.shape[-1]
    steps = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses, -1)) / (1 + steps)
    variance = (0.25 + np.cumsum((losses - mean) ** 2, -1)) / (1 + steps)
    earlier = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    bet = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (n * earlier)))
    with np.errstate(divide="ignore"):
        # The factor is never below zero: losses, bets and the risk lie in [0, 1].
        growth = np.log(np.maximum(1 - bet * (losses - risk), 0.0))
    highest: NDArray[Any] = np.cumsum(growth, -1).max(-1)
    return highest


def wsr_bound(losses: NDArray[Any], delta: float = 0.1) -> float:
    """Upper confidence bound, at level 1 - delta, of the mean of i.i.d. losses (N,) in [0, 1], taken in their order.

    ValueError for losses outside of [0, 1], or none.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 1 or losses.size == 0 or losses.min() < 0 or losses.max() > 1:
        raise ValueError("expected a non-empty list of losses in [0, 1].")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if _log_wealth(losses[None], middle, delta)[0] > np.log(1 / delta):
            high = middle
        else:
            low = middle
    return high


def _safe_crc(losses: NDArray[Any], low: float, high: float, epsilon: float, delta: float) -> NDArray[Any]:
    # Per sample the worst loss from here to the full end: monotone along the path, as the theorem asks.
    worst = np.maximum.accumulate(losses[::-1], 0)[::-1]
    n = losses.shape[1]
    safe: NDArray[Any] = worst.mean(1) <= ((n + 1) * epsilon - high) / n
    return safe


def _safe_ucb(losses: NDArray[Any], low: float, high: float, epsilon: float, delta: float) -> NDArray[Any]:
    # The bound is below epsilon exactly where the bet against epsilon succeeded.
    wealth = _log_wealth((losses - low) / (high - low), (epsilon - low) / (high - low), delta)
    return np.asarray(wealth > np.log(1 / delta))


def _safe_ltt(losses: NDArray[Any], low: float, high: float, epsilon: float, delta: float) -> NDArray[Any]:
    if (low, high) != (0.0, 1.0):
        # A signed loss is no count: the p-value is the betting one, which adapts to its small variance.
        return _safe_ucb(losses, low, high, epsilon, delta)
    from scipy.stats import binom

    return np.asarray(binom.cdf(losses.sum(1), losses.shape[1], epsilon) <= delta)


RISK_METHODS = {"crc": _safe_crc, "ucb": _safe_ucb, "ltt": _safe_ltt}


def certified_step(
    losses: NDArray[Any],
    epsilon: float,
    delta: float = 0.1,
    method: str = "ucb",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> int:
    """The cheapest step of a path such that it and every fuller one is certified.

    Going from the full end and stopping at the first failure is what lets each step be tested at the whole delta:
    to end at a risk above epsilon, the first such step on the way must have passed, which happens with probability
    at most delta, whether or not the risk is monotone.

    Args:
        losses: (S, N) from cheap to full, each within ``bounds``; the last step's are taken to be zero.
        epsilon: the risk allowed. delta: probability of exceeding it (``ucb``, ``ltt``).

    Returns:
        0-based step; S - 1, the full policy, when nothing cheaper can be certified.

    Raises:
        ValueError: an unknown method, ``epsilon`` or ``delta`` outside of (0, 1), or losses of another shape.
    """
    if method not in RISK_METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(RISK_METHODS)}.")
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise ValueError(f"epsilon and delta lie strictly between 0 and 1, got {epsilon} and {delta}.")
    if losses.ndim != 2 or losses.shape[1] == 0:
        raise ValueError(f"expected losses (steps, samples) of at least one sample, got shape {losses.shape}.")
    safe = RISK_METHODS[method](losses, *bounds, epsilon, delta)
    safe[-1] = True
    unsafe = np.flatnonzero(~safe)
    return int(unsafe[-1]) + 1 if len(unsafe) else 0


def _drawn_losses(path: Sequence[ExitPolicy], table: ExitTable, loss: str, seed: int) -> NDArray[Any]:
    """``path_losses`` with the samples in the order that ``seed`` draws, of the weights the path was solved for."""
    for policy in path:
        check_same_origin(policy, table)
    order = np.random.default_rng(seed).permutation(table.num_samples)
    return path_losses(path, table, loss)[:, order]


def certify(
    path: Sequence[ExitPolicy],
    table: ExitTable,
    epsilon: float,
    delta: float = 0.1,
    method: str = "ucb",
    loss: str = "disagreement",
    seed: int = 0,
) -> ExitPolicy:
    """The cheapest policy of ``path`` whose risk is certified on ``table``, with the certificate in it.

    Args:
        path: from ``exits.thresholds.policy_path``, solved on other samples; its last policy lets nobody leave early.
        table: calibration samples apart from those, exchangeable with what the policy will see. Labels are needed by
            ``loss="gap"`` alone.
        epsilon: risk allowed, e.g. 0.02 for 2 % of the answers differing from the last exit's.
        delta: probability that the certificate is wrong (``ucb``, ``ltt``); ``crc`` bounds the expectation and has
            none.
        method: ``crc``, ``ucb`` or ``ltt``.
        loss: ``disagreement`` with the last exit, or accuracy ``gap`` to it.
        seed: of the order in which ``ucb`` takes the samples.

    Returns:
        ExitPolicy whose ``certificate`` records method, loss, epsilon, delta, the split's samples and SHA-256, the step
        of the path, and the risk on the split with its upper bound (``ucb``).

    Raises:
        ValueError: the path does not run from cheap to the policy under which nobody leaves early, was solved on
            samples of ``table``, or for another model or other weights than the table records.
    """
    check_not_empty(table, "nothing can be certified on it")
    check_path(path)
    digest = table.digest()
    if any(policy.source.get("sha256") == digest for policy in path):
        raise ValueError("the path was solved on these very samples; certify on a split apart, see ExitTable.split.")
    shared = path[0].overlap(table) or 0
    # Data sets hold the odd image twice; those are draws like any other.
    if shared > 0.01 * table.num_samples:
        raise ValueError(
            f"the path was solved on {shared} of these {table.num_samples} samples; certify on a split apart, see "
            "ExitTable.split."
        )
    losses = _drawn_losses(path, table, loss, seed)
    low, high = LOSSES[loss][1:]
    step = certified_step(losses, epsilon, delta, method, (low, high))
    certificate = {
        "method": method,
        "loss": loss,
        "epsilon": float(epsilon),
        "delta": None if method == "crc" else float(delta),
        "samples": SampleRecord.of(table.sample, table.num_samples).to_json(),
        "sha256": digest,
        "step": step,
        "steps": len(path),
        "risk": float(losses[step].mean()),
        "bound": low + (high - low) * wsr_bound((losses[step] - low) / (high - low), delta)
        if method == "ucb"
        else None,
    }
    return replace(path[step], certificate=certificate)


def samples_needed(
    path: Sequence[ExitPolicy],
    table: ExitTable,
    epsilon: float,
    delta: float = 0.1,
    method: str = "ucb",
    loss: str = "disagreement",
    seed: int = 0,
) -> int | None:
    """About how many samples would certify a policy of ``path`` under which somebody leaves early.

    An estimate of ours: the losses on ``table`` of the last such step, repeated until ``certify`` would accept it.

    Args: as ``certify``.

    Returns:
        The least such number, to about one part in a thousand; 0 if ``table`` is enough; None if a million samples
        are not, as when the risk measured is not below epsilon.
    """
    early = [policy for policy in path if (policy.thresholds[:-1] != np.inf).any()]
    if not early or table.num_samples == 0:
        return None
    losses = _drawn_losses([early[-1], path[-1]], table, loss, seed)
    if losses[0].mean() >= epsilon:
        return None

    def enough(count: int) -> bool:
        repeated = np.stack([np.resize(row, count) for row in losses])
        return certified_step(repeated, epsilon, delta, method, LOSSES[loss][1:]) == 0

    low, high = 0, table.num_samples
    if enough(high):
        return 0
    while not enough(high):
        low, high = high, 2 * high
        if high > 1_000_000:
            return None
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
