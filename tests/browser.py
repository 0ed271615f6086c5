"""A headless Chromium for tests, spoken to over its debugging pipe; needs nothing but the browser itself.

with Browser(folder) as browser:
    browser.open(url, width=390, dark=True)
    browser.until("document.title !== ''")
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser that keeps its things in `folder`.

    Attributes:
      errors: what the page's script wrote as errors or threw.
    """

    def __init__(self, folder: Path) -> None:
        self.errors: list[str] = []
        self._number, self._left = 0, b""
        # The pipe's ends must be 3 and 4 over there, so here they are neither.
        ends = (*os.pipe(), *os.pipe())
        to_read, self._to, self._from, to_write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
        for end in ends:
            os.close(end)
        fds = f"exec 3<&{to_read} 4>&{to_write}"
        command = (
            f'{fds}; exec "$0" --headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run '
            f"--disable-dev-shm-usage --hide-scrollbars --disable-component-update --disable-background-networking "
            f'--user-data-dir="$1" about:blank'
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(folder / "profile")],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        target = self._call("Target.createTarget", {"url": "about:blank"}, session="")["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session="")
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Goes to a page, as on a screen of so many points."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("Page.navigate", {"url": url})

    def get(self, script: str):
        """Returns the value of an expression in the page."""
        told = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, script: str, *, seconds: float = 120.0) -> None:
        """Waits until an expression is true."""
        limit = time.monotonic() + seconds
        while not self.get(f"(() => {{ try {{ return Boolean({script}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() < limit, (script, self.get("document.body.innerText.slice(0, 2000)"), self.errors)
            time.sleep(0.1)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Writes what the page looks like."""
        told = self._call(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole, **self._clip(whole)}
        )
        path.write_bytes(base64.b64decode(told["data"]))

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _call(self, method: str, params: dict | None = None, *, session: str | None = None) -> dict:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params or {}}
        name = self._session if session is None else session
        asked |= {"sessionId": name} if name else {}
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == asked["id"]:
                assert "error" not in told, told
                return told["result"]
            self._hear(told)

    def _hear(self, told: dict) -> None:
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["params"]["exceptionDetails"])[:500])
        entry = told.get("params", {}).get("entry", {})
        if told.get("method") == "Log.entryAdded" and entry.get("level") == "error":
            self.errors.append(f"{entry.get('text')} {entry.get('url', '')}")

    def _message(self) -> dict:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "The browser has said nothing for a minute."
            more = os.read(self._from, 1 << 16)
            assert more, "The browser has ended."
            self._left += more
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)
