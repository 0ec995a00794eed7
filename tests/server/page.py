"""The page in headless Chromium, by tests/server/page.mjs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile

from harness import ROOT, Server


@contextlib.contextmanager
def local_hub():
    """The hub of the server's tests in Rust, which has the bundled model as org/tiny."""
    command = ["cargo", "test", "--locked", "--test", "http", "hub::serves_others", "--", "--exact", "--nocapture"]
    environment = {**os.environ, "OMLX_TEST_HUB": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hub:
        yield next(found.group(0) for line in hub.stdout if (found := re.search(r"http://\S+", line)))
        hub.stdin.close()
        hub.stdout.read()


def run(tests, program, work):
    script = work / "page.mjs"
    script.write_text((ROOT / "tests/server/page.mjs").read_text())
    with contextlib.ExitStack() as stack:
        folder, hub = stack.enter_context(tempfile.TemporaryDirectory()), stack.enter_context(local_hub())
        # What is downloaded goes there.
        models = shutil.copytree(ROOT / "models", f"{folder}/models")
        server = stack.enter_context(Server(program, "--cache-dir", f"{folder}/cache", models=models, hub=hub))
        environment = {**os.environ, "URL": server.url, "PICTURES": str(work), "CHROMIUM": shutil.which("chromium") or ""}
        output = subprocess.run(["node", script], cwd=work, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
        for line in output.stdout.splitlines():
            result = json.loads(line)
            tests.report(f"page: {result['name']}", result.get("problem"), result["seconds"])
        if output.returncode:
            tests.report("page: the script", f"it ended with {output.returncode}")
        server.stop()
