"""What a command writes: tried before the work, and never what it reads."""

import argparse
import json
import os
import shutil
from importlib import import_module

import pytest
from test_trust import MODEL, run

from exit_plugins.cli import COMMANDS, models


@pytest.fixture
def here(images, checkpoint, policy_file, tmp_path, monkeypatch):
    """Everything a command may read, to be lost if it were written to."""
    shutil.copytree(images, tmp_path / "data")
    shutil.copy(images / "test" / "ant" / "0.png", tmp_path / "pic.png")
    shutil.copy(checkpoint, tmp_path / "w.safetensors")
    shutil.copy(policy_file, tmp_path / "p.json")
    shutil.copy(policy_file.with_name("val.npz"), tmp_path / "v.npz")
    (tmp_path / "list.txt").write_text("pic.png\ndata/test/ant/1.png\n")
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    (tmp_path / "link.csv").symlink_to("pic.png")
    os.link(tmp_path / "v.npz", tmp_path / "again.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder) -> dict:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


PREDICT = ["--policy", "p.json", "--checkpoint", "w.safetensors", "-o"]
SOLVE = ["solve", MODEL, "--budget", "80%"]


@pytest.mark.parametrize("words", [
    ["predict", "pic.png", *PREDICT, "pic.png"],
    ["predict", "pic.png", *PREDICT, "link.csv"],
    ["predict", "list.txt", *PREDICT, "list.txt"],
    ["predict", "list.txt", *PREDICT, "pic.png"],
    ["predict", "*.png", *PREDICT, "./pic.png"],
    ["predict", "data/test", *PREDICT, "data/test/ant/0.png"],
    ["predict", "pic.png", *PREDICT, "p.json"],
    ["predict", "pic.png", *PREDICT, "w.safetensors"],
    ["predict", "pic.png", "--class-names", "names.txt", *PREDICT, "names.txt"],
    [*SOLVE, "--table", "v.npz", "-o", "v.npz"],
    [*SOLVE, "--table", "v.npz", "-o", "again.npz"],
    [*SOLVE, "--data", "data", "--checkpoint", "w.safetensors", "-o", "w.safetensors"],
    [*SOLVE, "--data", "data", "--checkpoint", "w.safetensors", "-o", "new", "--save-table", "new"],
    [*SOLVE, "--data", "data", "-o", "data/val/ant/0.png"],
    [*SOLVE, "--table", "v.npz", "--cost", "latency", "--cost-batch", 1, 2, "--class-names", "n-b2.txt", "-o", "n.txt"],
    ["evaluate", MODEL, "--data", "data", "--policy", "p.json", "--save-table", "p.json"],
    ["report", MODEL, "--data", "data", "--solve-table", "v.npz", "-o", "v.npz"],
    ["export", MODEL, "--policy", "p.json", "--single-file", "--output", "p.json"],
    ["export", MODEL, "--policy", "p.json", "--output", "x", "--runtime", "openvino", "--int8", "x", "--data", "data"],
], ids=lambda words: " ".join(map(str, words))[-40:])  # fmt: skip
def test_what_is_read_is_not_written_to(words, here, capsys):
    shutil.copy("names.txt", "n-b2.txt")
    before = contents(here)
    assert run(*words) == 2
    assert "is to be written, but it is needed for the same work" in capsys.readouterr().err
    assert contents(here) == before


@pytest.mark.parametrize("words", [
    ["predict", "pic.png", *PREDICT, "data"],
    [*SOLVE, "--data", "data", "-o", "data"],
    [*SOLVE, "--data", "data", "-o", "new", "--save-table", "data"],
    [*SOLVE, "--data", "data", "-o", "pic.png/p.json"],
    ["evaluate", MODEL, "--data", "data", "--save-table", "data"],
    ["report", MODEL, "--data", "data", "-o", "data"],
    ["export", MODEL, "--policy", "p.json", "--single-file", "--output", "data"],
    ["export", MODEL, "--policy", "p.json", "--output", "pic.png"],
    ["export", MODEL, "--policy", "p.json", "--output", "data"],
    ["export", MODEL, "--policy", "p.json", "--output", "x", "--int8", "data", "--data", "data"],
], ids=lambda words: " ".join(map(str, words))[-40:])  # fmt: skip
def test_targets_are_tried_before_the_work(words, here, capsys, monkeypatch):
    def built(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(models.timm, "create_model", built)
    before = contents(here)
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert any(name in said for name in ("data", "pic.png")) and "the work has begun" not in said
    assert contents(here) == before


def test_what_may_be_read_and_written(here, capsys):
    """A policy beside the images, again and again; rows beside them; what is no plain file."""
    for _ in range(2):
        assert run(*SOLVE, "--table", "v.npz", "--data-dir", "data", "-o", "data/policy.json") == 0
        assert run("predict", "data/test/ant", *PREDICT, "data/test/ant/rows.csv") == 0
    assert run("predict", "data/test/ant", *PREDICT, "/dev/null") == 0
    assert not os.path.isfile("/dev/null")


def test_an_export_keeps_its_policy(here, capsys):
    folder = here / "x"
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    (folder / "export.json").write_text(json.dumps({}))
    for name in ("policy.json", "export.json"):
        assert run("predict", "pic.png", "--export", "x", "-o", folder / name) == 2
        assert "is needed for the same work" in capsys.readouterr().err


def test_every_command_that_writes_says_what():
    """An argument that is called so and is not among ``outputs`` would count as read, and be refused or lost."""
    for command in set(COMMANDS) - {"train"}:
        module = import_module(f"exit_plugins.cli.{command}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        writing = {action.dest for action in parser._actions} & {"output", "save_table", "int8", "bfloat16"}
        args = argparse.Namespace(**{action.dest: action.default for action in parser._actions})
        vars(args).update(dict.fromkeys(writing, "some"), single_file=False)
        assert {output.argument for output in getattr(module, "outputs", lambda _: [])(args)} == writing
