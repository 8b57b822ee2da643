"""A headless Chromium that opens pages as a reader does, spoken to over a pipe: no port, no package.

Protocol: https://chromedevtools.github.io/devtools-protocol/, JSON messages that end with a zero byte.
"""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
PATIENCE_S = 120.0

LAYOUT = Path(__file__).with_name("layout.js").read_text()
"""What a reader would miss: elements beyond the right edge, and such as scroll sideways; texts with a contrast below 3
to 1; the tallest stretch (px) without anything; by how much (px) the page itself is too wide."""


def chromium() -> str | None:
    """Chromium's executable; Debian's package `chromium` provides it."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One process; `close` ends it."""

    def __init__(self, executable: str, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        placed = f'exec "$@" 3<&{read} 4>&{write}'  # where the browser looks for its pipe
        self._process = subprocess.Popen(
            ["bash", "-c", placed, "bash", executable, *flags], pass_fds=(read, write), stderr=subprocess.DEVNULL
        )
        for fd in (read, write):
            os.close(fd)
        self._number, self._rest, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises `RuntimeError` for one that is refused."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self.wait_for(lambda heard: heard.get("id") == message["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, wanted: Any) -> dict[str, Any]:
        """The next message that is wanted; events before it are kept in `events`."""
        end = time.monotonic() + PATIENCE_S
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                heard = json.loads(text)
                if "method" in heard:
                    self.events.append(heard)
                if wanted(heard):
                    return heard
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE_S:g} s")
            if not (more := os.read(self._read, 1 << 20)):
                raise EOFError("the browser ended")
            self._rest += more

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


class Page:
    """A page that is open in a window of that size, in light or `dark` mode, on the `screen` or as `print` has it."""

    def __init__(self, browser: Browser, url: str, *, width: int, dark: bool = False, medium: str = "screen") -> None:
        self._browser, self._begin = browser, len(browser.events)
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.call("Page.navigate", url=url)
        browser.wait_for(lambda heard: heard.get("method") == "Page.loadEventFired" and self._own(heard))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript gives, promises awaited. Raises `RuntimeError` for one that throws."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", done))
        return done["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings on its console, and addresses of a network that it asked for."""
        found = []
        for heard in self._browser.events[self._begin :]:
            if not self._own(heard):
                continue
            method, params = heard["method"], heard["params"]
            if method == "Network.requestWillBeSent":
                found += [url for url in [params["request"]["url"]] if not url.startswith(("data:", "file:", "blob:"))]
            elif method in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params)[:300])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(params["args"])[:300])
        return found

    def layout(self) -> dict[str, Any]:
        """`LAYOUT` of this page."""
        return self.evaluate(LAYOUT)

    def close(self) -> None:
        """Close the window."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def _own(self, heard: dict[str, Any]) -> bool:
        return heard.get("sessionId") == self._session
