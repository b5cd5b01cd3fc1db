"""The code in the documentation: its blocks, what each says of itself, and what can be told of it without running it.

A block has a language. `text` is nothing to run; json, yaml, toml, ini and dotenv are read; every other one is run in a scene of
tests/doc_scenes.py, or says why it is not, by a comment on the line before its fence:

    <!-- run: shell -->                  in this scene
    <!-- run: shell, continued -->       the same, after the block before it that is run
    <!-- not run: it needs a Docker engine; test_compose.py reads the file -->

`python -m tests.doc_blocks` lists what is not run.
"""

import configparser
import dataclasses
import io
import json
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from dotenv import dotenv_values
from markdown_it import MarkdownIt
from markdown_it.token import Token

from aistream.cli import main as shell
from aistream.config import Config, settings
from aistream.errors import ConfigError
from aistream.installation import VARIABLES
from tests.service import ROOT

#: A reason has at least so many words.
REASON_WORDS = 4
#: What a text begins with that should have been a block of bash: nothing would look at it.
COMMANDS = re.compile(
    "aistream|apt-get|bash|cd|cp|curl|docker|export|flask|git|gunicorn|kubectl|make|mkdir|node|npm|npx|pip|python3?|redis-cli|sed|sh"
    "|source|sudo|systemctl|tar|uv"
)
#: Variables that are neither a setting of the service nor the compose file's, and whose they are.
OTHERS = {
    "ALL_PROXY": "HTTP libraries'",
    "COMPOSE_PROFILES": "Docker Compose's",
    "EXECUTIONS_DATA_MAX_AGE": "n8n's",
    "EXECUTIONS_DATA_PRUNE": "n8n's",
    "HTTPS_PROXY": "HTTP libraries'",
    "HTTP_PROXY": "HTTP libraries'",
    "N8N_CONCURRENCY_PRODUCTION_LIMIT": "n8n's",
    "N8N_CUSTOM_EXTENSIONS": "n8n's",
    "N8N_PAYLOAD_SIZE_MAX": "n8n's",
    "N8N_SSRF_ALLOWED_HOSTNAMES": "n8n's",
    "N8N_SSRF_PROTECTION_ENABLED": "n8n's",
    "NO_PROXY": "HTTP libraries'",
    "OPENAI_LOG": "the SDK's",
    "PROMETHEUS_MULTIPROC_DIR": "prometheus-client's",
    "PYTHONMALLOC": "Python's",
    "SOURCE_DATE_EPOCH": "reproducible builds'",
    "SSL_CERT_DIR": "OpenSSL's",
    "SSL_CERT_FILE": "OpenSSL's",
    "TCP_USER_TIMEOUT": "the kernel's, for a socket",
    "TIKTOKEN_CACHE_DIR": "tiktoken's",
    "WEBHOOK_URL": "n8n's",
}
#: Paths that the reader makes, and where that is said.
MADE = {
    "deploy/models/models.toml": "deploy/models/README.md",
}
#: Folders of the checkout: what begins with one is a path.
FOLDERS = ("aistream", "bench", "clients", "deploy", "docs", "n8n", "scripts", "tests", ".ci", ".github")

_COMMENT = re.compile(r"<!-- ((?:not )?run:.*?) *-->")
_MARK = re.compile(r"(?P<kind>run|not run): *(?P<what>.*?)(?P<continued>, continued)?")
_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code. `heading` is the one above it, `number` counts under that heading, `line` is its fence's.

    `scene` and `reason`: where it is run, or why it is not; `before`: the blocks that are run first, in the same place.
    """

    page: str
    heading: str
    number: int
    line: int
    language: str
    text: str
    scene: str = ""
    reason: str | None = None
    before: "tuple[Block, ...]" = ()

    @property
    def id(self) -> str:
        """Its name, as long as its heading stays."""
        return f"{self.page}#{self.heading}-{self.number}"

    @property
    def place(self) -> str:
        """Where an editor finds it."""
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """Its text, behind that of the blocks before it."""
        return "".join(block.text for block in (*self.before, self))


def pages() -> list[str]:
    """Every page of the documentation, as a path from the checkout's root."""
    patterns = ("*.md", "docs/**/*.md", "deploy/**/*.md", "clients/*/README.md", "n8n/*/README.md", ".github/*.md")
    found = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found - {"CHANGELOG.md"})


def blocks(text: str, page: str) -> list[Block]:
    """The blocks of a page's text, those in lists too, in order."""
    lines = text.split("\n")
    counts: Counter[str] = Counter()
    heading, ran, found = "top", None, []
    tokens = _MARKDOWN.parse(text)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and following is not None:
            heading = _slug(following.content)
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        counts[heading] += 1
        block = Block(page, heading, counts[heading], token.map[0] + 1, token.info.strip(), token.content)
        comment = _COMMENT.fullmatch(lines[token.map[0] - 1].strip()) if token.map[0] else None
        if comment and (mark := _MARK.fullmatch(comment[1])):
            if mark["kind"] == "not run":
                block = dataclasses.replace(block, reason=mark["what"] + (mark["continued"] or ""))
            else:
                before = (*ran.before, ran) if mark["continued"] and ran else ()
                ran = block = dataclasses.replace(block, scene=mark["what"], before=before)
        found.append(block)
    return found


def stray_marks(text: str, page: str) -> list[str]:
    """The marks of a page that stand before no block, and so count for nothing."""
    used = {block.line - 1 for block in blocks(text, page) if block.scene or block.reason is not None}
    comments = [token for token in _MARKDOWN.parse(text) if token.type == "html_block" and token.map is not None]
    marks = [token.map[0] + 1 for token in comments if token.map is not None and _COMMENT.search(token.content)]
    return [f"{page}:{number}: a mark that is not on the line before a block" for number in marks if number not in used]


def fault(block: Block, scenes: Sequence[str]) -> str:
    """What is wrong with a block as it stands, before anything is run; empty if nothing is."""
    marked = bool(block.scene) or block.reason is not None
    if not block.language:
        return "has no language: `text` where there is nothing to run"
    if block.language == "text":
        words = block.text.split()  # behind a prompt, "$ ", stands what was typed with what it printed
        if words and COMMANDS.fullmatch(words[0].rpartition("/")[2]):
            return f"is called text, and begins with the command {words[0]}"
        if marked:
            return "is called text, and has a mark"
        typed = re.findall(r"^\$ (.*)", block.text, re.MULTILINE)
        return "; ".join(found for line in typed for found in _faults_of_commands(line, assignments=True))
    if block.language in DATA:
        try:
            DATA[block.language](block.text)
        except (ValueError, ConfigError, yaml.YAMLError, configparser.Error) as error:
            return f"is no {block.language}: {_told(error)}"
    elif not marked:
        return "says neither in which scene it is run nor why it is not"
    if block.scene and block.scene not in scenes:
        return f"is run in {block.scene!r}, which is none of {', '.join(scenes)}"
    if block.reason is not None and len(block.reason.split()) < REASON_WORDS:
        return "is not run, and the reason is missing"
    return "; ".join(_faults_of_script(block.text)) if block.language in ("bash", "sh") else ""


def inline(text: str) -> Iterator[str]:
    """Every piece of code within a page's sentences and tables."""

    def walk(tokens: Sequence[Token]) -> Iterator[str]:
        for token in tokens:
            if token.type == "code_inline":
                yield token.content
            yield from walk(token.children or [])

    return walk(_MARKDOWN.parse(text))


def faults_of_code(code: str, page: str) -> list[str]:
    """What a piece of code in a sentence names, and there is not: a target, a command, an option, a variable, a path."""
    if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", code):
        return [] if _known(code) else [f"{code} is no variable"]
    return [*_faults_of_commands(code, assignments=True), *_missing_paths(code, page)]


# Data


def _told(error: Exception) -> str:
    return "; ".join(error.faults) if isinstance(error, ConfigError) else str(error)


def _json(text: str) -> Any:
    return json.loads(text)


def _yaml(text: str) -> Any:
    return list(yaml.safe_load_all(text))


def _ini(text: str) -> Any:
    """With sections as systemd has it, without any a `.env`. Raises ValueError."""
    if not re.search(r"^\[", text, re.MULTILINE):
        return _dotenv(text)
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def _dotenv(text: str) -> Any:
    """Variables that there are, with values that the service takes. Raises ValueError, ConfigError."""
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    wrong = [name for name in values if not _known(name)]
    if wrong or None in values.values():
        raise ValueError(f"not a variable of anything: {', '.join(wrong)}" if wrong else "a line without a =")
    given = {name: value for name, value in values.items() if value and name in settings()}
    required = {
        "JWT_SECRET": "x" * 32,
        "BASE_URL": "http://127.0.0.1:8000",
        "RESUME_URL_ALLOWED_ORIGINS": "http://n8n:5678",
        "ALLOWED_ORIGINS": "http://localhost:3000",
        "OPENAI_API_KEY": "a key",
        **({"REDIS_URL": "redis://redis"} if "REDIS_URL" not in given else {}),
    }
    Config.from_env(required | given, lambda path: "")
    return values


#: How what is only read is read.
DATA: dict[str, Callable[[str], Any]] = {"json": _json, "yaml": _yaml, "toml": tomllib.loads, "ini": _ini, "dotenv": _dotenv}


def _known(variable: str) -> bool:
    return variable in settings() or variable in OTHERS or variable in {one.name for one in VARIABLES} | _makefile()[1]


# Commands


def _makefile() -> tuple[set[str], set[str]]:
    """Its targets and its variables."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z0-9-]*):(?!=)", text, re.MULTILINE)
    return set(targets), set(re.findall(r"^([A-Z_0-9]+) *[?:]?=", text, re.MULTILINE))


def _faults_of_script(text: str) -> list[str]:
    syntax = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if syntax.returncode:
        return [f"is no bash: {syntax.stderr.strip()}"]
    return [*_faults_of_commands(text, assignments=False), *_missing_paths(text, "")]


def _faults_of_commands(text: str, *, assignments: bool) -> list[str]:
    """`assignments`: whether what is set before a command must be a variable that there is."""
    found = []
    for command in re.split(r"&&|\|\||[;|\n]|\$?\(", re.sub(r"\\\n", " ", text)):
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quote that ends elsewhere: a part of a longer command
            words = command.split()
        while words and (set_ := re.match(r"([A-Z][A-Z0-9_]{2,})=", words[0])):
            if assignments and not _known(set_[1]):
                found.append(f"{set_[1]} is no variable")
            words = words[1:]
        found += _faults_of_words([word.strip(")`") for word in words])
    return found


def _faults_of_words(words: list[str]) -> list[str]:
    if not words:
        return []
    program = words[0].rpartition("/")[2]
    if program == "make":
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
        return [f"make has no target {target}" for target in targets if target not in _makefile()[0]]
    if program == "aistream":
        return _faults_of_shell(words[1:])
    if program in ("python", "python3") and len(words) > 2 and words[1] == "-m":
        module = words[2].split(".")
        if words[2] == "aistream":
            return _faults_of_shell(words[3:])
        if module[0] in FOLDERS:
            base = ROOT.joinpath(*module)
            return _faults_of_options(base.with_suffix(".py") if not base.is_dir() else base / "__main__.py", words[3:])
    if program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
        return _faults_of_options(ROOT / words[1], words[2:])
    if words[:2] == ["docker", "compose"]:
        profiles = re.findall(r"^    profiles: \[(.*)\]", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
        named = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--profile"]
        return [f"there is no profile {one}" for one in named if one != "NAME" and one not in ", ".join(profiles).split(", ")]
    return []


def _faults_of_shell(words: list[str]) -> list[str]:
    """Commands and options, by click's own parser."""
    command: click.Command = shell
    context = click.Context(command, info_name="aistream")
    words = [word for word in words if word not in ("…", "...")]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return [f"{context.command_path} has no command {words[0]}"]
        command, context, words = found, click.Context(found, info_name=words[0], parent=context), words[1:]
    try:
        if not isinstance(command, click.Group):
            command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return [f"{context.command_path}: {error.message}"]
    return []


def _faults_of_options(module: Path, words: list[str]) -> list[str]:
    """Whether the module is there, and its source names these options."""
    if not module.is_file():
        return [f"there is no {module.relative_to(ROOT)}"]
    source = module.read_text()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{module.relative_to(ROOT)} has no option {option}" for option in options if f'"{option}"' not in source]


# Paths


def _missing_paths(code: str, page: str) -> list[str]:
    """What looks like a path of the checkout and is none, neither from its root nor from the page's folder.

    `aistream/0.1.0` looks like a product of a User-Agent header.
    """
    words = [word.strip("\"'`,;:()") for word in code.split()]
    paths = [word for word in words if re.fullmatch(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/(?!\d+\.\d)[\w./*<>…@-]*", word)]
    return [f"there is no {path}" for path in paths if path not in MADE and not _exists(path, page)]


def _exists(path: str, page: str) -> bool:
    pattern = re.sub(r"<[^>]*>|…", "*", path).rstrip("/")
    return any(any(folder.glob(pattern)) for folder in (ROOT, (ROOT / page).parent))


def _slug(heading: str) -> str:
    """Near enough to what GitHub makes of it: `The three calls` → `the-three-calls`."""
    return re.sub(r"[^\w]+", "-", heading.lower()).strip("-") or "top"


def every_block() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks((ROOT / page).read_text(), page)]


def summary() -> str:
    """How many are run, and how many are not."""
    found = every_block()
    run, not_run = (sum(map(bool, kind)) for kind in ([b.scene for b in found], [b.reason is not None for b in found]))
    return f"documentation: {len(found)} blocks of code, {run} run, {len(found) - run - not_run} read, {not_run} not run"


if __name__ == "__main__":
    for block in every_block():
        if block.reason is not None:
            print(f"{block.place}: {block.reason}")
    print(summary())
