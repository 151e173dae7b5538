"""Certificates beside MAPIE's on tables made to be hard: all ties, alternating risk, thirty samples.

MAPIE's conformal risk control bound, its p-values for binary losses and its fixed-sequence testing are the independent
computation; the losses are counted once more from the rule. Its betting bound is another quantity than ours (it adds
the highest wealths of two halves) and is not compared.
"""

import numpy as np
import pytest
from small_tables import costs_of, naive_run, realistic_table

from exit_plugins import ExitTable
from exit_plugins.exits.risk import certify
from exit_plugins.exits.thresholds import policy_path

pytest.importorskip("mapie", reason="the independent certificates are MAPIE's: pip install 'exit-plugins[test]'")
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value, get_r_hat_plus


def ties(n: int, seed: int) -> ExitTable:
    """Every confidence the same, every exit right for other samples."""
    rng = np.random.default_rng(seed)
    return ExitTable(np.full((4, n), 0.5), rng.integers(0, 3, (4, n)), rng.integers(0, 3, n))


def alternating(n: int, seed: int) -> ExitTable:
    """Exits agree with the last one, and do not, by turns: the risk is far from monotone along a path."""
    rng = np.random.default_rng(seed)
    last = rng.integers(0, 3, n)
    prediction = np.stack([last, (last + (rng.random(n) < 0.5)) % 3, last, last])
    return ExitTable(np.round(rng.random((4, n)), 1), prediction, np.where(rng.random(n) < 0.7, last, 0))


TABLES = {
    "ties": ties,
    "alternating": alternating,
    "few": lambda n, seed: realistic_table(4, 30, seed, 3),
    "real": lambda n, seed: realistic_table(4, n, seed, 3),
}


def losses_of(path, table: ExitTable, loss: str) -> np.ndarray:
    """(N, S), sample by sample."""
    found = []
    for policy in path:
        exits = naive_run(table, policy.thresholds, costs_of(4))[2]
        said = [table.prediction[k, i] for i, k in enumerate(exits)]
        if loss == "disagreement":
            found.append([float(a != b) for a, b in zip(said, table.prediction[-1], strict=True)])
        else:
            last = table.prediction[-1] == table.target
            found.append([float(b) - float(a == t) for a, b, t in zip(said, last, table.target, strict=True)])
    return np.array(found).T


def cases():
    for name in TABLES:
        for seed in range(4):
            for n in (30, 200):
                yield name, seed, n


@pytest.mark.parametrize(("name", "seed", "n"), cases())
def test_steps_are_those_of_mapie(name, seed, n):
    solving, table = TABLES[name](n, seed), TABLES[name](n, seed + 100)
    path = policy_path(solving, costs_of(4), steps=9, method="shared")
    steps = np.arange(len(path))
    for epsilon in (0.01, 0.05, 0.1, 0.2, 0.5):
        for loss in ("disagreement", "gap"):
            losses = losses_of(path, table, loss)
            worst = np.maximum.accumulate(losses[:, ::-1], 1)[:, ::-1]  # what conformal risk control asks for
            bound = get_r_hat_plus(worst, steps / len(path), "crc", None, None, None)[1]
            unsafe = np.flatnonzero(bound[:-1] > epsilon + 1e-12)
            expected = int(unsafe[-1]) + 1 if len(unsafe) else 0
            assert certify(path, table, epsilon, method="crc", loss=loss).certificate["step"] == expected
        risks = losses_of(path, table, "disagreement").mean(0)
        counts = np.round(risks * table.num_samples)
        # A hair below the count, which MAPIE rounds up again.
        risks = np.maximum(counts - 1e-9, 0) / table.num_samples
        p_values = compute_hoeffding_bentkus_p_value(risks, table.num_samples, epsilon, binary=True)[:, 0]
        for delta in (0.05, 0.2):
            # From the full end, whose loss is zero, towards the cheap one.
            passed = control_fwer(p_values[:-1][::-1], delta, "fixed_sequence")
            expected = len(path) - 1 - len(passed)
            assert certify(path, table, epsilon, delta, method="ltt").certificate["step"] == expected
