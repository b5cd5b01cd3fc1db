"""The shape of the code: which module may know which, and what each of them must leave to others."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.service import ROOT, SECRET

#: From the top to the bottom. A module imports from the lines below its own, and nothing else of the package.
ORDER = """
    __main__
    cli
    wsgi  cli.serve  cli.stream  cli.doctor  cli.callbacks  cli.openapi
    cli.token  cli.following
    cli.checks.configuration  cli.checks.store  cli.checks.models  cli.checks.callbacks
    cli.checks.public  cli.checks.clock  cli.checks.limits  cli.checks.versions
    cli.checks.reach
    cli.checks
    cli.common  cli.eventsource  server
    app  worker
    garbage  patience  turns
    api.demo  api.openapi
    api.contract
    api.init  api.stream  api.client  api.health  api.operator
    limits
    api
    background
    meter
    viewing  delivery  generation
    asking
    follower  writer  recall
    log
    store  providers  outbound
    outbox
    scripts
    connections  pulse
    providers.openai  providers.anthropic  providers.echo
    providers.probing
    providers.wire  providers.translation
    providers.transport
    providers.http1
    providers.failures  providers.adaptation
    providers.base  providers.redaction  providers.bulkhead
    estimate  sockets
    callback  telemetry  metrics  destination
    server_lines
    loglines
    environment  shared_metrics  kernel_limits
    tls
    tokens
    session  tally
    sse
    events
    config
    parse  endpoints  retry_after  installation
    errors  api.readable
"""
#: Who may import from its own line: a viewer in this process reads what the generation here writes.
BESIDE = {"viewing": {"generation"}}

PURE = [
    *("providers.redaction", "callback", "destination", "tokens", "session", "tally", "sse", "events"),
    *("config", "installation", "parse", "endpoints", "retry_after", "errors", "api.readable"),
]
#: What a pure module has no business with: the network, other processes, the disk, chance and the clock.
IMPURE = """
    anthropic asyncio fakeredis flask flask_cors gevent greenlet gunicorn http httpx2 logging multiprocessing openai os pathlib
    queue random redis requests secrets select signal socket ssl structlog subprocess tempfile threading time urllib.request
    urllib3 uuid
"""
#: Foreign packages, and the only places that may know them.
ONLY = {
    "redis": ["store", "scripts", "connections"],
    "fakeredis": ["connections"],
    "openai": ["providers"],
    "anthropic": ["providers"],
    "httpx2": ["providers", "cli"],
    "requests": ["outbound", "cli"],
    "urllib3": ["outbound"],
    "jwt": ["tokens"],
    "flask": ["app", "api", "limits"],
    "flask_cors": ["api"],
    "gunicorn": ["worker", "server_lines"],
    "dotenv": ["environment"],
    "structlog": ["telemetry"],
    "prometheus_client": ["metrics"],
    "rich": ["cli"],
    "tiktoken": ["estimate"],
}


def module_name(path: Path) -> str:
    """`api.init` for aistream/api/init.py, `api` for the package itself, `""` for aistream."""
    parts = path.relative_to(ROOT / "aistream").with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in sorted((ROOT / "aistream").rglob("*.py"))}
NAMES = sorted(set(MODULES) - {""})
LINES = {name: number for number, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported anywhere in a module, in functions too: `package.module` or `package.module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: from {'.' * node.level}{node.module or ''}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The modules of the package that a module imports, the bare package left out."""
    own = [target.removeprefix("aistream.") for target in imported(MODULES[name]) if target.startswith("aistream.")]
    return {target if target in MODULES else target.rpartition(".")[0] for target in own} - {""}


def foreign_imports(name: str) -> set[str]:
    """Every other import of a module, with all its parents: `urllib.parse.urlsplit`, `urllib.parse`, `urllib`."""
    dotted = [target.split(".") for target in imported(MODULES[name]) if not target.startswith("aistream")]
    return {".".join(parts[:count]) for parts in dotted for count in range(1, len(parts) + 1)}


def upward(*names: str) -> list[str]:
    """The imports of these modules that do not point downwards."""
    return [
        f"{name} imports {target}"
        for name in names
        for target in sorted(own_imports(name))
        if LINES[target] <= LINES[name] and target not in BESIDE.get(name, ())
    ]


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(LINES) == NAMES


def test_imports_point_downwards_only() -> None:
    assert upward(*NAMES) == []


def test_the_check_sees_an_import_that_points_upwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "errors", ast.parse("def late():\n    from aistream.api.init import accept\n"))
    monkeypatch.setitem(MODULES, "store", ast.parse("from aistream import outbound, __version__\nimport aistream.config\n"))

    found = upward("errors", "store")

    assert found == ["errors imports api.init", "store imports outbound"]


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_knows_no_network_no_clock_and_no_chance(name: str) -> None:
    assert foreign_imports(name) & set(IMPURE.split()) == set()


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_never_asks_what_time_it_is(name: str) -> None:
    asked = [
        node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today")
    ]

    assert [ast.unparse(node) for node in asked] == []
    assert name == "callback" or "datetime" not in foreign_imports(name)


@pytest.mark.parametrize("package", ONLY)
def test_a_foreign_package_is_known_in_one_place_only(package: str) -> None:
    knowing = [name for name in NAMES if package in foreign_imports(name)]

    assert [name for name in knowing if name.split(".")[0] not in ONLY[package]] == []
    assert knowing != []


def test_importing_the_package_starts_nothing_and_opens_nothing() -> None:
    # urllib3 binds a socket for a moment, to learn whether there is IPv6: what counts is what connects, and what is left.
    script = """
import gc, importlib, pkgutil, socket, sys, threading
import aistream, gevent
doing, started = "", []
sys.addaudithook(lambda event, args: started.append(f"{doing}: {event} {args}") if event in FORBIDDEN else None)
for module in pkgutil.walk_packages(aistream.__path__, "aistream."):
    doing = module.name
    importlib.import_module(module.name)
alive = [one for one in gc.get_objects() if isinstance(one, (gevent.Greenlet, socket.socket))]
print([*started, *alive, *threading.enumerate()[1:]])
"""
    forbidden = {"socket.connect", "socket.getaddrinfo", "_thread.start_new_thread"}

    process = subprocess.run(
        [sys.executable, "-c", script.replace("FORBIDDEN", repr(forbidden))],
        cwd=ROOT,
        env={**os.environ, "DEV_MODE": "true", "JWT_SECRET": SECRET},  # `wsgi` makes the app
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (process.stdout, process.stderr) == ("[]\n", "")


def undocumented(node: ast.AST, prefix: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring. What is inside a function or a private class is not public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from undocumented(child, prefix)
        elif isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            if not ast.get_docstring(child):
                yield f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}{child.name}.")


def test_every_public_name_says_what_it_is_for() -> None:
    modules = [name for name, tree in MODULES.items() if not ast.get_docstring(tree)]
    names = chain.from_iterable(undocumented(tree, f"{name}.") for name, tree in MODULES.items())

    assert [*modules, *names] == []
