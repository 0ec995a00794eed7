"""A started server, and a list of tests that report by name."""

import os
import pathlib
import re
import subprocess
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Server:
    """omlx-server on a port of its own."""

    def __init__(self, program, *arguments, models="models", key=None, hub=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMLX_SERVER_")}
        # Nothing is fetched from elsewhere.
        environment.update({"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"} if hub else {"HF_HUB_OFFLINE": "1"})
        if key:
            environment["OMLX_SERVER_API_KEY"] = key
        command = [program, "serve", "--port", "0", "--device", "cpu", "--models", str(ROOT / models), *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        listening = threading.Event()

        def read():
            for line in self.process.stderr:
                self.lines.append(line)
                if "listening" in line:
                    listening.set()
            listening.set()

        threading.Thread(target=read, daemon=True).start()
        listening.wait(60)
        found = re.search(r"http://[^\"]+", "".join(self.lines))
        if not found:
            raise RuntimeError("the server does not listen:\n" + "".join(self.lines))
        self.url = found.group(0)

    def stop(self):
        """Asks it to end; it must do so without an error."""
        self.process.terminate()
        status = self.process.wait(60)
        assert status == 0, f"the server ended with {status}"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()


class Tests:
    """Runs tests one by one and counts."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def report(self, name, problem, seconds=0.0):
        if problem is None:
            self.passed += 1
            print(f"ok      {name} ({seconds:.1f} s)", flush=True)
        else:
            self.failed += 1
            print(f"FAILED  {name}\n{problem}", flush=True)

    def run(self, group, functions, *arguments):
        for function in functions:
            began = time.monotonic()
            try:
                function(*arguments)
                problem = None
            except Exception:
                problem = traceback.format_exc()
            self.report(f"{group}: {function.__name__.replace('_', ' ')}", problem, time.monotonic() - began)
