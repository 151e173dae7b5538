"""Tables to solve on: random ones of every awkward kind, and one that looks like a real multi-exit network's."""

import numpy as np
from hypothesis import strategies as st

from exit_plugins import ExitTable


def realistic_table(num_exits: int, num_samples: int, seed: int = 0, num_classes: int = 10) -> ExitTable:
    """Samples of varying difficulty; deeper exits are surer and more often right, confidence tells right from wrong."""
    rng = np.random.default_rng(seed)
    skill = np.linspace(0.0, 1.5, num_exits)[:, None]
    evidence = skill - 1.2 * rng.normal(size=num_samples) + 0.6 * rng.normal(size=(num_exits, num_samples))
    right = 1 / (1 + np.exp(-2 * evidence))
    target = rng.integers(num_classes, size=num_samples)
    wrong = (target + rng.integers(1, num_classes, size=(num_exits, num_samples))) % num_classes
    prediction = np.where(rng.random(right.shape) < right, target, wrong)
    confidence = 1 / (1 + np.exp(-(2 * evidence + 0.5 * rng.normal(size=right.shape))))
    return ExitTable(confidence, prediction, target)


def costs_of(num_exits: int) -> np.ndarray:
    return np.cumsum(np.linspace(2.0, 1.0, num_exits))


@st.composite
def awkward_tables(draw, min_exits: int = 1, max_exits: int = 8, max_samples: int = 30):
    """(table, costs): few distinct confidences, NaN and infinities among them, any mix of right and wrong."""
    num_exits = draw(st.integers(min_exits, max_exits))
    num_samples = draw(st.integers(1, max_samples))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from((1, 2, 5, 1000)))
    confidence = rng.integers(0, levels + 1, size=(num_exits, num_samples)) / levels
    for odd in (np.nan, np.inf, -np.inf):
        if draw(st.integers(0, 4)) == 0:
            confidence[rng.random(confidence.shape) < 0.2] = odd
    share = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    target = np.zeros(num_samples, dtype=int)
    prediction = (rng.random(confidence.shape) >= share).astype(int)
    # Costs are whole numbers, so that means of them fall exactly on budgets.
    costs = np.cumsum(rng.integers(0 if draw(st.booleans()) else 1, 5, size=num_exits)) + 1.0
    return ExitTable(confidence, prediction, target), costs


def naive_run(table: ExitTable, thresholds: np.ndarray, costs: np.ndarray) -> tuple[float, float, list[int]]:
    """(accuracy, mean cost, exits): the rule said once more, sample by sample."""
    exits, right, spent = [], 0, 0.0
    for i in range(table.num_samples):
        for k in range(table.num_exits):
            closed = thresholds[k] == np.inf
            if k == table.num_exits - 1 or (table.confidence[k, i] >= thresholds[k] and not closed):
                exits.append(k)
                right += int(table.prediction[k, i] == table.target[i])
                spent += costs[k]
                break
    return right / table.num_samples, spent / table.num_samples, exits
