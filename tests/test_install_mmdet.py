"""The installation of MMDetection, without installing anything: what it would run, in which order and environment."""

import shutil
import subprocess
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from exit_plugins import install_mmdet


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str], str]]:
    """Every command that would run, what it finds in the environment, and what its compiler takes C++17 for."""
    seen = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        standard = ""
        if "CXX" in env and shutil.which("g++"):
            asked = [env["CXX"], "-std=c++17", "-dM", "-E", "-x", "c++", "/dev/null"]
            standard = real(asked, capture_output=True, text=True, check=True).stdout
        seen.append((command, env, standard))
        return subprocess.CompletedProcess(command, 0)

    real = subprocess.run
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(install_mmdet.subprocess, "run", run)
    return seen


def test_operators_are_compiled_before_anything_asks_for_mmcv(commands, monkeypatch, capsys):
    which = shutil.which
    monkeypatch.setattr(install_mmdet.shutil, "which", lambda name: None if name == "nvcc" else which(name))
    install_mmdet.main(["--jobs", "3"])
    tools, compiled, extra, opencv, check = commands
    assert "ninja" in tools[0]
    assert {"--no-build-isolation", "--no-deps", "--force-reinstall"} < set(compiled[0])
    assert compiled[1]["MAX_JOBS"] == "3" and compiled[1]["CUDA_VISIBLE_DEVICES"] == ""
    assert "202002L" in compiled[2] or not shutil.which("g++")
    assert extra[0][-1] == "exit-plugins[mmdet]" and "CXX" not in extra[1]
    assert opencv[0][-1].startswith("opencv-python-headless") and "mmcv.ops" in check[0][-1]
    # The version that is compiled is one the extra accepts, or pip would replace it by one without operators.
    (accepted,) = [line for line in requires("exit-plugins") if line.startswith("onedl-mmcv")]
    name, _, version = compiled[0][-1].partition("==")
    assert Requirement(accepted).name == name and version in Requirement(accepted).specifier


def test_dry_run_prints_and_runs_nothing(commands, capsys):
    install_mmdet.main(["--dry-run"])
    assert not commands
    assert capsys.readouterr().out.count("pip install") == 4


def test_a_failed_command_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(install_mmdet.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="this command failed"):
        install_mmdet.main([])
    assert capsys.readouterr().out.count("\n") == 1
