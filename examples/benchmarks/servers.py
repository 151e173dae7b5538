"""examples/serve.py beside servers made by LitServe and Ray Serve, of the same network, under the same load.

    pip install litserve "ray[serve]"
    python examples/benchmarks/servers.py --requests 1500 --rounds 3 --json docs/servers.json

All three read the same pictures, batch up to 16 requests, and stand on this machine's processors; they are started in
turns, so that whatever else happens here happens to all. LitServe and Ray Serve batch before the model: a batch ends
with its slowest image. LitServe takes JSON, so its pictures come in base64.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from serve_load import load, pictures, summary
from timing import machine, write_json

BATCH, WAIT = 16, 0.005  # requests, seconds
HERE = Path(__file__).resolve().parent
SERVERS = ("exit_plugins", "litserve", "ray_serve")


def command(name: str, source: str, port: int) -> list[str]:
    """What starts a server."""
    if name == "exit_plugins":
        words = [HERE.parent / "serve.py", source, "--port", port, "--batch-size", BATCH]
    else:
        words = [HERE / f"serve_{name.removesuffix('_serve')}.py", source, port, BATCH, WAIT]
    return [sys.executable, *map(str, words)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ready(port: int, process: subprocess.Popen, body: bytes, patience: float = 400) -> None:
    """Wait until an image is answered."""
    until = time.monotonic() + patience
    while time.monotonic() < until and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server on port {port} does not answer; its exit status is {process.poll()}.")


def as_json(picture: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(picture).decode()}).encode()


def measure(name: str, source: str, requests: int, clients: int) -> dict:
    """One start of a server, and its load."""
    port = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(name, source, port), start_new_session=True, **quiet)
    encode = as_json if name == "litserve" else bytes
    try:
        ready(port, process, encode(pictures(1)[0]))
        load(port, clients * 4, clients, broken_every=0, encode=encode)  # warm
        return summary(*load(port, requests, clients, broken_every=0, encode=encode))
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # all that it started, too
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="msdnet_cifar_batch.cifar100")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=SERVERS, choices=SERVERS)
    parser.add_argument("--json", help="write the figures here as well")
    args = parser.parse_args()
    taken: dict[str, list[dict]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name, found in taken.items():
            found.append(measure(name, args.source, args.requests, args.clients))
            print(name, json.dumps(found[-1]), flush=True)
    middle = {
        name: {
            key: float(np.median([one[key] for one in found]))
            for key in ("images_per_second", "p50_ms", "p95_ms", "lost", "wrong")
        }
        for name, found in taken.items()
    }
    print(json.dumps(middle, indent=2))
    about = {"requests": args.requests, "clients": args.clients, "rounds": args.rounds, "source": args.source}
    write_json(args.json, {**about, "machine": machine(), "servers": middle})


if __name__ == "__main__":
    main()
