"""What the tests of the commands share: images on disk, a checkpoint and a policy for it."""

from pathlib import Path

import pytest
from small_data import write_images, write_model

from exit_plugins.cli import main


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """train/, val/ and test/ of three classes."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, count) in enumerate((("train", 4), ("val", 20), ("test", 10))):
        write_images(root / split, count, seed=seed)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory, images, checkpoint) -> Path:
    """Solved on the validation split, by the command."""
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    words = ["solve", "msdnet_test", "--checkpoint", checkpoint, "--data", images, "--budget", "80%", "-o", path]
    assert main([*map(str, words), "--save-table", str(path.with_name("val.npz"))]) == 0
    return path
