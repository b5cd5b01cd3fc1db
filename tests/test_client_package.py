"""The package `aistream-client`: built from its source, tested by its own tests, packed, and installed where nothing else is."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import aistream
from tests.conftest import missing
from tests.service import ROOT
from tests.test_client import FILES, FOLDER, NODE_PATH

PACKAGE = ROOT / "clients" / "js"
TOOLS = Path(sys.prefix) / "npm" / "node_modules"
#: Bytes of each built file, gzipped.
MOST_BYTES = 3_000


def run(folder: Path, *command: str, fails: bool = False) -> str:
    """Runs it; what it printed. npm is not to ask anybody."""
    environ = {"PATH": NODE_PATH, "HOME": str(folder), "npm_config_offline": "true", "npm_config_audit": "false"}
    environ |= {"npm_config_fund": "false", "npm_config_update_notifier": "false"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package in another place, built there."""
    if shutil.which("node", path=NODE_PATH) is None or not (TOOLS / "esbuild").exists():
        missing("Node.js with the packages of tests/tools")
    folder = tmp_path_factory.mktemp("client") / "js"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("dist", "node_modules"))
    (folder / "node_modules").symlink_to(TOOLS)
    run(folder, "npm", "run", "build")
    return folder


@pytest.fixture(scope="module")
def packed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `npm pack` makes of it."""
    folder = tmp_path_factory.mktemp("packed")
    run(built, "npm", "pack", "--pack-destination", str(folder))
    (tarball,) = folder.iterdir()
    return tarball


@pytest.fixture
def project(packed: Path, tmp_path: Path) -> Iterator[Path]:
    """An empty project that has installed it, offline."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "package.json").write_text('{"name": "empty", "private": true, "type": "module"}')
    run(folder, "npm", "install", str(packed))
    yield folder


def test_the_client_passes_its_own_tests(built: Path) -> None:
    tests = sorted(str(one) for one in (built / "test").glob("*.test.mjs"))

    told = run(built, "node", "--test", "--test-reporter=tap", *tests)

    counts = dict(re.findall(r"^# (tests|pass|fail|skipped) (\d+)$", told, re.MULTILINE))
    assert int(counts["tests"]) > 100
    assert (counts["pass"], counts["fail"], counts["skipped"]) == (counts["tests"], "0", "0")


@pytest.mark.parametrize("name", FILES)
def test_what_the_service_serves_is_the_build_byte_for_byte(built: Path, name: str) -> None:
    assert (built / "dist" / name).read_bytes() == (FOLDER / name).read_bytes(), "make client builds it anew"


@pytest.mark.parametrize("name", FILES)
def test_the_client_is_small(name: str) -> None:
    assert len(gzip.compress((FOLDER / name).read_bytes())) < MOST_BYTES


def test_the_package_holds_what_is_built_and_nothing_else(packed: Path) -> None:
    with tarfile.open(packed) as tar:
        names = {name.removeprefix("package/") for name in tar.getnames()}

    types = {f"dist/{one.stem}.d.ts" for one in (PACKAGE / "src").glob("*.ts") if one.stem != "global"}
    assert names == {"package.json", "README.md", "LICENSE", *types, *(f"dist/{name}" for name in FILES)}


def test_the_packages_manifest_is_true() -> None:
    manifest = json.loads((PACKAGE / "package.json").read_text())
    locked = json.loads((PACKAGE / "package-lock.json").read_text())
    tools = json.loads((ROOT / "tests" / "tools" / "package.json").read_text())["devDependencies"]

    assert manifest["version"] == locked["version"] == aistream.__version__
    assert not {"dependencies", "peerDependencies", "optionalDependencies", "bundleDependencies"} & manifest.keys()
    assert manifest["devDependencies"] == {name: tools[name] for name in ("esbuild", "typescript")}
    assert locked["packages"][""]["devDependencies"] == manifest["devDependencies"]
    assert next(iter(manifest["exports"]["."])) == "types"


LOOK = """
import * as client from "aistream-client";
console.log(JSON.stringify(Object.keys(client).sort()), new client.StreamError("c", "m", true, 429) instanceof Error);
"""
EXPORTED = '["StreamError","connectToStream","stream"]'


def test_the_packed_package_installs_offline_and_runs(project: Path) -> None:
    (project / "look.mjs").write_text(LOOK)

    told = run(project, "node", "look.mjs")

    assert told == f"{EXPORTED} true\n"


def test_the_plain_script_sets_one_global_and_nothing_else(project: Path) -> None:
    script = """
const fs = require("node:fs"), vm = require("node:vm");
const page = vm.createContext({});
vm.runInContext(fs.readFileSync("node_modules/aistream-client/dist/aistream.js", "utf8"), page);
console.log(JSON.stringify([Object.keys(page), Object.keys(page.aistream).sort()]));
"""

    told = run(project, "node", "--input-type=commonjs", "-e", script)

    assert told == f'[["aistream"],{EXPORTED}]\n'


#: Every option and all that comes back.
USES = """
import {
  StreamError, connectToStream, stream,
  type CommonOptions, type Connection, type Ending, type Lost, type Opened, type Options, type Start, type TextStream, type Usage,
} from "aistream-client";

const common: Required<Omit<CommonOptions, "fetch" | "signal">> & CommonOptions = {
  onReasoning(chunk: string) { chunk.trim(); },
  onUsage({ input_tokens, output_tokens, cached_input_tokens, reasoning_tokens, source, estimated_by }: Usage) {
    const sum: number = input_tokens + output_tokens + cached_input_tokens + reasoning_tokens;
    const by: string | null = source === "provider" ? null : estimated_by;
    console.log(sum, by);
  },
  onStart({ streamId, model, provider }: Start) { console.log(streamId + model + provider); },
  onOpen({ reconnects, lastEventId }: Opened) { console.log(reconnects.toFixed(), lastEventId); },
  onReconnect({ attempt, delay, reason, lastEventId }: Lost) { console.log(attempt + delay, reason + lastEventId); },
  signal: new AbortController().signal,
  lastEventId: "1-1",
  fetch: globalThis.fetch,
  silence: 45_000,
};
const options: Options = {
  ...common,
  onMessage(chunk: string, id: string) { console.log(chunk + id); },
  onComplete({ status, finishReason }: Ending) {
    const known: "completed" | "cancelled" = status;
    const reason: string = finishReason ?? known;
    console.log(reason);
  },
  onError(error: StreamError) {
    const { code, retryable, status, message }: { code: string; retryable: boolean; status?: number; message: string } = error;
    console.log(code, retryable, status, message);
  },
};
const connection: Connection = connectToStream("/stream/1", options);
const id: string = connection.lastEventId;
const done: Promise<void> = connection.done;
const status: Promise<string> = connection.cancel();
connection.close();
connectToStream(new URL("https://a.test/stream/1"));
connectToStream("/stream/1", { onMessage: async (chunk) => { await Promise.resolve(chunk); } });

const answer: TextStream = stream(new URL("https://a.test/stream/1"), common);
export async function all(): Promise<string> {
  let text = "";
  for await (const chunk of answer) text += chunk.toUpperCase();
  const usage: Usage | null = answer.usage;
  const ending: Ending | null = answer.ending;
  const last: string = answer.lastEventId;
  const stopped: string = await answer.cancel();
  answer.close();
  return text + usage?.output_tokens + ending?.status + last + stopped;
}
export { id, done, status };
"""
#: Each line is wrong.
MISUSES = """
connectToStream();
connectToStream(1);
connectToStream("/a", { onmessage: () => undefined });
connectToStream("/a", { onMessage: (chunk: number) => undefined });
connectToStream("/a", { silence: "1" });
connectToStream("/a").addEventListener("message", () => undefined);
connectToStream("/a").lastEventId = "1-1";
connectToStream("/a", { onComplete: ({ status }) => status === "failed" });
stream("/a", { onMessage: () => undefined });
for await (const chunk of stream("/a")) chunk.toFixed();
new StreamError("code").code = "b";
"""


@pytest.mark.parametrize(
    "resolution",
    [["--module", "nodenext"], ["--module", "esnext", "--moduleResolution", "bundler"]],
    ids=["nodenext", "bundler"],
)
def test_the_types_compile_strictly_and_what_is_wrong_does_not(project: Path, resolution: list[str]) -> None:
    tsc = [str(TOOLS / ".bin" / "tsc"), "--noEmit", "--strict", "--exactOptionalPropertyTypes", "--target", "es2022"]
    tsc += ["--lib", "es2022,dom", *resolution]
    (project / "uses.ts").write_text(USES)
    (project / "misuses.ts").write_text('import { StreamError, connectToStream, stream } from "aistream-client";' + MISUSES)

    run(project, *tsc, "uses.ts")
    told = run(project, *tsc, "misuses.ts", fails=True)

    wrong = {int(line) for line in re.findall(r"^misuses\.ts\((\d+),", told, re.MULTILINE)}
    assert wrong == set(range(2, 2 + len(MISUSES.strip().splitlines())))
