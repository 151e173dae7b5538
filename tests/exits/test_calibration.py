import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from small_tables import realistic_table

from exit_plugins import ExitTable
from exit_plugins.exits.calibration import calibration


def test_expected_calibration_error_equals_its_definition():
    table = realistic_table(2, 500)
    for k, found in enumerate(calibration(table, bins=10)):
        ece = 0.0
        for b in range(10):
            members = (table.confidence[k] > b / 10) & (table.confidence[k] <= (b + 1) / 10)
            if members.any():
                gap = abs(table.confidence[k][members].mean() - table.correct[k][members].mean())
                ece += members.mean() * gap
        assert found.ece == pytest.approx(ece, rel=1e-5)
        assert found.auroc == pytest.approx(roc_auc_score(table.correct[k], table.confidence[k]))


def test_risk_coverage_area_equals_its_definition_and_does_not_depend_on_the_order_of_ties():
    table = realistic_table(1, 60)
    order = np.argsort(-table.confidence[0])
    errors = [np.mean(~table.correct[0][order[: i + 1]]) for i in range(60)]
    assert calibration(table)[0].aurc == pytest.approx(np.mean(errors))
    tied = ExitTable(np.full((1, 4), 0.5), [[0, 0, 1, 1]], [0, 0, 0, 0])
    assert calibration(tied)[0].aurc == pytest.approx(0.5)
    assert calibration(tied.subset(np.array([3, 1, 0, 2])))[0].aurc == pytest.approx(0.5)


def test_failure_prediction_is_undefined_when_all_are_right():
    table = ExitTable([[0.2, 0.9]], [[1, 1]], [1, 1])
    assert np.isnan(calibration(table)[0].auroc)
    assert calibration(table)[0].to_dict()["auroc"] is None
