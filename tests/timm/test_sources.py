"""Images from wherever they lie: found, named and ordered as an independent listing says."""

import glob
import io
import os
import random
import tarfile
import tracemalloc

import pytest

from exit_plugins.timm import sources
from exit_plugins.timm.sources import check_sources, iterate_images

ENDINGS = (".png", ".jpg")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files in folders whose order by path is not that by name, and what is no image among them."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/10.JPG", "b/c/x.png", "a.png", "a/z.png", "a/notes.txt", ".hidden/h.png", "b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"pixels")
    return tmp_path


def names(*given) -> list[str]:
    return [item.path for item in iterate_images([str(x) for x in given], ENDINGS)]


def test_folders_are_walked_in_the_order_of_their_paths(tree):
    expected = sorted(path for path in tree.rglob("*") if path.suffix.lower() in ENDINGS)
    assert names(tree) == [str(path) for path in expected]
    (tree / "b" / "loop").symlink_to(tree)  # every link is followed, none in a circle
    assert [name for name in names(tree) if "/loop/" not in name] == [str(path) for path in expected]


@pytest.mark.parametrize(
    "pattern",
    [
        "*.png",
        "b/*",
        "**/*.png",
        "?/*.png",
        "[ab]/**/x.png",
        "b/**",
        "[ab]",
        "b*",
        "**/[bc]",
    ],
)
def test_patterns_find_what_glob_finds(tree, pattern):
    """Of a folder that matches all its images, as of one that is named."""
    found = glob.glob(pattern, recursive=True)
    within = [file for path in found for file in glob.glob(f"{path}/**", recursive=True)]
    expected = {path for path in [*found, *within] if os.path.isfile(path) and path.lower().endswith(ENDINGS)}
    assert sorted(names(pattern)) == sorted(expected) and len(expected) > 0


def test_a_folder_behind_a_link_is_walked_where_a_pattern_matches_it(tree):
    (tree / "there").symlink_to("b")
    assert "there/c/x.png" in names("t*") and "there/c/x.png" in names("**/*") and "there/c/x.png" in names("**")
    assert len(names("**/*.png")) == len(set(names("**/*.png"))) == 5


def test_lists_standard_input_and_numbers(tree, monkeypatch):
    for mark in (b"", b"\xef\xbb\xbf"):  # with which some editors begin a text in UTF-8
        (tree / "list.txt").write_bytes(mark + b"b/2.png\n\nnowhere.png\r\n")
        assert names("list.txt", "a.png") == ["b/2.png", "nowhere.png", "a.png"]
        monkeypatch.setattr("sys.stdin", io.StringIO(mark.decode() + "a.png\nb.png\n"))
        assert names("-") == ["a.png", "b.png"]
    assert names("x-{08..11}.png") == ["x-08.png", "x-09.png", "x-10.png", "x-11.png"]


def test_shards_give_the_images_in_them(tree):
    for ending in ("tar", "tar.gz"):
        with tarfile.open(tree / f"s-0.{ending}", "w:gz" if ending.endswith("gz") else "w") as archive:
            for name in ("b/2.png", "a/notes.txt", "a.png"):
                archive.add(name)
        items = list(iterate_images([f"s-{{0..0}}.{ending}"], ENDINGS))
        assert [(item.path, item.content) for item in items] == [
            (f"s-0.{ending}/b/2.png", b"pixels"), (f"s-0.{ending}/a.png", b"pixels"),
        ]  # fmt: skip
    whole = (tree / "s-0.tar").read_bytes()
    (tree / "cut.tar").write_bytes(whole[: whole.index(b"a.png") + 515])
    first, second = iterate_images(["cut.tar"], ENDINGS)
    assert first.content == b"pixels" and "cannot read the shard cut.tar to its end" in second.error


def test_what_holds_nothing_is_said_before_the_work(tree):
    (tree / "empty").mkdir()
    (tree / "empty.txt").write_text("\n")
    for source, message in (
        ("empty", "no images in empty"),
        ("*.gif", "nothing matches"),
        ("empt[y]", "no images in what matches"),
        ("no.txt", "no list or"),
        ("empty.txt", "empty.txt names no images"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_sources([source], ENDINGS)
    check_sources(["nowhere.png", "-", "b"], ENDINGS, output="list.txt")
    with pytest.raises(ValueError, match="x-2.tar is to be written"):
        check_sources(["x-{2..3}.tar"], ENDINGS, output="x-2.tar")


def test_a_huge_folder_is_sorted_without_holding_its_names(tmp_path, monkeypatch):
    folder = tmp_path / "many"
    folder.mkdir()
    given = [f"{number}\n.png" for number in range(3000)]  # a line end is part of a name too
    random.Random(0).shuffle(given)
    for name in given:
        (folder / name).touch()
    monkeypatch.setattr(sources, "_IN_MEMORY", 70)
    assert [os.path.basename(name) for name in names(folder)] == sorted(given)
    # A list of any length is read line by line.
    with open(tmp_path / "long.txt", "w") as file:
        file.writelines(f"some/where/far/away/{number:09d}.png\n" for number in range(200_000))
    tracemalloc.start()
    count = sum(1 for _ in iterate_images([str(tmp_path / "long.txt")], ENDINGS))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200_000 and most < 1_000_000
