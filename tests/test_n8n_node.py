"""Our n8n node, built from its source, and its own tests, run under Node.js against the built files.

`make test-n8n` does the same with n8n's own tools, lints it, and runs it in a real n8n.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

from aistream.api.init import InitRequest
from aistream.callback import Answer as Said
from aistream.callback import meaning
from aistream.endpoints import Effort
from tests.conftest import missing
from tests.service import ROOT
from tests.test_callback import sent, session

PACKAGE = ROOT / "n8n" / "n8n-nodes-aistream"
PATH = f"{sys.prefix}/bin:{os.environ['PATH']}"  # `make test` may have put Node.js into the venv


def run(folder: Path, *command: str) -> str:
    """Runs it; what it printed."""
    environ = {"PATH": PATH, "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_node_is_built_and_passes_its_own_tests(tmp_path: Path) -> None:
    packages = Path(sys.prefix) / "npm" / "node_modules"
    if shutil.which("node", path=PATH) is None or not packages.exists():
        missing("Node.js with the packages of tests/tools")
    built = tmp_path / "node"
    shutil.copytree(PACKAGE, built, ignore=shutil.ignore_patterns("dist", "node_modules"))
    (built / "node_modules").symlink_to(packages)

    run(built, "node_modules/.bin/tsc", "--project", ".")
    shutil.copytree(built / "icons", built / "dist" / "icons")  # as n8n's own build does
    told = run(built, "node", "--test", "--test-reporter=tap", *sorted(str(one) for one in (built / "test").glob("*.test.mjs")))

    counts = dict(re.findall(r"^# (tests|pass|fail|skipped) (\d+)$", told, re.MULTILINE))
    assert int(counts["tests"]) > 70
    assert (counts["pass"], counts["fail"], counts["skipped"]) == (counts["tests"], "0", "0")


def test_the_tools_of_the_tests_are_those_that_the_package_names() -> None:
    named = json.loads((PACKAGE / "package.json").read_text())["devDependencies"]
    used = json.loads((ROOT / "tests" / "tools" / "package.json").read_text())["devDependencies"]
    locked = json.loads((PACKAGE / "package-lock.json").read_text())["packages"]

    for name in ("typescript", "standardwebhooks"):
        assert used[name] == named[name]
    for name in ("n8n-workflow", "@types/node"):
        assert used[name] == locked[f"node_modules/{name}"]["version"]


def test_the_node_asks_with_all_fields_that_the_service_takes() -> None:
    source = (PACKAGE / "nodes" / "AiStream" / "request.ts").read_text()
    table = source.partition("const FIELDS")[2].partition("};")[0]
    asked = re.findall(r"^\t\w+: '(\w+)',$", table, re.MULTILINE) + re.findall(r"put\(body, '(\w+)'", source)

    # The token goes in the header, and prompt and resumeUrl are always there.
    assert {*asked, "n8nToken", "prompt", "resumeUrl"} == set(InitRequest.model_fields)


def test_the_node_offers_every_reasoning_effort_that_the_service_takes() -> None:
    source = (PACKAGE / "nodes" / "AiStream" / "properties.ts").read_text()
    option = source.partition("name: 'reasoningEffort'")[2].partition("default:")[0]

    assert sorted(re.findall(r"value: '(\w+)'", option)) == sorted(get_args(Effort))


def test_an_item_without_a_callback_has_the_fields_of_a_callback() -> None:
    source = (PACKAGE / "nodes" / "AiStream" / "callback.ts").read_text()
    item = source.partition("export function withoutCallback(")[2].partition("\n}\n")[0].partition("return {")[2]
    told = sent(session())

    assert re.findall(r"^\t\t(\w+)[:,]", item, re.MULTILINE) == list(told)
    for field in ("usage", "timings"):
        inside = item.partition(f"{field}: {{")[2].partition("}")[0]
        assert re.findall(r"^\t\t\t(\w+):", inside, re.MULTILINE) == list(told[field])


def test_what_the_node_answers_means_to_the_sender_what_it_is_meant_to() -> None:
    folder = PACKAGE / "nodes" / "AiStream"
    sources = (folder / "callback.ts").read_text() + (folder / "AiStream.node.ts").read_text()
    answered = re.findall(r"(?:refuse\(|kind: 'answer', status: |reply\(this, )(\d{3})", sources)
    meanings = {status: type(meaning(Said(status, "application/json", "{}"), ambiguous=True)).__name__ for status in ANSWERS}

    assert {int(status) for status in answered} == set(ANSWERS)
    assert meanings == ANSWERS


#: Received before; no callback at all; not signed by us; another stream's; a wait that is over; not verified.
ANSWERS = {200: "Delivered", 400: "Dead", 401: "Dead", 404: "Dead", 409: "Delivered", 503: "Retry"}
