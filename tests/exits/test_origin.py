"""What was made from one model's table is not used on another's, as far as both sides know whose they are."""

from dataclasses import replace

import pytest
from small_tables import costs_of, realistic_table

from exit_plugins import ExitTable, budgeted_curve, certify, policy_path, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.risk import samples_needed

COSTS = costs_of(3)


def table_of(seed: int, name: str | None = "net", weights: str | None = "a") -> ExitTable:
    about = {"model": {"architecture": name}, "weights": weights and 64 * weights}
    return replace(realistic_table(3, 300, seed), about=about)


USES = {
    "certify": lambda made, other: certify(policy_path(made, COSTS, 5), other, 0.2),
    "samples_needed": lambda made, other: samples_needed(policy_path(made, COSTS, 5), other, 0.2),
    "holdout": lambda made, other: solve_thresholds(made, COSTS, budget=3.0, holdout=other),
    "curve": lambda made, other: budgeted_curve(made, other, COSTS, 2, resamples=2),
    "evaluate": lambda made, other: evaluate_policy(solve_thresholds(made, COSTS, budget=3.0), other, resamples=2),
}


@pytest.mark.parametrize("use", USES)
def test_tables_of_another_model_are_refused_wherever_two_meet(use):
    made = table_of(1)
    with pytest.raises(ValueError, match="architecture other and the .* net; .* collect it from the same model"):
        USES[use](made, table_of(2, name="other"))
    if use == "evaluate":  # what a policy does on other weights can be measured
        USES[use](made, table_of(2, weights="b"))
    else:
        with pytest.raises(ValueError, match="model with weights bbb"):
            USES[use](made, table_of(2, weights="b"))
    for unknown in (table_of(2), table_of(2, None, None), replace(table_of(2), about=None)):
        USES[use](made, unknown)
        USES[use](unknown, made)


def test_a_holdout_holds_the_confidences_that_are_solved_for():
    with pytest.raises(ValueError, match="one table holds max_softmax .* the table holds margin"):
        solve_thresholds(table_of(1), COSTS, budget=3.0, holdout=replace(table_of(2), measure="margin"))
