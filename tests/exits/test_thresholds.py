import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ConvExits
from small_tables import awkward_tables, costs_of, naive_run, realistic_table

from exit_plugins import ExitPolicy, ExitTable, certify, evaluate_policy, solve_thresholds
from exit_plugins.exits.thresholds import (
    METHODS,
    methods,
    msdnet_shares,
    msdnet_thresholds,
    pairs,
    policy_path,
    sweep_shares,
)
from exit_plugins.exits.thresholds.pairs import refine
from exit_plugins.exits.thresholds.split import Split, Target

GOLDEN = Path(__file__).parent.parent / "golden/thresholds/msdnet_solver.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Inputs and outputs of MSDNet's released solver for its 39 values of p."""
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file}


def golden_table(golden, split: str) -> ExitTable:
    return ExitTable(golden[f"{split}_conf"], golden[f"{split}_pred"], golden[f"{split}_target"])


# MSDNet's rule


def test_msdnet_thresholds_equal_the_released_solver_bit_for_bit(golden):
    table = golden_table(golden, "val")
    ours = np.stack([msdnet_thresholds(table, shares) for shares in golden["probs"]])
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, golden["T"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_msdnet_thresholds_get_and_spend_what_the_released_evaluation_says(golden, split):
    table = golden_table(golden, split)
    for row, accuracy, flops in zip(golden["T"], golden[f"{split}_acc"], golden[f"{split}_flops"], strict=True):
        ours = naive_run(table, row, golden["flops"])
        assert 100 * ours[0] == pytest.approx(accuracy, abs=1e-9)
        assert ours[1] == pytest.approx(flops, rel=2e-7)  # the release adds in float32


def test_own_shares_lead_to_the_same_thresholds(golden):
    shares = sweep_shares(5, "msdnet")
    # torch's float32 log differs in its last bit between processors, see the next test.
    np.testing.assert_allclose(shares, golden["probs"], rtol=4e-7)
    table = golden_table(golden, "val")
    np.testing.assert_array_equal(np.stack([msdnet_thresholds(table, row) for row in shares]), golden["T"])


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="asks MKL for results that are alike everywhere")
@pytest.mark.slow
def test_shares_equal_the_released_ones_bit_for_bit_in_mkl_compatible_arithmetic(golden):
    script = (
        "import sys; from exit_plugins.exits.thresholds import sweep_shares; "
        "sys.stdout.buffer.write(sweep_shares(5, 'msdnet').tobytes())"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "MKL_CBWR": "COMPATIBLE"}, capture_output=True, check=True
    )
    ours = np.frombuffer(out.stdout, dtype=np.float32).reshape(39, 5)
    np.testing.assert_array_equal(ours, golden["probs"])


@settings(max_examples=150, deadline=None)
@given(awkward_tables(), st.floats(0.05, 3.0))
def test_msdnet_rule_equals_its_loop(case, p):
    table, _ = case
    shares = msdnet_shares(table.num_exits, p)
    n, gone = table.num_samples, set()
    expected = []
    for k in range(table.num_exits - 1):
        ranked = [i for i in sorted(range(n), key=lambda i: (-table.confidence[k, i], i)) if i not in gone]
        ranked = [i for i in ranked if not np.isnan(table.confidence[k, i])]
        count = int(np.floor(np.float32(n) * shares[k]))
        threshold = table.confidence[k, ranked[count - 1]] if 1 <= count <= len(ranked) else np.float32(1e8)
        expected.append(threshold)
        gone |= {i for i in range(n) if table.confidence[k, i] >= threshold}
    sortable = ~np.isnan(table.confidence).any()  # python's sort has no place for NaN
    if sortable:
        np.testing.assert_array_equal(msdnet_thresholds(table, shares), np.float32([*expected, -1e8]))


def test_dyn_perceiver_sweep_is_33_rows_of_shares():
    shares = sweep_shares(4, "dyn_perceiver")
    assert shares.shape == (33, 4)
    np.testing.assert_allclose(shares.sum(1), 1.0, rtol=1e-6)
    first = 0.2 ** np.arange(1, 5) / (0.2 ** np.arange(1, 5)).sum()
    assert shares[0, 0] == pytest.approx(0.85 * first[0], rel=1e-5)


def test_first_msdnet_threshold_rises_along_the_sweep():
    table = realistic_table(4, 500)
    first = [msdnet_thresholds(table, shares)[0] for shares in sweep_shares(4)]
    assert (np.diff(first) >= 0).all()


# Against brute force


def every_outcome(table: ExitTable, costs: np.ndarray) -> list[tuple[float, float]]:
    """(accuracy, cost) of every set of thresholds that can differ."""
    # The largest number there is: whoever is infinitely sure leaves, and nobody else.
    ends = (np.inf, np.finfo(np.float32).max)
    grids = [np.unique(np.append(c[~np.isnan(c)], ends)) for c in table.confidence[:-1]]
    return [naive_run(table, np.array([*t, -np.inf]), costs)[:2] for t in itertools.product(*grids)]


@settings(max_examples=60, deadline=None)
@given(awkward_tables(min_exits=1, max_exits=3, max_samples=9), st.floats(0, 1))
def test_exact_is_the_optimum_for_a_budget(case, place):
    table, costs = case
    outcomes = every_outcome(table, costs)
    # Budgets exactly on what some thresholds spend are the hard ones.
    budget = sorted(cost for _, cost in outcomes)[int(place * (len(outcomes) - 1))]
    policy = solve_thresholds(table, costs, budget=budget * (1 + 1e-12), method="exact")
    best = max(accuracy for accuracy, cost in outcomes if cost <= budget * (1 + 1e-12))
    accuracy, cost, _ = naive_run(table, policy.thresholds, costs)
    assert accuracy == pytest.approx(best)
    assert cost <= budget * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(awkward_tables(min_exits=1, max_exits=3, max_samples=9), st.floats(0, 1))
def test_exact_is_the_cheapest_for_an_accuracy(case, place):
    table, costs = case
    outcomes = every_outcome(table, costs)
    wanted = sorted(accuracy for accuracy, _ in outcomes)[int(place * (len(outcomes) - 1))]
    policy = solve_thresholds(table, costs, accuracy=wanted, method="exact")
    accuracy, cost, _ = naive_run(table, policy.thresholds, costs)
    assert accuracy >= wanted - 1e-12
    assert cost == pytest.approx(min(c for a, c in outcomes if a >= wanted - 1e-12))


@settings(max_examples=60, deadline=None)
@given(awkward_tables(max_exits=4, max_samples=9), st.floats(0, 1))
def test_shared_is_the_best_single_threshold(case, place):
    table, costs = case
    if table.num_exits == 1:
        return
    ends = (np.inf, np.finfo(np.float32).max)
    values = np.unique(np.append(table.confidence[:-1][~np.isnan(table.confidence[:-1])], ends))
    outcomes = [naive_run(table, np.full(table.num_exits, t), costs)[:2] for t in values]
    budget = sorted(cost for _, cost in outcomes)[int(place * (len(outcomes) - 1))] * (1 + 1e-12)
    best = max(accuracy for accuracy, cost in outcomes if cost <= budget)
    policy = solve_thresholds(table, costs, budget=budget, method="shared")
    assert policy.source["accuracy"] >= best - 1e-12
    assert policy.source["cost"] <= budget


def test_lagrangian_is_within_a_third_of_a_point_of_the_optimum_for_three_exits(monkeypatch):
    monkeypatch.setattr(methods, "_OPTIMAL_EXITS", 0)  # as if there were more exits than can be searched whole
    costs, gaps = costs_of(3), []
    for seed in range(6):
        table = realistic_table(3, 600, seed)
        for share in (0.05, 0.1, 0.2, 0.45, 0.7):
            budget = costs[0] + share * (costs[-1] - costs[0])
            found, best = (
                solve_thresholds(table, costs, budget=budget, method=method).source["accuracy"]
                for method in ("lagrangian", "exact")
            )
            assert found <= best
            gaps.append(best - found)
    assert 100 * np.mean(gaps) <= 0.3


@pytest.mark.parametrize("seed", range(10))
def test_default_is_the_optimum_of_small_tables_of_three_exits(seed):
    table, costs = realistic_table(3, 60, seed), costs_of(3)
    outcomes = every_outcome_of_three(table, costs)
    for share in (0.1, 0.35, 0.6):
        budget = costs[0] + share * (costs[-1] - costs[0])
        best = max(accuracy for accuracy, cost in outcomes if cost <= budget)
        assert solve_thresholds(table, costs, budget=budget).source["accuracy"] == pytest.approx(best)
    wanted = 0.9 * table.correct[-1].mean()
    cheapest = min(cost for accuracy, cost in outcomes if accuracy >= wanted)
    assert solve_thresholds(table, costs, accuracy=wanted).source["cost"] == pytest.approx(cheapest)


def every_outcome_of_three(table: ExitTable, costs: np.ndarray) -> list[tuple[float, float]]:
    """(accuracy, cost) of every pair of thresholds that can differ."""
    first, second = (np.append(np.unique(row), np.inf) for row in table.confidence[:2])
    at_first = table.confidence[0] >= first[:, None, None]
    at_second = table.confidence[1] >= second[:, None]
    exits = np.where(at_first, 0, np.where(at_second, 1, 2))
    accuracy = table.correct[exits, np.arange(table.num_samples)].mean(-1)
    return list(zip(accuracy.ravel(), costs[exits].mean(-1).ravel(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_pairs_lead_from_anywhere_to_what_no_pair_improves(seed):
    table, costs = realistic_table(4, 25, seed), costs_of(4)
    split = Split.of(table, costs)
    target = Target(budget=costs[0] + 0.4 * (costs[-1] - costs[0]))
    point = refine(split, split.point(split.everybody_first()), target)
    accuracy, cost, _ = naive_run(table, point.thresholds, costs)
    assert accuracy * 25 == pytest.approx(point.correct) and cost == pytest.approx(point.cost) and cost <= target.budget
    grids = [np.append(np.unique(row), np.inf) for row in table.confidence[:3]]
    for pair in itertools.combinations(range(3), 2):
        for values in itertools.product(*(grids[k] for k in pair)):
            thresholds = point.thresholds.copy()
            thresholds[list(pair)] = values
            other = split.point(thresholds)
            assert not target.met(other.correct, other.cost) or target.score(other) <= target.score(point)


def test_pairs_of_few_cuts_and_then_near_ones_lose_next_to_nothing(monkeypatch):
    costs, gaps = costs_of(4), []
    for seed in range(3):
        table = realistic_table(4, 900, seed)
        for share in (0.1, 0.4):
            budget = costs[0] + share * (costs[-1] - costs[0])
            found = []
            for cuts in (10_000, 100):  # all of them, and far fewer than there are
                monkeypatch.setattr(pairs, "_CUTS", cuts)
                found.append(solve_thresholds(table, costs, budget=budget).source["accuracy"])
            gaps.append(found[0] - found[1])
    assert np.mean(gaps) <= 0.0005  # half an answer of the 900


@settings(max_examples=60, deadline=None)
@given(awkward_tables(min_exits=2, max_exits=5, max_samples=12), st.floats(0, 1), st.integers(0, 99))
def test_line_searches_end_where_no_threshold_alone_helps(case, place, seed):
    table, costs = case
    split, rng = Split.of(table, costs), np.random.default_rng(seed)
    cheapest, fullest = split.point(split.everybody_first()).cost, split.point(split.nobody_early()).cost
    target = Target(budget=cheapest + place * (fullest - cheapest))
    start = split.nobody_early()
    for k in range(table.num_exits - 1):
        start[k] = split.threshold(k, rng.choice(split.cuts[k]))
    point = split.improve(split.point(start), target)
    accuracy, cost, _ = naive_run(table, point.thresholds, costs)
    assert accuracy * table.num_samples == pytest.approx(point.correct) and cost == pytest.approx(point.cost)
    met = target.met(point.correct, point.cost)
    for k in range(table.num_exits - 1):
        for cut in split.cuts[k]:
            thresholds = point.thresholds.copy()
            thresholds[k] = split.threshold(k, cut)
            other = split.point(thresholds)
            if target.met(other.correct, other.cost):
                assert met and target.score(other) <= target.score(point)


def test_any_number_of_exits():
    table, costs = realistic_table(70, 120), costs_of(70)  # more than fit the smallest numbers samples are summed by
    budget = costs[0] + 0.3 * (costs[-1] - costs[0])
    policy = solve_thresholds(table, costs, budget=budget, method="genetic", population=4, generations=1)
    split = Split.of(table, costs)
    point = split.improve(split.point(policy.thresholds), Target(budget=budget))
    accuracy, cost, _ = naive_run(table, point.thresholds, costs)
    assert accuracy * 120 == pytest.approx(point.correct) and cost == pytest.approx(point.cost) and cost <= budget
    assert point.correct / 120 > policy.source["accuracy"]


# What holds for every method

FAST = {"genetic": {"population": 6, "generations": 3}}


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_budget_is_never_exceeded_on_the_split_it_was_solved_on(method, data):
    table, costs = data.draw(awkward_tables(max_exits=3 if method == "exact" else 8))
    cheapest = naive_run(table, np.full(table.num_exits, -np.inf), costs)[1]
    budget = max(cheapest + data.draw(st.floats(0, 1.2)) * (costs[-1] - cheapest), cheapest) * (1 + 1e-12)
    policy = solve_thresholds(table, costs, budget=budget, method=method, **FAST.get(method, {}))
    accuracy, cost, exits = naive_run(table, policy.thresholds, costs)
    assert cost <= budget * (1 + 1e-9)
    assert policy.source["accuracy"] == pytest.approx(accuracy)
    assert policy.source["cost"] == pytest.approx(cost)
    assert policy.choose(table.confidence).tolist() == exits
    assert policy.thresholds[-1] == -np.inf


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_asked_for_is_reached(method):
    table, costs = realistic_table(3, 400), costs_of(3)
    wanted = float(table.correct[-1].mean()) - 0.02
    policy = solve_thresholds(table, costs, accuracy=wanted, method=method, **FAST.get(method, {}))
    accuracy, cost, _ = naive_run(table, policy.thresholds, costs)
    assert accuracy >= wanted
    assert cost < costs[-1]


@pytest.mark.parametrize("method", ["exact", "lagrangian", "shared"])
def test_more_budget_is_never_worse(method):
    table, costs = realistic_table(3, 300, seed=4), costs_of(3)
    found = [
        solve_thresholds(table, costs, budget=b, method=method).source["accuracy"]
        for b in np.linspace(costs[0], costs[-1], 9)
    ]
    slack = 0.004 if method == "lagrangian" else 0.0  # a heuristic's only promise is to be near the optimum
    assert (np.diff(found) >= -slack).all()


@pytest.mark.parametrize("method", METHODS)
def test_budget_below_the_first_exit_names_the_least_possible(method):
    table, costs = realistic_table(3, 50), costs_of(3)
    with pytest.raises(
        ValueError, match=rf"least possible mean cost on this table is {costs[0]:.6g} \(the first exit\)"
    ):
        solve_thresholds(table, costs, budget=0.9 * costs[0], method=method)


def test_samples_that_are_never_sure_raise_the_least_possible_cost():
    table, costs = ExitTable([[np.nan, 0.9], [0.5, 0.5]], [[0, 0], [0, 0]], [0, 0]), np.array([1.0, 3.0])
    with pytest.raises(ValueError, match="least possible mean cost on this table is 2 .*NaN"):
        solve_thresholds(table, costs, budget=1.5)
    assert solve_thresholds(table, costs, budget=2.0).source["cost"] == 2.0


def test_budget_of_the_first_exit_sends_everybody_away_there_on_other_data_too():
    table, costs = realistic_table(4, 200), costs_of(4)
    policy = solve_thresholds(table, costs, budget=costs[0])
    assert policy.thresholds[0] == -np.inf


def test_unreachable_accuracy_names_the_best_found():
    table, costs = realistic_table(3, 200), costs_of(3)
    with pytest.raises(ValueError, match="out of reach: the best that 'exact' found on this table is 0."):
        solve_thresholds(table, costs, accuracy=1.0, method="exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(budget=3.0, accuracy=0.5), "either budget= or accuracy="),
        (dict(), "either budget= or accuracy="),
        (dict(budget=3.0, method="magic"), "unknown method 'magic'"),
        (dict(budget=float("nan")), "cannot be met"),
        (dict(accuracy=90), "fraction between 0 and 1"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_thresholds(realistic_table(3, 20), costs_of(3), **arguments)


@pytest.mark.parametrize("costs", [[1.0, 2.0], [3.0, 2.0, 4.0], [0.0, 1.0, 2.0], [1.0, 2.0, np.inf]])
def test_costs_that_make_no_sense_are_refused(costs):
    with pytest.raises(ValueError, match="cost"):
        solve_thresholds(realistic_table(3, 20), costs, budget=2.0)


def test_empty_split_is_refused():
    empty = ExitTable(np.zeros((3, 0)), np.zeros((3, 0)), np.zeros(0))
    with pytest.raises(ValueError, match="holds no samples"):
        solve_thresholds(empty, costs_of(3), budget=3.0)


def test_a_policy_in_the_table_s_place_is_named():
    policy, table = ExitPolicy([0.5, 0.5, -np.inf]), realistic_table(3, 20)
    for call in (
        lambda: evaluate_policy(table, policy),
        lambda: solve_thresholds(policy, costs_of(3), budget=2.0),
        lambda: policy_path(policy, costs_of(3)),
        lambda: certify([policy], policy, 0.1, 0.1),
    ):
        with pytest.raises(TypeError, match="expected an ExitTable, as collect_exits makes it, got ExitPolicy"):
            call()


def test_exact_refuses_more_than_three_exits():
    with pytest.raises(ValueError, match='takes up to 3 exits and the table has 4; use "lagrangian"'):
        solve_thresholds(realistic_table(4, 20), costs_of(4), budget=3.0, method="exact")
    with pytest.raises(TypeError, match="does not take the option.*max_exits"):
        solve_thresholds(realistic_table(4, 20), costs_of(4), budget=3.0, method="exact", max_exits=4)


def test_unknown_option_of_a_method_is_named():
    with pytest.raises(TypeError, match="method 'shared' does not take the option.*population"):
        solve_thresholds(realistic_table(3, 20), costs_of(3), budget=3.0, method="shared", population=3)


def test_genetic_is_reproducible_and_seeded():
    table, costs = realistic_table(5, 300), costs_of(5)

    def run(seed):
        options = dict(method="genetic", population=12, generations=5, seed=seed)
        return solve_thresholds(table, costs, budget=4.0, **options).thresholds.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_holdout_chooses_among_near_equal_solutions_within_the_budget():
    table, holdout, costs = realistic_table(5, 800, 1), realistic_table(5, 800, 2), costs_of(5)
    budget = costs[0] + 0.3 * (costs[-1] - costs[0])
    alone = solve_thresholds(table, costs, budget=budget)
    chosen = solve_thresholds(table, costs, budget=budget, holdout=holdout)
    assert chosen.source["cost"] <= budget
    assert naive_run(holdout, chosen.thresholds, costs)[0] >= naive_run(holdout, alone.thresholds, costs)[0]
    assert alone.source["accuracy"] - chosen.source["accuracy"] <= 0.02
    assert chosen.source["holdout_samples"]["count"] == 800


def test_policy_says_where_it_comes_from_and_runs_on_its_model_only():
    table, costs = realistic_table(3, 100), costs_of(3)
    model = ConvExits(num_classes=10)
    policy = solve_thresholds(table, costs, budget=4.0, model=model)
    policy.check_model(model)
    assert policy.source["method"] == "lagrangian" and policy.source["target"] == {"budget": 4.0}
    assert policy.source["sha256"] == table.digest()
    with pytest.raises(ValueError, match="made for num_classes 10"):
        policy.check_model(ConvExits(num_classes=5))


def test_path_runs_from_cheap_to_full_and_no_threshold_falls():
    table, costs = realistic_table(4, 500), costs_of(4)
    path = policy_path(table, costs, steps=17)
    thresholds = np.stack([policy.thresholds for policy in path])
    assert (thresholds[1:] >= thresholds[:-1]).all()
    spent = [naive_run(table, t, costs)[1] for t in thresholds]
    assert spent[0] == pytest.approx(costs[0]) and spent[-1] == pytest.approx(costs[-1])
    assert (np.diff(spent) >= 0).all()
    # Evenly spaced: no gap much wider than a step.
    assert np.diff(spent).max() <= 2 * (costs[-1] - costs[0]) / 16
    exits = np.stack([policy.choose(table.confidence) for policy in path])
    assert (np.diff(exits, axis=0) >= 0).all()
