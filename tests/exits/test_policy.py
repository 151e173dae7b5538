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
    (lambda d: d.update(thresholds=["nan", 0, 0]), "threshold 'nan' is neither a number"),
    (lambda d: d.update(thresholds=["0.5", 0, 0]), "threshold '0.5' is neither a number"),
    (lambda d: d.update(thresholds=[True, 0, 0]), "'True' is none"),
    (lambda d: d.update(thresholds=[[0.5], 0, 0]), "is none"),
    (lambda d: d.update(thresholds=[10**400, 0, 0]), "is none"),
    (lambda d: d.update(thresholds=[1e300, 0, 0]), "compared as float32"),
    (lambda d: d.update(thresholds=[]), "one number per exit"),
    (lambda d: d.update(thresholds=0.5), "one number per exit"),
    (lambda d: d.update(thresholds={"0": 0.5}), "one number per exit"),
    (lambda d: d.update(thresholds=[0.5, 0]), "temperatures must be 2"),
    (lambda d: d.pop("thresholds"), "no fields thresholds"),
    (lambda d: d.pop("temperatures"), "no fields temperatures"),
    (lambda d: d.update(measure="luck"), "unknown confidence 'luck'"),
    (lambda d: d.update(measure=["entropy"]), "unknown confidence"),
    (lambda d: d.update(temperatures=[1, 0, 1]), "temperatures must be 3 numbers"),
    (lambda d: d.update(temperatures=[1, 1e-320, 1]), "temperatures must be 3 numbers"),
    (lambda d: d.update(temperatures=["1", 1, 1]), "temperatures must be one number per exit"),
    (lambda d: d.update(temperatures=[True, 1, 1]), "temperatures must be one number per exit"),
    (lambda d: d.update(temperatures="111"), "temperatures must be a list"),
    (lambda d: d.update(costs=[3, 2, 1]), "never falling"),
    (lambda d: d.update(costs=["1", 2, 3]), "costs must be one number per exit"),
    (lambda d: d.update(costs="cheap"), "costs must be a list"),
    (lambda d: d.update(version=2), "has version 2, this package reads version 1"),
    (lambda d: d.update(version=1.0), "has version 1.0"),
    (lambda d: d.update(version=True), "has version True"),
    (lambda d: d.update(format="other"), "not a readable policy"),
    (lambda d: d.update(treshold=1), "unknown fields treshold"),
    (lambda d: d.update(model="resnet"), "model must be a mapping"),
    (lambda d: d["model"].update(num_exits=3.0), "'num_exits'.* must be a whole number"),
    (lambda d: d["model"].update(num_exits=4), "do not fit a model with 4 exits"),
    (lambda d: d["model"].update(classes=["a"]), "names 1 classes of 5"),
    (lambda d: d["model"].update(weights="abc"), "must be a SHA-256"),
    (lambda d: d.update(source=None), "source must be a mapping"),
    (lambda d: d["source"].update(samples={"count": "10"}), "must be a count"),
    (lambda d: d["source"].update(cost="cheap"), "'cost'.* must be a number"),
    (lambda d: d["source"].update(shares=[1.0]), "holds 1 shares for 3 exits"),
    (lambda d: d["certificate"].update(epsilon=2), "'epsilon'.* must be a number from 0 to 1"),
    (lambda d: d.update(max_exit=7), "max_exit must be an exit index below 3"),
    (lambda d: d.update(max_exit=True), "max_exit must be an exit index below 3"),
    (lambda d: d.update(max_exit=1.0), "max_exit must be an exit index below 3"),
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"measure": "entropy"', '"measure": "entropy", "measure": "margin"', "the key 'measure' comes twice"),
        ('"method": "lagrangian"', '"method": "lagrangian", "cost": NaN', "NaN is not a number"),
        ('"method": "lagrangian"', '"method": "lagrangian", "x": [Infinity]', "Infinity is not a number"),
        ('"method": "lagrangian"', '"method": "lagrangian", "x": 1e999', "1e999 is out of range"),
        ('"method": "lagrangian"', '"method": "lagrangian", "x": ' + "[" * 60 + "]" * 60, "nested too deeply"),
        ('"method": "lagrangian"', '"method": "lagrangian", "x": ' + "[" * 100_000, "nested too deeply"),
        ('"method": "lagrangian"', '"method": "\xff"', "it is not text"),
    ],
)
def test_json_that_is_no_policy_is_one_clear_line(tmp_path, old, new, message):
    path = tmp_path / "p.json"
    full_policy().save(path)
    assert old in path.read_text()
    path.write_bytes(path.read_text().replace(old, new).encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        ExitPolicy.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(source={"target": {"budget": float("inf")}}),
        dict(source={"accuracy": float("nan")}),
        dict(source={1: 2}),
        dict(certificate={"x": torch.ones(1)}),
        dict(temperatures=[1e-320, 1.0]),
        dict(temperatures=["1", 1.0]),
        dict(costs=[True, 2.0]),
        dict(thresholds=["0.5", 0]),
        dict(thresholds=np.array(["0.5", "0"])),
        dict(thresholds=[True, False]),
        dict(thresholds=[0.5 + 1j, 0]),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_when_made(wrong):
    with pytest.raises((ValueError, TypeError)):
        ExitPolicy(**({"thresholds": [0.5, 0]} | wrong))


def test_policy_that_was_spoiled_is_not_saved(tmp_path):
    policy = ExitPolicy([0.5, 0], source={"cost": 1.0})
    policy.source["cost"] = float("nan")
    with pytest.raises(ValueError, match=r"source\['cost'\] is nan"):
        policy.save(tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()
    with pytest.raises(ValueError, match="read-only"):
        policy.thresholds[0] = 0.1


def test_numbers_of_any_kind_make_the_same_policy(tmp_path):
    made = [
        ExitPolicy(kind([0.25, 0.5, 1]), source={"cost": np.float32(2), "shares": np.array([0.5, 0.5, 0])})
        for kind in (list, tuple, np.array, np.float32, torch.tensor)
    ]
    for policy in made:
        policy.save(tmp_path / "p.json")
        assert ExitPolicy.load(tmp_path / "p.json").thresholds.tolist() == [0.25, 0.5, -np.inf]
        assert policy.source == {"cost": 2.0, "shares": [0.5, 0.5, 0.0]}


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
