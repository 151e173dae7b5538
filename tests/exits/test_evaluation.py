import numpy as np
import pytest
from small_tables import costs_of, naive_run, realistic_table

from exit_plugins import ExitPolicy, ExitTable, anytime_curve, budgeted_curve
from exit_plugins.exits.evaluation import bootstrap_interval, ensemble_curve, evaluate_policy


def test_anytime_curve_is_the_accuracy_of_each_exit():
    table, costs = realistic_table(4, 300), costs_of(4)
    points = anytime_curve(table, costs)
    for k, point in enumerate(points):
        assert point.accuracy == np.mean([table.prediction[k, i] == table.target[i] for i in range(300)])
        assert point.cost == costs[k] and point.exit_index == k
        assert point.interval[0] < point.accuracy < point.interval[1]


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    right = np.random.default_rng(0).random(2000) < 0.8
    low, high = bootstrap_interval(right, level=0.95, resamples=2000)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert low == pytest.approx(right.mean() - half, abs=0.002)
    assert high == pytest.approx(right.mean() + half, abs=0.002)


def test_bootstrap_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0.7 <= high
        for low, high in (bootstrap_interval(rng.random(200) < 0.7, 0.9, 300, seed) for seed in range(300))
    ]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.05)


def test_chance_with_the_same_shares_is_the_mean_over_random_assignments():
    table, costs = realistic_table(3, 250), costs_of(3)
    result = evaluate_policy(ExitPolicy([0.8, 0.6, 0]), table, costs)
    rng = np.random.default_rng(0)
    shuffled = [table.correct[rng.permutation(result.exits), np.arange(250)].mean() for _ in range(4000)]
    assert result.random_accuracy == pytest.approx(np.mean(shuffled), abs=0.002)
    assert result.random_accuracy < result.accuracy
    assert result.to_dict()["random_accuracy"] == result.random_accuracy
    # Everybody at one exit: nothing is left to chance.
    everybody = evaluate_policy(ExitPolicy([-1.0, -1.0, -1.0]), table, costs)
    assert everybody.random_accuracy == pytest.approx(everybody.accuracy)
    (point,) = budgeted_curve(table, table, costs, [float(costs.mean())])
    assert point.to_dict()["random_accuracy"] == point.result.random_accuracy


def test_policy_result_equals_the_sample_by_sample_run():
    table, costs = realistic_table(3, 250, num_classes=4), costs_of(3)
    policy = ExitPolicy([0.8, 0.6, 0])
    result = evaluate_policy(policy, table, costs)
    accuracy, cost, exits = naive_run(table, policy.thresholds, costs)
    assert (result.accuracy, result.exits.tolist()) == (accuracy, exits)
    assert result.cost == pytest.approx(cost)
    exits = np.array(exits)
    np.testing.assert_allclose(result.shares, [(exits == k).mean() for k in range(3)])
    for c, shares, class_accuracy in zip(result.classes, result.class_shares, result.class_accuracy, strict=True):
        members = table.target == c
        np.testing.assert_allclose(shares, [(exits[members] == k).mean() for k in range(3)])
        assert class_accuracy == pytest.approx(result.correct[members].mean())
    for k in range(3):
        assert result.exit_accuracy[k] == pytest.approx(result.correct[exits == k].mean())


def test_policy_is_not_evaluated_on_confidences_it_was_not_made_for():
    logits = np.random.default_rng(0).normal(size=(2, 20, 5))
    table = ExitTable.from_logits(logits, np.zeros(20), measure="entropy")
    with pytest.raises(ValueError, match="thresholds are for max_softmax .* table holds entropy"):
        evaluate_policy(ExitPolicy([0.5, 0]), table)


def test_budgeted_curve_reports_the_test_split_beside_the_target():
    val, test, costs = realistic_table(4, 400, 1), realistic_table(4, 500, 2), costs_of(4)
    budgets = np.linspace(costs[0], costs[-1], 5)
    for point, budget in zip(budgeted_curve(val, test, costs, budgets), budgets, strict=True):
        accuracy, cost, _ = naive_run(test, point.policy.thresholds, costs)
        assert point.budget == budget and point.policy.source["cost"] <= budget
        assert point.accuracy == pytest.approx(accuracy) and point.cost == pytest.approx(cost)
        assert point.policy.source["cost"] == pytest.approx(naive_run(val, point.policy.thresholds, costs)[1])
    counted = budgeted_curve(val, test, costs, 5, method="shared")
    assert [p.budget for p in counted] == budgets.tolist()


def test_empty_table_and_tables_of_two_models_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        anytime_curve(ExitTable(np.zeros((2, 0)), np.zeros((2, 0)), np.zeros(0)))
    with pytest.raises(ValueError, match="not of one model"):
        budgeted_curve(realistic_table(3, 9), realistic_table(4, 9), costs_of(3), 3)


def test_ensemble_curve_weighs_exits_by_their_cost():
    rng = np.random.default_rng(0)
    logits, target, costs = rng.normal(size=(3, 50, 6)) * 2, rng.integers(6, size=50), np.array([1.0, 2.0, 5.0])
    table = ExitTable.from_logits(logits, target)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for k, point in enumerate(ensemble_curve(table, costs)):
        mean = (costs[: k + 1, None, None] * p[: k + 1]).sum(0) / costs[: k + 1].sum()
        assert point.accuracy == pytest.approx((mean.argmax(-1) == target).mean())
        np.testing.assert_allclose(table.running_ensemble(costs).confidence[k], mean.max(-1), rtol=1e-5)
