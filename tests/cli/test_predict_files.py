"""Predictions into files: every form, every source, and a run killed at any moment."""

import csv
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
from safetensors.torch import load_file, save_file
from test_trust import run, run_json

from exit_plugins import ExitPolicy
from exit_plugins.cli import journal
from exit_plugins.timm import save_for_hf
from exit_plugins.timm.predictor import BatchPredictor


@pytest.fixture
def predict(images, checkpoint, policy_file):
    """The command over 31 files, one of which is no image."""

    def words(*more) -> list:
        return ["predict", *more, "--policy", policy_file, "--checkpoint", checkpoint]

    return words


@pytest.fixture
def folder(images, tmp_path):
    shutil.copytree(images / "test", tmp_path / "mixed")
    (tmp_path / "mixed" / "bee" / "3x.png").write_bytes(b"no image")
    return tmp_path / "mixed"


@pytest.fixture
def known(predict, folder, images, capsys):
    """The rows of the 30 good files, as printed one by one."""
    good = {str(folder / path.relative_to(images / "test")): path for path in sorted((images / "test").rglob("*.png"))}
    found = run_json(capsys, *predict(*good.values()))
    return [{**row, "image": name} for name, row in zip(good, found, strict=True)]


def test_every_form_holds_the_rows_that_are_printed(predict, folder, known, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    read = {
        "csv": lambda path: list(csv.DictReader(path.open(newline=""))),
        "jsonl": lambda path: [json.loads(line) for line in path.open()],
        "parquet": lambda path: parquet.read_table(path).to_pylist(),
    }
    for form, opened in read.items():
        path = tmp_path / f"out.{form}"
        assert run(*predict(folder, "--output", path, "--batch-size", 7)) == 1
        assert "3x.png is not an image" in (said := capsys.readouterr().err)
        assert "30 images answered" in said and "1 not readable" in said
        rows = opened(path)
        assert [row["path"] for row in rows] == [row["image"] for row in known]
        for row, other in zip(rows, known, strict=True):
            assert set(row) == {"path", "class", "label", "confidence", "exit", "macs"}
            assert (int(row["class"]), row["label"], int(row["exit"]), int(row["macs"])) == (
                other["class"], other["label"], other["exit"], other["macs"],
            )  # fmt: skip
            assert float(row["confidence"]) == pytest.approx(other["confidence"], rel=1e-4)
        assert not list(tmp_path.glob("*.part*"))
    assert run(*predict(folder, "--format", "text", "-o", tmp_path / "out")) == 1
    head, *lines = (tmp_path / "out").read_text().splitlines()
    assert head.split() == ["label", "confidence", "exit", "MACs", "image"] and len(lines) == 30
    assert [line.split()[0] for line in lines] == [row["label"] for row in known]


def test_shards_lists_and_workers_give_the_same(predict, folder, known, tmp_path, capsys):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(folder, arcname="mixed")
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(folder.rglob("*.png"))))
    answers = {}
    for name, source in (("tar", tmp_path / "s.tar"), ("list", tmp_path / "list.txt"), ("folder", folder)):
        path = tmp_path / f"{name}.jsonl"
        assert run(*predict(source, "-o", path, "--batch-size", 8, "--workers", 2 * (name == "folder"))) == 1
        answers[name] = [json.loads(line) for line in path.open()]
    without = [[{**row, "path": None} for row in rows] for rows in answers.values()]
    assert without[1] == without[2] and len(without[0]) == 30
    by_name = {row["path"].removeprefix(f"{tmp_path}/s.tar/mixed/"): row["class"] for row in answers["tar"]}
    assert by_name == {row["image"].removeprefix(f"{folder}/"): row["class"] for row in known}


def test_top_k_and_unsure_are_in_every_form(folder, checkpoint, policy_file, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    replace(ExitPolicy.load(policy_file), thresholds=[np.inf, np.inf, 0]).save(tmp_path / "p.json")

    def predict(*more) -> list:
        return ["predict", *more, "--policy", tmp_path / "p.json", "--checkpoint", checkpoint]

    found = run_json(capsys, *predict(*sorted((folder / "ant").glob("*.png")), *sorted((folder / "cow").glob("*.png"))))
    last = [row["confidence"] for row in found if row["exit"] == 3]
    (folder / "bee").rename(tmp_path / "bees")
    limit = sorted(last)[len(last) // 2]
    more = ["--top-k", 2, "--reject", limit, "--batch-size", 31]
    for form in ("jsonl", "csv", "parquet", "text"):
        assert run(*predict(folder, *more, "--format", form, "-o", tmp_path / form)) == 0
    unsure = sum(confidence < limit for confidence in last)
    assert f"{unsure} unsure" in capsys.readouterr().err and unsure > 0
    lines = [json.loads(line) for line in (tmp_path / "jsonl").open()]
    assert sum(row["label"] == "unsure" and row["class"] is None for row in lines) == unsure
    assert lines == parquet.read_table(tmp_path / "parquet").to_pylist()
    table = list(csv.DictReader((tmp_path / "csv").open(newline="")))
    for row, line in zip(table, lines, strict=True):
        assert float(row["probability"]) == line["top"][0]["probability"] >= line["top"][1]["probability"]
        assert row["label_2"] == line["top"][1]["label"]
    assert [line.split()[0] for line in (tmp_path / "text").open()].count("unsure") == unsure


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_run_killed_at_any_moment_ends_with_the_same_file(form, predict, folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    words = predict(folder, "--batch-size", 4, "--format", form, "-o", tmp_path / "out")
    assert run(*words) == 1
    whole = (tmp_path / "out").read_bytes()
    # What lies on the disk at any write: rows without a record of them, half a row, a record, all but the last step.
    moments, write, save = [], journal.Journal._write, journal.Journal._save

    def look(_) -> None:
        files = {path.name: path.read_bytes() for path in tmp_path.glob("out.part*")}
        moments.append(files)
        if len(moments) % 3 == 0 and files["out.part"]:
            moments.append({**files, "out.part": files["out.part"] + b'{"torn'})

    monkeypatch.setattr(journal.Journal, "_write", lambda self, text: (write(self, text), look(self))[0])
    monkeypatch.setattr(journal.Journal, "_save", lambda self: (save(self), look(self))[0])
    monkeypatch.setattr(journal, "_CHECKPOINT", 0.0)
    (tmp_path / "out").unlink()
    assert run(*words) == 1
    monkeypatch.undo()
    assert len(moments) > 16 and (tmp_path / "out").read_bytes() == whole
    for files in [moments[0], moments[5], moments[-1]] if form == "csv" else [moments[-1]]:
        (tmp_path / "out").write_bytes(b"earlier")
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        assert run(*words, "--resume") == 1
        assert (tmp_path / "out").read_bytes() == whole
        assert "30 images answered" in capsys.readouterr().err
        assert not list(tmp_path.glob("out.*"))
    (tmp_path / "out.part").touch()
    assert run(*words) == 2 and "holds the rows of a run that did not end" in capsys.readouterr().err
    (tmp_path / "out.part").unlink()
    assert run(*words, "--resume") == 0 and "no run to go on with" in capsys.readouterr().err


def test_another_run_is_not_gone_on_with(predict, folder, tmp_path, capsys, monkeypatch):
    from exit_plugins.timm import predictor

    out, seen = tmp_path / "out.csv", []
    run_once = predictor.Predictor.run

    def stop(self, pixels):
        seen.append(len(pixels))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return run_once(self, pixels)

    monkeypatch.setattr(predictor.Predictor, "run", stop)
    assert run(*predict(folder, "-o", out, "--batch-size", 4)) == 130
    monkeypatch.undo()
    assert len((tmp_path / "out.csv.part").read_text().splitlines()) == 1 + 4 + 4 + 4
    capsys.readouterr()
    for more, says in ((["--batch-size", 5], "another batch-size (4, now 5)"),):
        assert run(*predict(folder, "-o", out, "--resume", *more)) == 2
        assert says in capsys.readouterr().err
    first, second, last = (folder / "ant" / f"{number}.png" for number in (0, 1, 9))
    ways = {
        "its number 12 was": lambda: (folder / "ant" / "00.png").write_bytes(b""),
        "names have changed": lambda: first.rename(folder / "ant" / "00.png"),
        "files have changed since": lambda: second.write_bytes(last.read_bytes()),
    }
    shutil.copytree(folder, tmp_path / "kept")  # with the times of change
    for says, change in ways.items():
        change()
        assert run(*predict(folder, "-o", out, "--resume", "--batch-size", 4)) == 2
        assert says in (said := capsys.readouterr().err) and "the images are not those of the run" in said
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
    assert run(*predict(folder, "-o", out, "--resume", "--batch-size", 4)) == 1


def test_a_finished_file_is_not_taken_for_that_of_another_run(predict, folder, checkpoint, tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = predict(folder, "-o", out, "--resume")
    out.write_text("somebody's")
    assert run(*words) == 2
    assert "nothing says which run wrote it; leave out --resume" in capsys.readouterr().err
    assert run(*words[:-5], *words[-4:]) == 1  # without --resume
    whole = out.read_bytes()
    assert run(*words) == 0 and "no run to go on with" in capsys.readouterr().err
    other = {name: t.flip(0) if t.ndim == 4 else t for name, t in load_file(checkpoint).items()}
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, tmp_path / "w.safetensors")
    for more, says in (
        (["--checkpoint", tmp_path / "w.safetensors"], "out.csv was written with another model"),
        (["--top-k", 2], "out.csv was written with another top-k (1, now 2)"),
        ([folder / "ant"], "out.csv was written with another inputs"),
    ):
        given = [*words, *more] if str(more[0]).startswith("-") else ["predict", *more, *words[1:]]
        assert run(*given) == 2
        assert says in capsys.readouterr().err
    shutil.copy(folder / "ant" / "0.png", folder / "cow" / "zz.png")
    assert run(*words) == 2 and "there are more than the 31 it answered" in capsys.readouterr().err
    (folder / "cow" / "zz.png").unlink()
    os.utime(folder / "cow" / "0.png", ns=(1, 1))
    assert run(*words) == 2 and "files have changed since" in capsys.readouterr().err
    assert out.read_bytes() == whole
    out.write_bytes(whole.replace(b"ant", b"bee", 1))
    assert run(*words) == 2 and "is not what the run wrote" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_pipes_devices_and_links_get_the_rows(form, predict, folder, tmp_path, capsys):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    pipe, real = tmp_path / "pipe", tmp_path / "real"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("real")
    assert run(*predict(folder, "--format", form, "-o", tmp_path / "link")) == 1
    assert (tmp_path / "link").is_symlink()
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    assert run(*predict(folder, "--format", form, "-o", pipe)) == 1
    assert reader.communicate(timeout=30)[0] == real.read_bytes() and pipe.is_fifo()
    assert run(*predict(folder, "--format", form, "-o", pipe, "--resume")) == 2
    assert "--resume goes on with a file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".real.run.json", "link", "mixed", "pipe", "real"]


def test_options_that_mean_nothing_together_are_refused(predict, folder, tmp_path, capsys):
    for more, says in (
        (["--resume"], "give --output"),
        (["--format", "parquet"], "is a file, not a stream"),
        (["--json", "-o", tmp_path / "x"], "--json prints one list"),
        (["--export", tmp_path], "leave out --model, --checkpoint"),
        (["--top-k", 9], "from 1 to 3"),
        (["-o", tmp_path], "is a folder"),
    ):
        assert run(*predict(folder, *more)) == 2
        assert says in capsys.readouterr().err
    assert run("predict", folder) == 2
    assert "give --policy" in capsys.readouterr().err
    assert run(*predict(tmp_path / "*.bmp")) == 2
    assert "nothing matches" in capsys.readouterr().err


def test_an_export_is_run_as_it_is(predict, folder, known, policy_file, checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    words = ["export", "msdnet_test", "--policy", policy_file, "--checkpoint", checkpoint, "--output", tmp_path / "x"]
    assert run(*words) == 0
    assert run("predict", folder, "--export", tmp_path / "x", "-o", tmp_path / "o.jsonl") == 1
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert [(row["class"], row["exit"], row["macs"]) for row in rows] == [
        (row["class"], row["exit"], row["macs"]) for row in known
    ]


def test_weights_bring_their_policy(images, tmp_path, capsys):
    """A network of the package and a card's folder need no --policy; others are told what would do."""
    paths = [str(path) for path in sorted((images / "test").rglob("*.png"))[:5]]
    found = run_json(capsys, "predict", *paths, "--model", "msdnet_cifar_batch.cifar100")
    answers = BatchPredictor("msdnet_cifar_batch.cifar100", device="cpu")({"bytes": paths})
    assert [row["class"] for row in found] == answers["class"].tolist()
    assert [row["exit"] for row in found] == answers["exit"].tolist()
    model = timm.create_model("dynperceiver_test", num_classes=3).eval()
    policy = ExitPolicy([0.4] * (model.num_exits - 1) + [-np.inf], costs=range(1, model.num_exits + 1))
    save_for_hf(model, tmp_path / "card", policy=policy)
    card = f"local-dir:{tmp_path / 'card'}"
    assert [row["exit"] for row in run_json(capsys, "predict", *paths, "--model", card)] == [1] * 5
    (tmp_path / "card" / "policy.json").unlink()
    for name in (card, "dynperceiver_test"):
        assert run("predict", *paths, "--model", name) == 2
        assert f"no policy comes with {name}" in capsys.readouterr().err
