import json
import zlib

import pytest

from exit_plugins.exits.reading import reading, strict_json, text_lines


class FromElsewhere(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (zlib.error("Error -3 while decompressing"), "error: Error -3 while decompressing"),
        (KeyError("thresholds"), "it lacks 'thresholds'"),
        (EOFError(), "EOFError"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "MemoryError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "it is not text"),
        (OSError(13, "Permission denied"), "Permission denied"),
        (FromElsewhere("one\ntwo"), "FromElsewhere: one"),
        (ValueError("x" * 500 + "\nmore"), "x" * 200 + "..."),
    ],
)
def test_whatever_goes_wrong_is_one_line(tmp_path, error, cause):
    path = tmp_path / "a.bin"
    path.touch()
    with pytest.raises(ValueError) as caught, reading(path, "thing", "write it again"):
        raise error
    assert str(caught.value).startswith(f"{path} is not a readable thing (") and cause in str(caught.value)
    assert str(caught.value).endswith("); write it again.") and "\n" not in str(caught.value)


def test_missing_file_and_missing_package_stay_what_they_are(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="no thing at .*; make one."),
        reading(tmp_path / "a", "thing", "x", "make one"),
    ):
        pass
    with pytest.raises(ModuleNotFoundError), reading(tmp_path, "thing", "x"):
        raise ModuleNotFoundError("no module")
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "thing", "x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[Infinity]", "[-Infinity]", "[1e999]", "{", "", "[" * 100_000, b"\xff"]
)
def test_json_that_readers_disagree_about_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        strict_json(text)


def test_json_is_read_as_it_is_elsewhere():
    text = '{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"c": -1e-3}}'
    assert strict_json(text) == json.loads(text) == strict_json(text.encode())


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Some editors begin every text in UTF-8 with one."""
    (tmp_path / "names.txt").write_text("ant\nb\u00eate\n", encoding="utf-8-sig")
    assert text_lines(tmp_path / "names.txt") == ["ant", "b\u00eate"]
    assert strict_json('{"a": 1}'.encode("utf-8-sig")) == {"a": 1}
