"""Runs all parts against servers of their own. usage: suite.py PROGRAM WORK [tools] [page] [full]"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import anthropic_sdk
import openai_sdk
import tools_sdk
from harness import ROOT, Server, Tests

PROGRAM, WORK, OPTIONS = sys.argv[1], pathlib.Path(sys.argv[2]).resolve(), sys.argv[3:]
KEY = "a-key-of-the-tests"
ENCODERS = "tests/fixtures/encoders"


def javascript(tests):
    """tests/server/openai_sdk.mjs, which prints a JSON object for each test."""
    script = WORK / "openai_sdk.mjs"
    script.write_text((ROOT / "tests/server/openai_sdk.mjs").read_text())
    with Server(PROGRAM, key=KEY) as server, Server(PROGRAM, models=ENCODERS) as encoders:
        environment = {**os.environ, "BASE_URL": server.url + "/v1", "ENCODERS_URL": encoders.url + "/v1", "KEY": KEY}
        output = subprocess.run(["node", script], cwd=WORK, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
        results = [json.loads(line) for line in output.stdout.splitlines()]
        for result in results:
            tests.report(f"JavaScript: {result['name']}", result.get("problem"), result["seconds"])
        if output.returncode or not results:
            tests.report("JavaScript: the script", f"it ended with {output.returncode} after {len(results)} tests")
        server.stop()


def schemathesis(tests):
    """Requests made up from the OpenAPI document: no 5xx, and answers as they are described."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    amount = ["--max-examples", "60"] if "full" in OPTIONS else ["--max-examples", "6", "--phases", "fuzzing"]
    # Small answers, so that time goes into requests; a folder of its own, in which downloads may begin.
    models = WORK / "models"
    shutil.copytree(ROOT / "models", models, dirs_exist_ok=True)
    with Server(PROGRAM, "--context-length", "256", models=models) as server:
        command = [WORK / "venv/bin/schemathesis", "run", server.url + "/openapi.json", "--checks", checks, "--seed", "1",
                   "--request-timeout", "60", "--generation-database", "none", *amount]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests/server")}
        output = subprocess.run(command, cwd=WORK, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, timeout=3000)
        tests.report("schemathesis", output.stdout[-6000:] if output.returncode else None)
        said = re.findall(r"(\d+) generated", output.stdout)
        if said:
            print(f"        {said[-1]} requests")
        server.stop()


def main():
    tests = Tests()
    with Server(PROGRAM, key=KEY) as server, Server(PROGRAM, models=ENCODERS) as encoders:
        tests.run("OpenAI", openai_sdk.TESTS, server.url, encoders.url, KEY)
        tests.run("Anthropic", anthropic_sdk.TESTS, server.url, KEY)
        if "tools" in OPTIONS:
            tests.run("Tools", tools_sdk.TESTS, server.url, KEY)
        assert not any(KEY in line for line in server.lines), "the key is in the log"
        server.stop()
    javascript(tests)
    schemathesis(tests)
    if "page" in OPTIONS:
        import page
        page.run(tests, PROGRAM, WORK)
    print(f"{tests.passed} passed, {tests.failed} failed")
    sys.exit(tests.failed > 0)


main()
