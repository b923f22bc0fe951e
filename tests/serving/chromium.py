"""A headless browser, asked over its own pipes: pages, real keys and pointer, screenshots."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 30.0  # seconds for any one wait: the machine may be busy
KEYS = {
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "Tab": 9,
}


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def _pipe() -> list[int]:
    """Both ends of a pipe, clear of the numbers 3 and 4, which the browser gets."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return high


class Browser:
    """One page of one browser. Errors of the page's scripts are kept in `errors`."""

    def __init__(self, folder: Path) -> None:
        command = find_browser()
        assert command, f"no browser: none of {', '.join(NAMES)} is installed"
        (theirs_in, self._out), (self._in, theirs_out) = _pipe(), _pipe()
        # It is spoken to over 3 and 4. A shell sets them, for both may be taken in this process.
        shell = ["bash", "-c", 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"']
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        more = [*flags, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [*shell, str(theirs_in), str(theirs_out), command, *more],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs_in, theirs_out):
            os.close(end)
        self._rest, self._number, self._session, self.errors = b"", 0, "", []
        page = self._wait_for(self._page)
        told = self.tell("Target.attachToTarget", targetId=page, flatten=True)
        self._session = told["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.tell(f"{domain}.enable")

    def _page(self) -> str | None:
        targets = self.tell("Target.getTargets")["targetInfos"]
        return next((x["targetId"] for x in targets if x["type"] == "page"), None)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser does not answer"
            read = os.read(self._in, 1 << 16)
            assert read, "the browser ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def tell(self, method: str, **params: Any) -> Any:
        """One command of the browser's protocol, and its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        body = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._out, json.dumps(body).encode() + b"\0")
        while (message := self._message()).get("id") != self._number:
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.tell(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def _wait_for(self, ask: Any) -> Any:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if found := ask():
                return found
            time.sleep(0.03)
        return None

    def wait(self, script: str) -> Any:
        """The expression's first true value."""
        found = self._wait_for(lambda: self.ask(script))
        assert found, (
            f"not within {PATIENCE:.0f} s: {script}\n{self.ask('document.body.innerText')}"
        )
        return found

    def open(self, url: str) -> None:
        self.tell("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith('{url}')")

    def press(self, key: str, *, shift: bool = False) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        about["modifiers"] = 8 if shift else 0
        self.tell("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.tell("Input.insertText", text=text)

    def point(self, element: str) -> dict[str, float]:
        """Moves the pointer to an element, given by an expression."""
        box = self.ask(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'nearest'}});"
            "const b = e.getClientRects()[0];"
            "return {x: b.x + b.width / 2, y: b.y + b.height / 2}; })()"
        )
        self.tell("Input.dispatchMouseEvent", type="mouseMoved", **box)
        return box

    def click(self, element: str) -> None:
        box = self.point(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def show(self, *, dark: bool = False, width: int = 1100, height: int = 800) -> None:
        """Sets the window and the theme."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tell("Emulation.setEmulatedMedia", features=theme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._session = ""
        self.tell("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._in)
        os.close(self._out)
