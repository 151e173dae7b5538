"""Bring the test files of the installed hosts: ``fetch.py [.hosts]``.

The folder then holds ``timm-VERSION/`` and ``peft-VERSION/``, source distributions, which carry them, and, where its
repository can be reached, ``mmdet/``, whose distributions carry none. What is there already is left alone.
``MMDET_REPOSITORY`` names another place to clone that from, a mirror or a folder.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HOSTS = ("timm", "peft")
FOLDER = Path(__file__).resolve().parents[2] / ".hosts"
COMMAND = "python tests/hosts/fetch.py .hosts"
MMDET_REPOSITORY = "https://github.com/VBTI-development/onedl-mmdetection"


def unpacked(host: str, folder: Path = FOLDER) -> Path:
    """Folder of the unpacked source distribution of the installed ``host``; FileNotFoundError says what to run."""
    path = folder / f"{host}-{version(host)}"
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there; it comes with: {COMMAND}")
    return path


def fetch(host: str, folder: Path = FOLDER) -> Path:
    """Download and unpack the source distribution of the installed ``host`` unless it is there."""
    target = folder / f"{host}-{version(host)}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{host}-") as temporary:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        wanted = f"{host}=={version(host)}"
        subprocess.run((*pip, "--no-deps", "--no-binary", ":all:", "--dest", temporary, wanted), check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        os.replace(next(p for p in Path(temporary).iterdir() if p.is_dir()), target)
    return target


def fetch_mmdet(folder: Path = FOLDER) -> Path | None:
    """Clone MMDetection's tests unless they are there; None, and a word why, where its repository cannot be had."""
    target = folder / "mmdet"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    repository = os.environ.get("MMDET_REPOSITORY", MMDET_REPOSITORY)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mmdet-") as temporary:
        clone = ("git", "clone", "--quiet", "--depth", "1", "--sparse", repository, f"{temporary}/mmdet")
        select = ("git", "-C", f"{temporary}/mmdet", "sparse-checkout", "set", "tests")
        try:
            for command in (clone, select):
                subprocess.run(command, check=True, timeout=300, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
        except (OSError, subprocess.SubprocessError) as error:
            print(f"MMDetection's tests are not fetched ({error}); MMDET_REPOSITORY may name a copy of {repository}.")
            return None
        os.replace(f"{temporary}/mmdet", target)
    return target


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else FOLDER
    for host in HOSTS:
        print(fetch(host, folder))
    if path := fetch_mmdet(folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
