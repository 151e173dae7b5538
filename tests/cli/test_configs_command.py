"""The configurations that come with the package, found by name."""

import json
from pathlib import Path

import pytest

from exit_plugins.cli import main

NAME = "retinanet_dynperceiver_regnety_400mf_fpn_bccd"


def test_every_configuration_is_listed_and_found(capsys):
    assert main(["configs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = [path for path in Path(found["folder"]).rglob("*.py") if path.parent.name != "_base_"]
    assert sorted(f"{found['folder']}/{name}.py" for name in found["configs"]) == sorted(map(str, files))
    assert main(["configs"]) == 0
    assert "CONFIG=$(exit-plugins configs " in capsys.readouterr().out


@pytest.mark.parametrize("name", [NAME, f"bccd/{NAME}", f"bccd/{NAME}.py"])
def test_a_name_gives_one_path(name, capsys):
    assert main(["configs", name]) == 0
    assert Path(capsys.readouterr().out.strip()).name == f"{NAME}.py"


@pytest.mark.parametrize(("name", "says"), [("bccd", "several configurations are"), ("yolo", "no configuration is")])
def test_no_name_is_guessed(name, says, capsys):
    assert main(["configs", name]) == 2
    assert f"{says} called '{name}': " in capsys.readouterr().err
