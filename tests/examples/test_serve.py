"""The server under a small load: every request answered, the broken ones by 400, none lost when it is told to end."""

import http.client
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from exit_plugins.timm.predictor import BatchPredictor

for needed in ("uvicorn", "starlette", "prometheus_client"):
    pytest.importorskip(needed, reason="the extra serve is not installed")
EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = "msdnet_cifar_batch.cifar100"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    import serve_load

    return serve_load


@pytest.fixture
def server():
    words = [sys.executable, EXAMPLES / "serve.py", SHIPPED, "--port", "0", "--max-bytes", "20000", "--timeout", "5"]
    process = subprocess.Popen([*words, "--max-pixels", "40000"], stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"running on http://127.0.0.1:(\d+)", line):
            break
    else:
        pytest.fail("the server did not start: " + "".join(lines[-20:]))
    threading.Thread(target=process.stderr.read, daemon=True).start()  # or its pipe fills up
    yield process, int(found[1])
    if process.poll() is None:
        process.kill()
    process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body)
    response = connection.getresponse()
    return response.status, response.read().decode()


def begun(port: int, data: bytes) -> socket.socket:
    """A connection on which this was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(data)
    return connection


def test_every_request_is_answered(server, load):
    process, port = server
    answers, seconds = load.load(port, 120, 8, broken_every=20)
    figures = load.summary(answers, seconds)
    assert (figures["lost"], figures["wrong"]) == (0, 0)
    assert figures["statuses"] == {"200": 114, "400": 6}
    # The same answers as without a server.
    expected = BatchPredictor(SHIPPED, device="cpu")({"bytes": load.pictures()})
    known = set(zip(expected["label"], expected["exit"].tolist(), strict=True))
    assert {(a.body["label"], a.body["exit"]) for a in answers if a.status == 200} <= known
    assert all(a.body["milliseconds"] > 0 for a in answers if a.status == 200)

    # What is not to be read.
    assert ask(port, "POST", "/predict", b"x" * 30_000)[0] == 413
    assert ask(port, "GET", "/predict")[0] == 405 and ask(port, "GET", "/nothing")[0] == 404
    bomb = io.BytesIO()
    Image.new("RGB", (400, 400)).save(bomb, "PNG")  # 160,000 pixels in a few hundred bytes
    status, text = ask(port, "POST", "/predict", bomb.getvalue())
    assert status == 400 and "too large an image" in text
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    with begun(port, head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n") as unknown:
        assert b" 411 " in unknown.recv(1000)
    with begun(port, head + b"Content-Length: 100\r\n\r\nabc") as slow:
        assert b" 408 " in slow.recv(1000)

    status, text = ask(port, "GET", "/metrics")
    counts = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) ([\d.e+]+)$", text, re.MULTILINE))
    assert status == 200 and counts['exit_plugins_requests_total{status="200"}'] == "114.0"
    left = {int(k): int(float(v)) for k, v in re.findall(r'exits_total\{exit="(\d)"\} ([\d.]+)', text)}
    assert {k: v for k, v in left.items() if v} == figures["exits"]
    assert counts["exit_plugins_seconds_count"] == "114.0"

    # Told to end while an image is on its way: the image is answered, nobody else is let in, and it goes without error.
    image = load.pictures(1)[0]
    with begun(port, head + b"Content-Length: %d\r\n\r\n" % len(image) + image[:50]) as last:
        assert ask(port, "GET", "/health")[0] == 200
        process.send_signal(signal.SIGTERM)
        with pytest.raises(OSError):
            for _ in range(200):
                time.sleep(0.05)
                ask(port, "GET", "/health")
        last.sendall(image[50:])
        said = last.recv(10_000)
    assert b" 200 OK" in said
    assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal, once all is done


def test_a_full_server_says_so(load):
    import argparse
    import asyncio
    from types import SimpleNamespace

    sys.path.insert(0, str(EXAMPLES))
    try:
        import serve
    finally:
        sys.path.pop(0)
    limits = argparse.Namespace(batch_size=2, capacity=2, max_bytes=20_000, timeout=5, budget=None, table=None)
    service = serve.Service(BatchPredictor(SHIPPED, device="cpu"), limits)
    image = load.pictures(1)[0]

    def request() -> SimpleNamespace:
        async def stream():
            await asyncio.sleep(0.05)
            yield image

        return SimpleNamespace(headers={"content-length": str(len(image))}, stream=stream)

    async def five() -> list:
        return await asyncio.gather(*(service.predict(request()) for _ in range(5)))

    try:
        statuses = sorted(response.status_code for response in asyncio.run(five()))
        assert statuses == [200, 200, 503, 503, 503] and service.inside == 0
    finally:
        service.close()
