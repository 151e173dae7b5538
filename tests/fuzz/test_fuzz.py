import json
from pathlib import Path

import pytest
from formats import FORMATS
from fuzz import fuzz

COUNT = {"adapter folder": 15}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_in_one_line_or_read_and_saved_again(name, tmp_path):
    if name == "adapter folder":
        pytest.importorskip("peft.utils")
    counts, faults = fuzz(name, COUNT.get(name, 60), seed=0, folder=tmp_path)
    assert not faults
    assert counts["refused"]


def test_the_long_run_covered_every_format_and_found_nothing():
    report = json.loads((Path(__file__).parents[2] / "docs" / "fuzz.json").read_text())
    assert set(report) == set(FORMATS)
    for name, counts in report.items():
        assert counts["mutations"] >= 2000 and counts["fault"] == 0, name
        assert counts["refused"] + counts["accepted"] == counts["mutations"]
