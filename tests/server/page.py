"""The page in headless Chromium, by tests/server/page.mjs."""

import json
import os
import shutil
import subprocess
import tempfile

from harness import ROOT, Server


def run(tests, program, work):
    script = work / "page.mjs"
    script.write_text((ROOT / "tests/server/page.mjs").read_text())
    with tempfile.TemporaryDirectory() as cache, Server(program, "--cache-dir", cache) as server:
        environment = {**os.environ, "URL": server.url, "PICTURES": str(work), "CHROMIUM": shutil.which("chromium") or ""}
        output = subprocess.run(["node", script], cwd=work, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
        for line in output.stdout.splitlines():
            result = json.loads(line)
            tests.report(f"page: {result['name']}", result.get("problem"), result["seconds"])
        if output.returncode:
            tests.report("page: the script", f"it ended with {output.returncode}")
        server.stop()
