"""How sure an exit is of its answer, as one number per sample in [0, 1], and temperatures that make it honest."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONFIDENCES", "check_measure", "check_temperatures", "confidence", "fit_temperatures", "running_ensemble"]


# Beyond these, logits divided by a temperature are zero or infinite in float32 for all purposes.
TEMPERATURES = (1e-4, 1e4)


def _max_softmax(logits: Tensor) -> Tensor:
    # Two kernels; exp(max - logsumexp) is a dozen, which at batch 1 is a measurable part of an adaptive run.
    return logits.softmax(-1).amax(-1)


def _entropy(logits: Tensor) -> Tensor:
    """1 - H(p) / log C: one for a certain answer, zero for a uniform one."""
    log_p = logits.log_softmax(-1)
    # A class at -inf has p = 0 and adds nothing; 0 * -inf would make NaN of it.
    entropy = -torch.where(log_p.isneginf(), torch.zeros_like(log_p), log_p.exp() * log_p).sum(-1)
    sure = 1 - entropy / torch.log(torch.tensor(float(max(logits.shape[-1], 2)), device=logits.device))
    return sure.clamp(0, 1)  # H and log C are rounded apart, and H of a uniform answer may come out the larger


def _margin(logits: Tensor) -> Tensor:
    """Probability of the first class minus that of the second."""
    if logits.shape[-1] < 2:
        return _max_softmax(logits)
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": _max_softmax,
    "entropy": _entropy,
    "margin": _margin,
}


def check_measure(measure: object) -> str:
    """``measure`` if it names a confidence; ValueError if not."""
    if not isinstance(measure, str) or measure not in CONFIDENCES:
        raise ValueError(f"unknown confidence {measure!r}; choose one of {', '.join(CONFIDENCES)}.")
    return measure


def check_temperatures(temperatures: Iterable[float] | None, num_exits: int) -> tuple[float, ...]:
    """(K,) temperatures, ones for None; ValueError unless they are K numbers within ``TEMPERATURES``."""
    values = (1.0,) * num_exits if temperatures is None else tuple(temperatures)
    low, high = TEMPERATURES
    if len(values) != num_exits or not all(_is_number(value) and low <= value <= high for value in values):
        shown = ", ".join(str(value)[:20] for value in values[:12])
        raise ValueError(
            f"temperatures must be {num_exits} numbers between {low:g} and {high:g}, one per exit, got [{shown}]."
        )
    return tuple(float(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def confidence(logits: Tensor, measure: str = "max_softmax", temperature: float = 1.0) -> Tensor:
    """Confidence (...,) in [0, 1] of logits (..., num_classes), computed in float32; NaN where the logits hold NaN.

    ``measure`` is ``max_softmax``, ``entropy`` (1 - H / log C) or ``margin`` (first minus second probability).
    ``temperature`` divides the logits first. ValueError for an unknown measure or a temperature that is not positive.
    """
    check_measure(measure)
    if not temperature > 0:
        raise ValueError(f"a temperature must be positive, got {temperature}.")
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    return CONFIDENCES[measure](logits if temperature == 1.0 else logits / temperature)


def fit_temperatures(logits: Sequence[Tensor] | Tensor, target: Tensor) -> list[float]:
    """One temperature per exit, each minimising the negative log-likelihood on held-out samples.

    Args:
        logits: (K, N, C), or K tensors (N, C), of a split the model was not trained on.
        target: (N,) class indices.

    Returns:
        K floats. The likelihood is convex in 1/T, so a bounded scalar search finds the optimum (in [0.02, 50]).

    Raises:
        ValueError: there are no logits, not as many as targets, or some are NaN or infinite.
    """
    from scipy.optimize import minimize_scalar

    if logits is None:
        raise ValueError(
            "temperatures are fitted on logits and there are none: collect the table with keep_logits=True."
        )
    target = torch.as_tensor(target)
    temperatures = []
    for exit_logits in logits:
        z = torch.as_tensor(exit_logits).double()
        if z.shape[0] != target.shape[0] or z.shape[0] == 0:
            raise ValueError(f"expected as many logits as targets, and some: got {z.shape[0]} and {target.shape[0]}.")
        if not torch.isfinite(z).all():
            raise ValueError("temperatures cannot be fitted on logits that are NaN or infinite; drop those samples.")

        def nll(log_inverse: float, z: Tensor = z) -> float:
            scaled = z * float(torch.tensor(log_inverse).exp())
            return float((scaled.logsumexp(-1) - scaled.gather(-1, target[:, None])[:, 0]).mean())

        best = minimize_scalar(nll, bounds=(-3.912, 3.912), method="bounded", options={"xatol": 1e-5})
        temperatures.append(float(torch.tensor(-best.x).exp()))
    return temperatures


def running_ensemble(
    logits: Sequence[Tensor] | Tensor, costs: Sequence[float] | Tensor, temperatures: Sequence[float] | None = None
) -> Tensor:
    """At each exit, the mean of the probabilities of the exits so far, each weighted by what reaching it costs.

    Deeper exits weigh more. It mends anytime accuracy where an exit is worse than the one before it, and costs
    nothing, since the earlier exits have spoken already.

    Args:
        logits: (K, N, C), or K tensors (N, C).
        costs: (K,) cumulative cost of each exit, in any unit.
        temperatures: (K,) that divide the logits first.

    Returns:
        Log-probabilities (K, N, C): logits again, which every confidence measure takes.

    Raises:
        ValueError: not one positive cost per exit.
    """
    parts = [torch.as_tensor(z).float() for z in logits]
    weights = torch.as_tensor(costs, dtype=torch.float64)
    if weights.shape != (len(parts),) or not (weights > 0).all():
        raise ValueError(f"expected {len(parts)} positive costs, one per exit, got {weights.tolist()}.")
    temperatures = tuple(temperatures) if temperatures is not None else (1.0,) * len(parts)
    scaled = torch.stack([z / t for z, t in zip(parts, temperatures, strict=True)]).log_softmax(-1)
    weighted = scaled + weights.log().float().view(-1, *[1] * (scaled.ndim - 1))
    total = weights.cumsum(0).log().float()
    return weighted.logcumsumexp(0) - total.view(-1, *[1] * (scaled.ndim - 1))
