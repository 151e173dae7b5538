import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ConvExits, NestedExits
from small_tables import awkward_tables, naive_run

from exit_plugins import ExitPolicy
from exit_plugins.exits.policy import describe_model

FLOATS = st.floats(width=32, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(awkward_tables(), st.data())
def test_samples_leave_at_the_first_exit_that_is_sure(case, data):
    table, costs = case
    thresholds = data.draw(
        st.lists(FLOATS | st.floats(0, 1, width=32), min_size=table.num_exits, max_size=table.num_exits)
    )
    policy = ExitPolicy(thresholds)
    assert policy.choose(table.confidence).tolist() == naive_run(table, np.float32(thresholds), costs)[2]


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8))
def test_file_gives_every_threshold_back_to_the_last_bit(tmp_path_factory, thresholds):
    path = tmp_path_factory.mktemp("policy") / "p.json"
    policy = ExitPolicy(thresholds)
    policy.save(path)
    np.testing.assert_array_equal(ExitPolicy.load(path).thresholds, policy.thresholds)


def test_nobody_leaves_at_a_closed_exit():
    sure = np.array([[np.inf, 0.9, np.nan], [np.inf, 0.9, 0.9]])
    assert ExitPolicy([np.inf, 0.5, 0]).choose(np.concatenate([sure, sure[:1]])).tolist() == [1, 1, 1]
    assert ExitPolicy([np.inf, np.inf, 0]).choose(np.concatenate([sure, sure[:1]])).tolist() == [2, 2, 2]
    assert ExitPolicy([np.finfo(np.float32).max, 0]).choose(sure).tolist() == [0, 1, 1]


def full_policy() -> ExitPolicy:
    return ExitPolicy(
        [0.7, float("inf"), 0],
        measure="entropy",
        temperatures=[1.5, 1.0, 0.8],
        costs=[1e6, 2e6, 3e6],
        model=describe_model(ConvExits()),
        source={"method": "lagrangian", "samples": 10},
        certificate={"method": "ucb"},
        max_exit=1,
    )


def test_file_gives_every_field_back(tmp_path):
    full_policy().save(tmp_path / "p.json")
    loaded, policy = ExitPolicy.load(tmp_path / "p.json"), full_policy()
    assert loaded.temperatures.tolist() == [1.5, 1.0, 0.8] and loaded.costs.tolist() == [1e6, 2e6, 3e6]
    for name in ("measure", "model", "source", "certificate", "max_exit"):
        assert getattr(loaded, name) == getattr(policy, name)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.update(thresholds=["high", 0, 0]), "threshold 'high' is neither a number"),
    (lambda d: d.update(thresholds=[True, 0, 0]), "threshold True is not a number"),
    (lambda d: d.update(thresholds=[]), "one number per exit"),
    (lambda d: d.update(thresholds=0.5), "not a valid exit policy"),
    (lambda d: d.update(thresholds=[0.5, 0]), "temperatures must be 2"),
    (lambda d: d.pop("thresholds"), "not a valid exit policy"),
    (lambda d: d.update(measure="luck"), "unknown confidence 'luck'"),
    (lambda d: d.update(temperatures=[1, 0, 1]), "temperatures must be 3 positive"),
    (lambda d: d.update(costs=[3, 2, 1]), "never falling"),
    (lambda d: d.update(costs="cheap"), "not a valid exit policy"),
    (lambda d: d.update(version=2), "has version 2, this package reads version 1"),
    (lambda d: d.update(format="other"), "not an exit policy"),
    (lambda d: d.update(treshold=1), "unknown fields: treshold"),
    (lambda d: d.update(model="resnet"), "model must be a mapping"),
    (lambda d: d.update(max_exit=7), "max_exit must be an exit index below 3"),
])  # fmt: skip
def test_hand_edited_file_is_one_clear_line(tmp_path, change, message):
    path = tmp_path / "p.json"
    full_policy().save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        ExitPolicy.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_truncated_file_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "p.json"
    full_policy().save(path)
    path.write_text(path.read_text()[:keep])
    with pytest.raises(ValueError, match="may be cut off") as caught:
        ExitPolicy.load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no policy at .*solve_thresholds"):
        ExitPolicy.load(tmp_path / "p.json")


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.json"
    full_policy().save(path)
    before = path.read_text()
    with pytest.raises(TypeError):
        ExitPolicy([0.5, 0], source={"tensor": torch.ones(1)}).save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_runs_on_the_model_it_was_made_for_only():
    policy = ExitPolicy([0.5, 0.5, 0], model=describe_model(ConvExits()))
    policy.check_model(ConvExits())
    with pytest.raises(ValueError, match="3 thresholds and NestedExits has 4 exits"):
        policy.check_model(NestedExits())
    with pytest.raises(ValueError, match="made for num_classes 5 and the model has 7"):
        policy.check_model(ConvExits(num_classes=7))
    ExitPolicy([0.5, 0.5, 0]).check_model(ConvExits(num_classes=7))


def test_thresholds_by_hand_are_checked():
    assert ExitPolicy([0.5, 0.9]).thresholds.tolist() == [0.5, -np.inf]
    with pytest.raises(ValueError, match="must not be NaN"):
        ExitPolicy([np.nan, 0])
    with pytest.raises(ValueError, match="one number per exit"):
        ExitPolicy([[0.5, 0.1]])
    with pytest.raises(ValueError, match="cannot read confidences of shape"):
        ExitPolicy([0.5, 0]).choose(np.zeros((3, 2)))
