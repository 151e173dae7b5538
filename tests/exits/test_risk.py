import numpy as np
import pytest
from scipy.stats import binom
from small_tables import costs_of, realistic_table

from exit_plugins import ExitPolicy
from exit_plugins.exits.risk import certified_step, certify, path_losses, wsr_bound
from exit_plugins.exits.thresholds import policy_path


@pytest.fixture(scope="module")
def path() -> list[ExitPolicy]:
    return policy_path(realistic_table(4, 800, seed=1), costs_of(4), steps=17, method="shared")


def naive_wsr_succeeds(losses: np.ndarray, risk: float, delta: float) -> bool:
    """Bates et al. 2021, proposition 5, one loss after the other: does the bound lie below ``risk``?"""
    n, wealth, best = len(losses), 1.0, 0.0
    total, squares, variance = 0.5, 0.25, 0.25
    for i, loss in enumerate(losses, start=1):
        bet = min(1.0, np.sqrt(2 * np.log(1 / delta) / (n * variance)))
        wealth *= 1 - bet * (loss - risk)
        best = max(best, wealth)
        total += loss
        squares += (loss - total / (1 + i)) ** 2
        variance = squares / (1 + i)
    return best > 1 / delta


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.3])
def test_wsr_bound_equals_its_loop(rate):
    losses = (np.random.default_rng(0).random(150) < rate).astype(float)
    bound = wsr_bound(losses, 0.1)
    assert naive_wsr_succeeds(losses, bound + 1e-6, 0.1)
    assert not naive_wsr_succeeds(losses, bound - 1e-6, 0.1)
    assert losses.mean() < bound


def test_wsr_bound_fails_no_more_often_than_delta():
    rng = np.random.default_rng(0)
    failed = [wsr_bound((rng.random(100) < 0.05).astype(float), 0.1) < 0.05 for _ in range(300)]
    assert np.mean(failed) <= 0.1


@pytest.mark.parametrize("loss", ["disagreement", "gap"])
def test_losses_equal_their_definitions(path, loss):
    table = realistic_table(4, 100, seed=5)
    for policy, losses in zip(path, path_losses(path, table, loss), strict=True):
        for i, k in enumerate(policy.choose(table.confidence)):
            answer, last, truth = table.prediction[k, i], table.prediction[-1, i], table.target[i]
            expected = (
                float(answer != last) if loss == "disagreement" else float(last == truth) - float(answer == truth)
            )
            assert losses[i] == expected
    assert (losses == 0).all()  # the full policy is the last exit


def test_learn_then_test_is_the_exact_binomial_test_from_the_full_end():
    counts = np.array([9, 1, 6, 2, 0, 0])
    losses = (np.arange(200)[None, :] < counts[:, None]).astype(float)
    passes = [binom.cdf(c, 200, 0.05) <= 0.1 for c in counts]
    assert passes == [False, True, False, True, True, True]
    # The step with one error passes but lies beyond a failure.
    assert certified_step(losses, 0.05, 0.1, "ltt") == 3


def test_conformal_risk_control_takes_the_worst_loss_from_here_on():
    losses = np.zeros((4, 100))
    losses[1, :3] = 1  # three samples are wrong at step 1 only
    # (n + 1) e - B = 101 * 0.03 - 1 = 2.03 errors are allowed; at step 0 the three of step 1 count as well.
    assert certified_step(losses, 0.03, method="crc") == 2
    assert certified_step(losses, 0.04, method="crc") == 0


def test_nothing_is_certified_from_too_few_samples():
    assert certified_step(np.zeros((5, 10)), 0.01, 0.1, "crc") == 4
    assert certified_step(np.zeros((5, 10)), 0.01, 0.1, "ucb") == 4
    assert certified_step(np.zeros((5, 10)), 0.01, 0.1, "ltt") == 4


@pytest.mark.parametrize("loss", ["disagreement", "gap"])
@pytest.mark.parametrize("n", [100, 1000])
def test_certificates_hold_over_many_calibration_splits(path, loss, n):
    """200 splits drawn from a pool whose own mean is the true risk: violations at most delta, mean risk at most e."""
    pool = realistic_table(4, 5000, seed=9)
    losses = path_losses(path, pool, loss)
    bounds = (0.0, 1.0) if loss == "disagreement" else (-1.0, 1.0)
    risks, rng = losses.mean(1), np.random.default_rng(0)
    epsilon = 0.05
    found = {"crc": [], "ucb": [], "ltt": []}
    for _ in range(200):
        drawn = losses[:, rng.integers(pool.num_samples, size=n)]
        for method, values in found.items():
            values.append(risks[certified_step(drawn, epsilon, 0.1, method, bounds)])
    assert np.mean(np.array(found["ucb"]) > epsilon) <= 0.1
    assert np.mean(np.array(found["ltt"]) > epsilon) <= 0.1
    assert np.mean(found["crc"]) <= epsilon
    if n == 1000:
        assert np.mean(found["ltt" if loss == "disagreement" else "ucb"]) > 0  # something cheaper was certified


def test_certificate_is_recorded_and_survives_the_file(path, tmp_path):
    table = realistic_table(4, 1000, seed=7)
    policy = certify(path, table, epsilon=0.05, delta=0.1, method="ucb")
    about = policy.certificate
    assert about["method"] == "ucb" and about["samples"]["count"] == 1000 and about["sha256"] == table.digest()
    assert about["risk"] == path_losses([policy], table).mean()
    assert about["risk"] <= about["bound"] <= 0.05
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json").certificate == about


def test_certifying_on_the_split_the_path_was_solved_on_is_refused(path):
    with pytest.raises(ValueError, match="on these very samples"):
        certify(path, realistic_table(4, 800, seed=1), epsilon=0.05)


def test_path_must_end_with_the_full_policy(path):
    with pytest.raises(ValueError, match="nobody leaves early"):
        certify(path[:-1], realistic_table(4, 100, seed=3), epsilon=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epsilon=0.0), "strictly between 0 and 1"),
        (dict(epsilon=0.1, method="hope"), "unknown method 'hope'"),
        (dict(epsilon=0.1, loss="regret"), "unknown loss 'regret'"),
    ],
)
def test_a_certificate_that_makes_no_sense_is_refused(path, options, message):
    with pytest.raises(ValueError, match=message):
        certify(path, realistic_table(4, 100, seed=3), **options)
