"""The record: saved and loaded the same, refused when damaged, cut into parts."""

import zipfile

import numpy as np
import pytest
from small_runs import make_data, make_model, same
from torch.utils.data import DataLoader

from exit_plugins import ExitTable, collect_exits


def test_save_and_load_give_the_same_table(tmp_path):
    table = collect_exits(make_model(), DataLoader(make_data(), 8), measure="entropy", keep_logits=True)
    table.save(tmp_path / "t.npz")
    loaded = ExitTable.load(tmp_path / "t.npz")
    assert same(table, loaded) and loaded.measure == "entropy" and loaded.temperatures == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"hello", lambda b: b""])
def test_damaged_table_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "t.npz"
    collect_exits(make_model(), DataLoader(make_data(), 8)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a readable exit table"):
        ExitTable.load(path)
    with pytest.raises(FileNotFoundError, match="no exit table at"):
        ExitTable.load(tmp_path / "none.npz")


def rewrite(path, change) -> None:
    """The members of a table's file, changed, in a file whose own checksums are in order."""
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    change(members)
    np.savez(path.open("wb"), **members)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("logits"), "checksum does not fit"),
        (lambda m: m.pop("sample"), "checksum does not fit"),
        (lambda m: m.update(logit=m.pop("logits")), "unknown fields: logit"),
        (lambda m: m.update(measure=np.array("luck")), "checksum does not fit"),
        (lambda m: m.update(format=np.array("exit_plugins.table/3")), "its format is exit_plugins.table/3"),
        (lambda m: m.pop("target"), "checksum does not fit"),
        (lambda m: m.pop("format"), "lacks 'format'"),
    ],
)
def test_file_whose_members_were_changed_is_refused(tmp_path, change, message):
    path = tmp_path / "t.npz"
    collect_exits(make_model(), DataLoader(make_data(), 8), keep_logits=True).save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        ExitTable.load(path)


def test_name_flipped_in_the_directory_does_not_drop_the_logits(tmp_path):
    path = tmp_path / "t.npz"
    collect_exits(make_model(), DataLoader(make_data(), 8), keep_logits=True).save(path)
    whole = path.read_bytes()
    name = whole.rindex(b"logits.npy")
    path.write_bytes(whole[:name] + b"mogits.npy" + whole[name + 10 :])
    with pytest.raises(ValueError, match="not a readable exit table"):
        ExitTable.load(path)


def earlier(path, **changes) -> None:
    """A file as the version before wrote it."""
    fields = dict(
        format=np.array("exit_plugins.table/1"),
        measure=np.array("max_softmax"),
        temperatures=np.ones(2),
        confidence=np.full((2, 4), 0.5, np.float32),
        prediction=np.zeros((2, 4), np.int64),
        target=np.zeros(4, np.int64),
    )
    np.savez(path.open("wb"), **(fields | changes))


def test_file_of_the_version_before_is_read_and_checked(tmp_path):
    path = tmp_path / "t.npz"
    earlier(path)
    assert len(ExitTable.load(path)) == 4
    for changes, message in [
        (dict(measure=np.array("luck")), "unknown confidence 'luck'"),
        (dict(target=np.array([0.0, 1, 2, 0.5])), "its target are float64"),
        (dict(prediction=np.zeros((2, 4), np.float32)), "its prediction are float32"),
        (dict(confidence=np.zeros((2, 4))), "its confidence are float64"),
        (dict(logitz=np.zeros(3)), "unknown fields: logitz"),
        (dict(temperatures=np.array([1.0, 1e-320])), "temperatures must be 2 numbers"),
        (dict(measure=np.array(object(), dtype=object)), "not a readable exit table"),
    ]:
        earlier(path, **changes)
        with pytest.raises(ValueError, match=message):
            ExitTable.load(path)


def test_archive_of_something_else_is_one_clear_line(tmp_path):
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("format.npy", b"\x93NUMPY\x01\x00\xff\xff")
    with pytest.raises(ValueError, match="not a readable exit table") as caught:
        ExitTable.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(target=[0.5, 1, 0]),
        dict(target=[np.nan, 1, 0]),
        dict(target=["a", "b", "c"]),
        dict(prediction=[[0, 1, 2], [0, 1, 2.5]]),
        dict(target=np.array([2**64 - 1, 0, 0], np.uint64)),
        dict(measure="luck"),
        dict(measure=3),
        dict(temperatures=(1.0, 0.0)),
        dict(temperatures=(1.0, True)),
        dict(temperatures=(1.0, "1")),
        dict(temperatures=(1e-320, 1.0)),
        dict(temperatures=(float("nan"), 1.0)),
        dict(confidence=[["a", "b", "c"]] * 2),
        dict(logits=np.zeros((2, 3, 4), int)),
    ],
)
def test_table_of_what_is_no_class_or_confidence_is_refused(wrong):
    fields = dict(confidence=np.zeros((2, 3)), prediction=np.zeros((2, 3)), target=np.zeros(3))
    with pytest.raises(ValueError):
        ExitTable(**(fields | wrong))


def test_saved_logits_of_any_model_make_a_table():
    logits = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float16)
    table = ExitTable.from_logits(list(logits), np.zeros(20))
    assert table.confidence.shape == (3, 20) and table.confidence.dtype == np.float32
    np.testing.assert_array_equal(table.prediction, logits.argmax(-1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(exits, samples\)"):
        ExitTable(np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="does not fit 3 samples"):
        ExitTable(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="holds no logits"):
        ExitTable(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3)).with_confidence("margin")


def test_split_parts_are_disjoint_and_whole():
    table = ExitTable(np.arange(10)[None], np.zeros((1, 10)), np.zeros(10))
    first, second = table.split(0.3, seed=1)
    assert len(first) == 3 and sorted([*first.confidence[0], *second.confidence[0]]) == list(range(10))
