from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import ConvExits, settle
from small_tables import costs_of, realistic_table

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, certify, exit_costs, solve_thresholds
from exit_plugins.exits.control import BudgetController, ExitRateMonitor, cap_policy
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.thresholds import policy_path


def stream(controller: BudgetController, table: ExitTable, batch: int = 32) -> None:
    for start in range(0, table.num_samples, batch):
        part = table.subset(np.arange(start, min(start + batch, table.num_samples)))
        controller.update(controller.policy.choose(part.confidence))


def harder(table: ExitTable, by: float) -> ExitTable:
    """The same samples with every confidence lowered: what blur or noise does to a network."""
    odds = np.log(table.confidence / (1 - table.confidence)) - by
    return ExitTable(1 / (1 + np.exp(-odds)), table.prediction, table.target)


@pytest.fixture(scope="module")
def path() -> list[ExitPolicy]:
    return policy_path(realistic_table(4, 1500, seed=1), costs_of(4), steps=17)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0, 8.0])
def test_mean_cost_stays_within_two_percent_of_the_budget_on_a_shifted_stream(path, shift):
    costs = costs_of(4)
    budget = costs[0] + 0.4 * (costs[-1] - costs[0])
    test = harder(realistic_table(4, 6000, seed=2), shift)
    fixed = min(path, key=lambda p: abs(p.source["cost"] - budget)).choose(test.confidence)
    controller = BudgetController(path, budget)
    stream(controller, test)
    assert controller.num_samples == 6000
    assert controller.mean_cost == pytest.approx(budget, rel=0.02)
    if shift:  # the shift does move the cost of fixed thresholds
        assert costs[fixed].mean() != pytest.approx(budget, rel=0.02)


def test_deviation_never_exceeds_the_stated_bound_even_for_a_stream_that_answers_to_the_controller(path):
    costs = costs_of(4)
    budget = costs[0] + 0.3 * (costs[-1] - costs[0])
    rng = np.random.default_rng(0)
    controller = BudgetController(path, budget, gain=0.05)
    for _ in range(400):
        # Whoever sends the inputs knows the thresholds: all as hard as can be, or all easy, in runs.
        level = 0.0 if rng.random() < 0.7 else 1.0
        controller.update(controller.policy.choose(np.full((4, 16), level)))
        assert abs(controller.mean_cost - budget) <= controller.bound(controller.num_samples, 16) + 1e-9
    assert controller.bound(6400, 16) < 0.02 * budget
    assert controller.mean_cost == pytest.approx(budget, rel=0.02)


def test_a_slowdown_attack_on_a_real_model_does_not_break_the_budget():
    """Gradient steps on the images that minimise every exit's confidence, as DeepSloth does, against the controller."""
    model = settle(ConvExits(num_classes=5), torch.randn(64, 3, 16, 16))
    costs = exit_costs(model, (3, 16, 16)).macs
    clean = torch.randn(300, 3, 16, 16)
    with torch.no_grad():
        table = ExitTable.from_logits([z * 5 for z in model.forward_exits(clean)], torch.zeros(300))
    model.heads.requires_grad_(False)
    for head in model.heads:
        head.weight *= 5
        head.bias *= 5
    attacked = clean.clone()
    for _ in range(5):
        attacked.requires_grad_(True)
        sure = sum(z.softmax(-1).amax(-1).sum() for z in model.forward_exits(attacked)[:-1])
        (step,) = torch.autograd.grad(sure, attacked)
        attacked = (attacked - 0.2 * step.sign()).detach()
    path = policy_path(table, costs, steps=33, method="shared")
    budget = float(costs[0] + 0.4 * (costs[-1] - costs[0]))
    fixed = min(path, key=lambda p: abs(p.source["cost"] - budget))
    spent = costs[AdaptiveModel(model, fixed)(attacked).exit_index].mean()
    assert spent > 1.05 * budget  # the attack works on fixed thresholds
    controller = BudgetController(path, budget)
    adaptive = AdaptiveModel(model, controller.policy)
    for _ in range(8):
        for images in attacked.split(30):
            adaptive.policy = controller.policy
            controller.update(adaptive(images).exit_index)
    assert controller.mean_cost == pytest.approx(budget, rel=0.02)
    assert controller.drift().psi > 0.1


def test_cap_holds_for_every_sample_nan_included():
    confidence = np.array([[0.1, np.nan, 0.9], [0.1, np.nan, 0.1], [0.1, np.nan, 0.1], [0.5, 0.5, 0.5]])
    policy = ExitPolicy([0.8, 0.8, 0.8, 0], costs=[1, 2, 3, 4])
    assert policy.choose(confidence).tolist() == [3, 3, 0]
    assert cap_policy(policy, max_exit=1).choose(confidence).tolist() == [1, 1, 0]
    assert cap_policy(policy, max_cost=3.5).last_exit == 2
    with pytest.raises(ValueError, match="below the first exit, which costs 1"):
        cap_policy(policy, max_cost=0.5)
    with pytest.raises(ValueError, match="max_exit must be an exit index below 4"):
        cap_policy(policy, max_exit=4)


def test_capped_model_never_runs_deeper_segments():
    from small_models import CountedRows

    model = settle(ConvExits(), torch.randn(16, 3, 16, 16))
    images = torch.randn(6, 3, 16, 16)
    images[2] = float("nan")
    with CountedRows(model) as counted, pytest.warns(RuntimeWarning, match="1 of 6 samples have NaN logits"):
        out = AdaptiveModel(model, ExitPolicy([2.0, 2.0, 0], max_exit=1))(images)
    assert counted.rows == [6, 6, 0]
    assert out.exit_index.tolist() == [1] * 6


def test_cap_survives_the_policy_file(tmp_path):
    cap_policy(ExitPolicy([0.5, 0.5, 0]), max_exit=1).save(tmp_path / "p.json")
    assert ExitPolicy.load(tmp_path / "p.json").last_exit == 1


def test_capped_controller_stays_below_the_cap(path):
    costs = costs_of(4)
    controller = BudgetController(path, budget=0.9 * costs[2], max_exit=2)
    table = realistic_table(4, 4000, seed=3)
    stream(controller, harder(table, 3.0))
    assert all(policy.last_exit <= 2 for policy in controller.path)
    assert controller.mean_cost == pytest.approx(0.9 * costs[2], rel=0.02)
    with pytest.raises(ValueError, match="cannot be held between"):
        BudgetController(path, budget=costs[3], max_exit=2)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_a_capped_policy_records_what_it_does_itself(path, last):
    table = realistic_table(4, 1500, seed=1)
    for policy in path:
        capped = cap_policy(policy, max_exit=last)
        result = evaluate_policy(capped, table)
        np.testing.assert_allclose(capped.source["shares"], result.shares, atol=1e-12)
        assert capped.source["cost"] == pytest.approx(result.cost, rel=1e-12)
        assert capped.source.get("accuracy", result.accuracy) == result.accuracy  # or it is not known
    assert cap_policy(path[8], 3).source == path[8].source
    assert cap_policy(cap_policy(path[8], 1), 2).choose(np.full((4, 1), np.nan)).tolist() == [1]
    by_hand = ExitPolicy([0.5, 0.5, 0], source={"accuracy": 0.9, "cost": 2.0, "method": "exact"})
    assert cap_policy(by_hand, 1).source == {"method": "exact"}
    measured = replace(path[8], source={**path[8].source, "latency": {"batch_size": 8}})
    assert "cost" not in cap_policy(measured, 1).source


@pytest.mark.parametrize("method", ["lagrangian", "exact", "shared", "msdnet"])
def test_solving_under_a_cap_is_solving_for_the_exits_up_to_it(method):
    table, costs = realistic_table(4, 200, seed=1), costs_of(4)
    table = replace(table, confidence=np.where(np.arange(200) % 20 == 3, np.nan, table.confidence))
    first = ExitTable(table.confidence[:3], table.prediction[:3], table.target)
    for target in ({"budget": 3.2}, {"accuracy": float(first.correct[-1].mean())}):
        capped = solve_thresholds(table, costs, method=method, max_exit=2, **target)
        alone = solve_thresholds(first, costs[:3], method=method, **target)
        assert capped.thresholds.tolist() == [*alone.thresholds, -np.inf] and capped.last_exit == 2
        result = evaluate_policy(capped, table)
        assert result.accuracy == capped.source["accuracy"] == alone.source["accuracy"]
        assert result.cost == pytest.approx(capped.source["cost"]) and result.shares.tolist() == capped.source["shares"]
    highest = float(table.correct[3].mean())
    assert highest > first.correct.mean(1).max() + 0.02
    with pytest.raises(ValueError, match="up to exit 1 is"):
        solve_thresholds(table, costs, accuracy=highest, method=method, max_exit=0)
    with pytest.raises(ValueError, match="max_exit must be an exit index below 4, got 4"):
        solve_thresholds(table, costs, budget=3.0, max_exit=4)


def test_drift_of_a_capped_controller_is_quiet_on_its_own_samples(path):
    controller = BudgetController(path, budget=2.5, max_exit=1, window=1500)
    stream(controller, realistic_table(4, 1500, seed=1))
    drift = controller.drift()
    assert drift.psi < 0.05 and drift.p_value > 1e-3 and not drift.expected[2:].any()


def test_a_path_runs_from_cheap_to_full(path):
    with pytest.raises(ValueError, match="under which nobody leaves early, the cheapest first"):
        BudgetController(path[::-1], budget=2.5)
    mixed = [path[0], path[8], path[4], path[-1]]
    table = realistic_table(4, 300, seed=2)
    for use in (lambda p: BudgetController(p, budget=2.5), lambda p: certify(p, table, 0.1)):
        with pytest.raises(ValueError, match="policy 2 costs .* of policy 1; sort it"):
            use(mixed)
        use(sorted(mixed, key=lambda policy: policy.source["cost"]))
    with pytest.raises(ValueError, match="of one model and the same costs"):
        BudgetController([*path[:-1], replace(path[-1], costs=2 * path[-1].costs)], budget=2.5)
    BudgetController([cap_policy(policy, 2) for policy in path], budget=2.5)


def test_drift_is_quiet_on_the_same_distribution_and_loud_on_another(path):
    policy, test = path[12], realistic_table(4, 3000, seed=5)
    for table, loud in ((test, False), (harder(test, 1.5), True)):
        monitor = ExitRateMonitor(policy.source["shares"], policy.source["samples"]["count"], window=2000)
        exits = policy.choose(table.confidence)
        for part in np.split(exits, 30):
            monitor.update(part)
        report = monitor.report()
        assert report.samples == 2000
        np.testing.assert_allclose(report.observed, np.bincount(exits[-2000:], minlength=4) / 2000)
        assert (report.psi > 0.25) == loud
        assert (report.p_value < 1e-6) == loud


def test_controller_and_monitor_refuse_what_makes_no_sense(path):
    with pytest.raises(ValueError, match="at least two policies with costs"):
        BudgetController([ExitPolicy([0.5, 0])], budget=1.0)
    with pytest.raises(ValueError, match="cannot be held between"):
        BudgetController(path, budget=0.1)
    controller = BudgetController(path, budget=4.0)
    with pytest.raises(ValueError, match="exit indices"):
        controller.update(np.array([0, 7]))
    controller.update(np.array([], dtype=int))
    assert np.isnan(controller.mean_cost)
    with pytest.raises(ValueError, match="no samples seen yet"):
        controller.drift()
