"""A real browser for tests: Chromium without a window, driven by its DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page in a browser that has no network: `with Browser(width, height) as browser`.

    Attributes:
        problems: Errors and warnings of the page, and requests for anything but the page itself.
    """

    def __init__(self, width=1280, height=900, *, is_dark=False):
        self._size, self._is_dark = (width, height), is_dark
        self.problems = []

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        # The browser reads commands from its descriptor 3, and writes answers to its descriptor 4.
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--proxy-server=127.0.0.1:9", f"--user-data-dir={self._folder.name}", "about:blank"]
        # Not by a shell, as some know no descriptors above 9.
        program = "import os, sys; r, w = map(int, sys.argv[1:3]); r, w = os.dup(r), os.dup(w); "
        program += "os.dup2(r, 3); os.dup2(w, 4); os.set_inheritable(3, True); os.set_inheritable(4, True); "
        program += "os.execv(sys.argv[3], sys.argv[3:])"
        command = [sys.executable, "-c", program, str(read), str(write), *command]
        self._process = subprocess.Popen(
            command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = self._size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = "dark" if self._is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return self

    def __exit__(self, *_):
        os.close(self._write)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._folder.cleanup()

    def call(self, method, **parameters):
        """Send a command, and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, path):
        """Open a file and wait until it is loaded."""
        self._url = f"file://{path}"
        self._is_loaded = False
        self.call("Page.navigate", url=self._url)
        while not self._is_loaded:
            self._next()

    def run(self, program):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=program, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def point(self, selector, *, click=False, scroll=True):
        """Move the mouse to the middle of an element, and click there if asked to."""
        if scroll:
            self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y = self.run(
            f"(() => {{ const r = document.querySelector({selector!r}).getClientRects()[0];"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def select(self, selector, value):
        """Choose an option of a select element, or set a slider."""
        self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.value = {value!r};"
            " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def text(self, selector):
        """The visible text of an element."""
        return self.run(f"document.querySelector({selector!r}).innerText")

    def picture(self, path, *, whole=False):
        """Write a screenshot as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def _next(self):
        """The next message of the browser."""
        while b"\0" not in self._rest:
            part = os.read(self._read, 2**16)
            if not part:
                raise RuntimeError("the browser has gone")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method, event):
        """Keep what a page should not do."""
        if method == "Page.loadEventFired":
            self._is_loaded = True
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str(event["args"]))
        elif method == "Log.entryAdded":
            self.problems.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent" and event["request"]["url"] != getattr(self, "_url", None):
            self.problems.append(f"requested {event['request']['url']}")
