"""Chromium without a window, driven over the WebDriver protocol: plain HTTP, no further package."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

#: Keys by their WebDriver code points.
ENTER, ESCAPE, LEFT, RIGHT, DELETE = "\ue007", "\ue00c", "\ue012", "\ue014", "\ue017"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
MISSING = "" if CHROMIUM and DRIVER else (
    "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
)  # fmt: skip


class Browser:
    """One page at a time.

    Args:
        folder: Folder for the profile and for downloads.
        size: Width and height of the window.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1440, 900)) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                     "--disable-dev-shm-usage", "--disable-background-networking",
                     f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}"],
            "prefs": {"download.default_directory": str(self.downloads)},
        }  # fmt: skip
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options,
                        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}  # fmt: skip
        try:
            found = self._wait_and_start({"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self._process.kill()
            raise
        self._session = f"/session/{found['sessionId']}"

    def _wait_and_start(self, body: dict[str, Any]) -> Any:
        end = time.monotonic() + 60
        while True:
            try:
                self._call("GET", "/status")
                return self._call("POST", "/session", body)
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._base + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as err:
            raise AssertionError(json.load(err)["value"]["message"]) from err

    def close(self) -> None:
        """End the session and the driver."""
        try:
            self._call("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait(timeout=20)

    def open(self, page: Path) -> None:
        """Load a file."""
        self._call("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        """Value of a script, such as ``return document.title``."""
        body = {"script": script, "args": list(args)}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def find(self, css: str) -> str:
        """Path of the first element that a selector names."""
        found = self._call(
            "POST", f"{self._session}/element", {"using": "css selector", "value": css}
        )
        return f"{self._session}/element/{found[_ELEMENT]}"

    def click(self, css: str) -> None:
        """Click an element, as a person would: it must be visible."""
        self._call("POST", self.find(css) + "/click")

    def write(self, css: str, text: str) -> None:
        """Type into an element; into a file input, choose that file."""
        self._call("POST", self.find(css) + "/value", {"text": text})

    def press(self, keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [a for k in keys for a in ({"type": "keyDown", "value": k},
                                             {"type": "keyUp", "value": k})]  # fmt: skip
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._call("POST", f"{self._session}/actions", body)

    def text(self, css: str) -> str:
        """Visible text of an element."""
        return str(self._call("GET", self.find(css) + "/text"))

    def resize(self, width: int, height: int) -> None:
        """Size of the page as the page sees it; below a window's least width too."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self._cdp("Emulation.setDeviceMetricsOverride", metrics)

    def _cdp(self, command: str, params: dict[str, Any]) -> Any:
        body = {"cmd": command, "params": params}
        return self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def screenshot(self, path: Path) -> None:
        """Picture of the window as PNG."""
        png = self._call("GET", f"{self._session}/screenshot")
        path.write_bytes(base64.b64decode(png))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Console (``browser``) or network (``performance``) messages since the last call."""
        found: list[dict[str, Any]] = self._call("POST", f"{self._session}/se/log", {"type": kind})
        return found

    def downloaded(self, ending: str) -> Path:
        """Wait for a download and give its path."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = [p for p in self.downloads.iterdir() if p.name.endswith(ending)]
            if found:
                return max(found, key=lambda p: p.stat().st_mtime_ns)
            time.sleep(0.1)
        raise AssertionError(f"no download that ends in {ending}")
