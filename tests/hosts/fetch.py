"""Unpack the source distributions of the installed hosts, which carry their own test files: ``fetch.py [.hosts]``.

The folder then holds ``timm-VERSION/`` and ``peft-VERSION/``; what is there already is left alone.
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


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else FOLDER
    for host in HOSTS:
        print(fetch(host, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
