import pytest
from formats import FORMATS
from fuzz import fuzz

COUNT = {"adapter folder": 15}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_in_one_line_or_read_and_saved_again(name, tmp_path):
    if name == "adapter folder":
        pytest.importorskip("peft")
    counts, faults = fuzz(name, COUNT.get(name, 60), seed=0, folder=tmp_path)
    assert not faults
    assert counts["refused"]
