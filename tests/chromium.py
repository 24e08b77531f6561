"""A real headless Chromium, spoken to over its debugging pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Chromium:
    """One browser without network; `open` gives a page in it."""

    def __init__(self) -> None:
        assert FOUND is not None
        self._home = TemporaryDirectory()
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = [
            FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={self._home.name}", "about:blank",
        ]  # fmt: skip
        # The browser reads from 3 and writes to 4.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser), os.close(from_browser)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Return once an event has come."""
        while not any(one.get("method") == event for one in self.events):
            self.events.append(self._read())

    def open(self, file: Path, width: int, dark: bool = False) -> Page:
        """A page that is loaded, as wide as asked."""
        self.events = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable", session)
        self.ask(
            "Network.emulateNetworkConditions",
            session,
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", session, features=[theme])
        self.ask("Page.navigate", session, url=file.as_uri())
        self.wait_for("Page.loadEventFired")
        return Page(self, session)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 20)
            assert piece, "Chromium ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)
        self._home.cleanup()


class Page:
    """A loaded page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser, self.session = browser, session

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = self.browser.ask("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def nodes(self) -> list[tuple[str, str]]:
        """(role, name) of everything in the accessibility tree that is not ignored."""
        tree = self.browser.ask("Accessibility.getFullAXTree", self.session)["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree
            if not node["ignored"] and "role" in node
        ]

    def complaints(self) -> list[str]:
        """What stands in the console, and every request but for the page itself."""
        said = []
        for event in self.browser.events:
            about = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled" or event.get("method") == "Runtime.exceptionThrown":
                said.append(json.dumps(about)[:500])
            elif event.get("method") == "Log.entryAdded":
                said.append(about["entry"]["text"])
            elif event.get("method") == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
                ("file:", "data:")
            ):
                said.append(f"asks for {about['request']['url']}")
        return said

    def picture(self, file: Path) -> None:
        """Save the whole page as PNG."""
        shot = self.browser.ask("Page.captureScreenshot", self.session, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
