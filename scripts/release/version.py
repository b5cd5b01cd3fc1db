"""One version number: `aistream/__init__.py` has it, every other place repeats it.

`make version` lists the places. `make version V=0.2.0` changes them all, and gives what CHANGELOG.md has under "Unreleased" that
version and today's date. It looks at nothing but files, so a dirty tree is no obstacle.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.release.files import ROOT, project_files

#: A version of Semantic Versioning that is a PEP 440 version and a tag of an image too: no build metadata, and only such
#: pre-releases as Python knows.
VERSION = r"(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)(?:-(?:alpha|beta|rc)\.(?:0|[1-9]\d*))?"
SOURCE = "aistream/__init__.py"
CHANGELOG = "CHANGELOG.md"

_FIRST = r'\A\{\s*"name": "[^"]*",\s*"version": "(?P<version>[^"]*)"'
#: What says the version in files of this name: a path, or a name alone for a file anywhere.
_IN_FILES = {
    SOURCE: [r'^__version__ = "(?P<version>[^"]*)"$'],
    "package.json": [_FIRST],
    "package-lock.json": [_FIRST, r'^  "packages": \{\s*"": \{\s*"name": "[^"]*",\s*"version": "(?P<version>[^"]*)"'],
    "docs/openapi.json": [r'"info": \{\s*"title": "[^"]*",\s*"version": "(?P<version>[^"]*)"'],
    "docs/http-reference.md": [rf"^Of version (?P<version>{VERSION}), "],
}
#: What says it in any file: the image's build argument and its tag, as a value and in the manual; the callbacks' user agent; what
#: the shell prints, but not the record of a measurement; the answer of /health; an npm package by name and version.
_ANYWHERE = [
    rf"\bARG VERSION=(?P<version>{VERSION})",
    rf"\bAISTREAM_TAG(?::-|=)(?P<version>{VERSION})",
    rf"`AISTREAM_TAG` \| `(?P<version>{VERSION})`",
    rf"\baistream:(?P<version>{VERSION})",
    rf"\baistream/(?P<version>{VERSION})",
    rf"^(?!- versions: ).*?\baistream(?:, version)? (?P<version>{VERSION})",
    rf'"status": ?"alive", ?"version": ?"(?P<version>{VERSION})"',
    rf"\b(?:aistream-client|n8n-nodes-aistream)[@-](?P<version>{VERSION})",
]
_HEADING = re.compile(rf"^## \[?({VERSION})\]? - (\d{{4}}-\d\d-\d\d)$", re.MULTILINE)
_UNRELEASED = re.compile(r"^## Unreleased\n(?P<news>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Refused(Exception):
    """A version that cannot be the next one; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place that says the version: the characters `start` to `end` of a file."""

    path: str
    start: int
    end: int
    line: int
    version: str


def places(root: Path = ROOT) -> Iterator[Place]:
    """Every place. CHANGELOG.md's headings are none: they tell of all versions; and tests may say any."""
    for path in project_files(root):
        patterns = [*_IN_FILES.get(path, []), *_IN_FILES.get(Path(path).name, [])]
        if path != CHANGELOG and not patterns and not path.startswith("tests/"):
            patterns = _ANYWHERE
        text = _read(root / path)
        found = [match for pattern in patterns for match in re.finditer(pattern, text, re.MULTILINE)]
        if path in ("docs/openapi.json", "docs/http-reference.md"):  # the callbacks' user agent is in them too
            found += [match for pattern in _ANYWHERE for match in re.finditer(pattern, text, re.MULTILINE)]
        for match in sorted(found, key=lambda match: match.start()):
            start, end = match.span("version")
            yield Place(path, start, end, text.count("\n", 0, start) + 1, match["version"])


def current(root: Path = ROOT) -> str:
    """The one that all others repeat."""
    return next(place.version for place in places(root) if place.path == SOURCE)


def released(root: Path = ROOT) -> list[tuple[str, str]]:
    """The versions that CHANGELOG.md has a heading for, with their dates, as it has them: the newest first."""
    return [(match[1], match[2]) for match in _HEADING.finditer((root / CHANGELOG).read_text(encoding="utf-8"))]


def precedence(version: str) -> tuple[int, ...]:
    """By which versions are compared (Semantic Versioning, 11). Raises Refused for what is none."""
    if not re.fullmatch(VERSION, version):
        raise Refused(f"{version!r} is no version: MAJOR.MINOR.PATCH, and -alpha.N, -beta.N or -rc.N for a pre-release")
    numbers, _, before = version.partition("-")
    kind, _, count = before.partition(".")
    return (*map(int, numbers.split(".")), ["alpha", "beta", "rc", ""].index(kind), int(count or 0))


def set_version(new: str, today: datetime.date, root: Path = ROOT) -> list[Place]:
    """Changes all places, and heads what is unreleased in CHANGELOG.md; gives the places as they were.

    The version that the tree already has can be set until it has its heading: so the first one gets one too. Raises Refused.
    """
    now, dates = current(root), dict(released(root))
    if new in dates:
        raise Refused(f"{new} has been released: {CHANGELOG} has it, of {dates[new]}")
    if precedence(new) < precedence(now):
        raise Refused(f"{new} is not greater than {now}")
    news = (root / CHANGELOG).read_text(encoding="utf-8")
    unreleased = _UNRELEASED.search(news)
    if unreleased is None or not unreleased["news"].strip():
        raise Refused(f'{CHANGELOG} has nothing under "## Unreleased": what is different for the operator in {new}?')
    headed = f"## Unreleased\n\n## {new} - {today.isoformat()}\n{unreleased['news']}"

    changed = list(places(root))
    for path in dict.fromkeys(place.path for place in changed):
        text = _read(root / path)
        for place in reversed([place for place in changed if place.path == path]):
            text = text[: place.start] + new + text[place.end :]
        (root / path).write_bytes(text.encode())
    (root / CHANGELOG).write_text(news.replace(unreleased[0], headed, 1), encoding="utf-8")
    return changed


def _read(path: Path) -> str:
    """The text of a file, line endings as they are; nothing for what is no text."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Lists the places, or sets the version."""
    parser = argparse.ArgumentParser(prog="make version V=", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("version", nargs="?", help="the new one; without it, all places are listed")
    new = parser.parse_args(arguments).version
    if not new:
        for place in places():
            print(f"{place.version:<12} {place.path}:{place.line}")
        return 0
    try:
        changed = set_version(new, datetime.date.today())
    except Refused as error:
        print(f"make version: {error}", file=sys.stderr)
        return 1
    files = dict.fromkeys([*(place.path for place in changed), CHANGELOG])
    print(f"{new}: changed {', '.join(files)}. Look at `git diff`, commit, then: make release")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
