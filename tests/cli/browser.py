"""A headless Chromium, spoken to by its DevTools protocol: what a page shows, its keys, its width and its colours."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.events: list[dict] = []
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        end = time.monotonic() + 120
        while self.ask("document.readyState + location.href").startswith("complete") is False or self.ask(
            "location.href"
        ).startswith("about"):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def look(self, width: int, scheme: str = "light", height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def faults(self) -> list[str]:
        """Exceptions of the page, and addresses it asked for."""
        thrown = [e["params"]["exceptionDetails"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [*map(str, thrown), *(url for url in asked if not url.startswith(("file:", "data:", "about:")))]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    from websockets.sync.client import connect

    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-extensions"]
    process = subprocess.Popen(
        [BROWSER, *words, *quiet, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, end = folder / "DevToolsActivePort", time.monotonic() + 120
        while not port.exists() or not port.read_text().strip():
            assert time.monotonic() < end and process.poll() is None, "the browser does not start"
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
        (tab, *_) = [tab for tab in json.load(urllib.request.urlopen(address)) if tab["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait()
