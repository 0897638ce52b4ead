"""A headless Chromium for tests, spoken to over its debugging pipe; there is none where none is installed."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--hide-scrollbars")


def found() -> str | None:
    """The program, by $CHROMIUM or by its usual names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; `problems` are what went wrong on it and what it asked for elsewhere."""

    def __init__(self, program: str, profile: Path, width: int = 1000, height: int = 900) -> None:
        ours, theirs = os.pipe(), os.pipe()
        # The browser reads commands at descriptor 3 and writes answers at 4, which the shell puts in place.
        command = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        window = [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", program, *FLAGS, *window, "about:blank"],
            pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self.out, self.into = ours[1], os.fdopen(theirs[0], "rb")
        self.count, self.session, self.problems = 0, "", list[str]()
        page = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        self.into.close()

    def ask(self, method: str, **params: Any) -> Any:
        """One command's answer; what the page reports meanwhile is looked through."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            found = json.loads(self._message())
            if found.get("id") == self.count:
                return found["result"]
            self._look(found.get("method"), found.get("params", {}))

    def _message(self) -> bytes:
        text = bytearray()
        while (byte := self.into.read(1)) not in (b"\0", b""):
            text += byte
        return bytes(text)

    def _look(self, method: str | None, params: Any) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            if not params["request"]["url"].startswith(("http://127.0.0.1:", "blob:", "data:")):
                self.problems.append(f"asks for {params['request']['url']}")

    def open(self, url: str) -> None:
        """Go to a page."""
        self.ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What an expression is on the page."""
        found = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Its first true value."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (expression, self.problems)
            time.sleep(0.1)
        return found

    def drag(self, x: int, y: int, dx: int) -> None:
        """Press at a place, move to the right, let go."""
        for kind, at in (("Pressed", 0), ("Moved", dx // 2), ("Moved", dx), ("Released", dx)):
            where = {"x": x + at, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=f"mouse{kind}", **where)

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
