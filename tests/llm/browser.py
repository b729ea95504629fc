"""A headless Chromium, which is told what to do through a pair of pipes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# It reads from descriptor 3 and writes to 4.
BEGIN = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """`hosts` are names that lead to this machine; there are no others."""

    def __init__(self, *hosts: str) -> None:
        assert PROGRAM
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        names = ", ".join(f"MAP {host} 127.0.0.1" for host in hosts)
        flags = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={self.folder.name}",
            f"--host-resolver-rules={names}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]  # fmt: skip
        (there, orders), (news, here) = os.pipe(), os.pipe()
        self.child = subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(there), str(here), PROGRAM, *flags],
            pass_fds=(there, here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(here)
        self.orders, self.news = os.fdopen(orders, "wb", 0), os.fdopen(news, "rb")
        self.numbers = itertools.count(1)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number, told = next(self.numbers), b""
        order = {"id": number, "method": method, "params": params}
        self.orders.write(json.dumps(order | ({"sessionId": session} if session else {})).encode())
        self.orders.write(b"\0")
        while True:  # events come between
            told += self.news.read1(1 << 16)  # type: ignore[attr-defined]
            assert told, "the browser has ended"
            *whole, told = told.split(b"\0")
            for answer in map(json.loads, whole):
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    return answer["result"]

    def end(self) -> None:
        self.orders.close()  # by which it ends
        try:
            self.child.wait(20)
        finally:
            self.child.kill()
            self.child.wait()
            self.news.close()
            self.folder.cleanup()


class Tab:
    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url=url)["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = attached["sessionId"]
        self.wait(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, or what a promise comes to."""
        told = self.browser.call(
            "Runtime.evaluate", self.session, expression=script, awaitPromise=True,
            returnByValue=True,
        )  # fmt: skip
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
