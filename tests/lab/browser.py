"""Chromium without a window, driven by its own protocol over a pipe. Needs nothing but Chromium."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# Chromium reads commands from descriptor 3 and writes answers to 4.
LAUNCHER = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--hide-scrollbars",
)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Tab": 9}
SHIFT = 8


class Page:
    """A tab."""

    def __init__(self, commands: Any, answers: Any):
        self._commands = commands
        self._answers = answers
        self._count = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._events: set[str] = set()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Carry out a command and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            message += byte
        answer = json.loads(message)
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method:
            self._events.add(method)
        return answer

    def view(self, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the window, and whether its user likes it dark."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def open(self, path: Path) -> None:
        """Go to a file and wait until it is loaded."""
        self._events.discard("Page.loadEventFired")
        self.send("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def centre(self, selector: str, part: float = 0.5) -> tuple[float, float]:
        """Return a point of an element, scrolled into view: `part` of its width from its left."""
        x, y = self.evaluate(
            f"(() => {{ const n = document.querySelector({selector!r});"
            "n.scrollIntoView({block: 'center', inline: 'center'});"
            f"const b = n.getBoundingClientRect(); return [b.x + {part} * b.width,"
            "b.y + b.height / 2] })()"
        )
        return x, y

    def point(self, selector: str, part: float = 0.5) -> None:
        """Move the mouse to an element."""
        x, y = self.centre(selector, part)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, part: float = 0.5) -> None:
        x, y = self.centre(selector, part)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key of ``KEYS``."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
                modifiers=SHIFT if shift else 0,
            )

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.send("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        """Return a PNG of the window."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty folder as its profile, and yield a page of it."""
    assert CHROMIUM is not None
    read_command, write_command = os.pipe()
    read_answer, write_answer = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", LAUNCHER, str(read_command), str(write_answer), CHROMIUM),
            *(*FLAGS, f"--user-data-dir={profile}", "about:blank"),
        ],
        pass_fds=(read_command, write_answer),
        stderr=subprocess.DEVNULL,
    )
    os.close(read_command)
    os.close(write_answer)
    with os.fdopen(write_command, "wb") as commands, os.fdopen(read_answer, "rb") as answers:
        try:
            yield Page(commands, answers)
        finally:
            process.terminate()
            process.wait(20)
