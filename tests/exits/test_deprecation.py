"""Old names answer for one release, with the same and with a warning that says what to write instead."""

import importlib

import numpy as np
import pytest
import torch
from small_models import ConvExits
from small_tables import costs_of, realistic_table

from exit_plugins import AdaptiveModel, ExitPolicy, budgeted_curve, solve_thresholds
from exit_plugins.exits import export


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("digests", "SampleRecord", "samples"),
        ("table", "collect_exits", "collecting"),
        ("evaluation", "cka", "similarity"),
        ("evaluation", "calibration", "calibration"),
        ("thresholds", "check_costs", "costs"),
        ("thresholds", "mean_cost", "costs"),
    ],
)
def test_what_moved_is_found_where_it_was(old, name, new):
    module = importlib.import_module(f"exit_plugins.exits.{old}")
    with pytest.warns(FutureWarning, match=f"{old}.{name} goes in the next release; import .*{new}.{name}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"exit_plugins.exits.{new}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_copies_in_a_point_of_a_curve_are_read_where_they_come_from():
    val, costs = realistic_table(3, 200, 1), costs_of(3)
    point = budgeted_curve(val, realistic_table(3, 200, 2), costs, [costs[1]])[0]
    with pytest.warns(FutureWarning, match="BudgetPoint.thresholds goes in the next release; read point.policy.thr"):
        np.testing.assert_array_equal(point.thresholds, point.policy.thresholds)
    with pytest.warns(FutureWarning, match="read point.result.shares"):
        np.testing.assert_array_equal(point.shares, point.result.shares)
    with pytest.warns(FutureWarning, match="source..cost"):
        assert point.solved_cost == point.policy.source["cost"]
    with pytest.raises(AttributeError, match="'BudgetPoint' object has no attribute 'nothing'"):
        point.nothing  # noqa: B018


def test_options_of_the_solver_that_went_have_no_effect():
    table, costs = realistic_table(4, 300), costs_of(4)
    with pytest.warns(FutureWarning, match="the option keep of method 'lagrangian' goes .* no effect"):
        old = solve_thresholds(table, costs, budget=costs[1], keep=1)
    new = solve_thresholds(table, costs, budget=costs[1])
    np.testing.assert_array_equal(old.thresholds, new.thresholds)
    assert old.source == new.source
    with pytest.raises(TypeError, match="does not take the option"):
        solve_thresholds(table, costs, budget=costs[1], method="shared", keep=1)


def test_a_model_times_its_segments_under_the_old_name_too():
    adaptive = AdaptiveModel(ConvExits(), ExitPolicy([0.5] * 3))
    with pytest.warns(FutureWarning, match="AdaptiveModel.measure goes in the next release; call time_segments"):
        times = adaptive.measure(torch.randn(2, 3, 8, 8), repeats=1)
    assert adaptive.times is times


def test_the_runtime_of_an_export_was_its_format(tmp_path):
    with (
        pytest.warns(FutureWarning, match="the argument format of export_segments goes .* write runtime="),
        pytest.raises(ValueError, match="unknown runtime 'tflite'; choose one of onnx, openvino"),
    ):
        export.export_segments(ConvExits(), ExitPolicy([0.5] * 3), tmp_path / "new", (3, 8, 8), format="tflite")
    with pytest.warns(FutureWarning, match="import exit_plugins.exits.export.RUNTIMES"):
        assert export.FORMATS is export.RUNTIMES
