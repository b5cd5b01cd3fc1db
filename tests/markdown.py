"""Markdown pages as GitHub shows them: which anchors a page has, and where its links lead. Pure, but for `pages`."""

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path

#: Folders that hold what others wrote, or what was built.
_FOREIGN = {"node_modules", "build", "dist", "vendor"}
_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})[^\n]*\n.*?^ {0,3}\2[`~]*[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"<[a-z][^>]*?\s(?:href|src|srcset)\s*=\s*\"([^\"]*)\"", re.IGNORECASE | re.DOTALL)
_AUTOLINK = re.compile(r"<(https?:[^>\s]*)>")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
_ID = re.compile(r"<[a-z][^>]*?\s(?:id|name)\s*=\s*\"([^\"]+)\"", re.IGNORECASE)


def pages(root: Path) -> list[Path]:
    """Every Markdown file of the checkout that is ours."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _FOREIGN]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def anchors(text: str) -> set[str]:
    """What may stand behind a `#`: GitHub's for each heading, a second of the same words numbered, and every `id`."""
    found: set[str] = set()
    counts: dict[str, int] = {}
    for heading in _HEADING.findall(_prose(text, code=True)):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        plain = html.unescape(re.sub(r"</?[a-z][^>]*>", "", plain))
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\*+", "", plain).lower()).replace(" ", "-")
        unique = slug
        while unique in counts:
            counts[slug] += 1
            unique = f"{slug}-{counts[slug]}"
        counts[unique] = 0
        found.add(unique)
    return found | set(_ID.findall(_prose(text)))


def links(text: str) -> Iterator[str]:
    """Every target: of links and images, also those in HTML and of references. Code has none."""
    prose = _prose(text)
    for form in (_LINK, _REFERENCE, _ATTRIBUTE, _AUTOLINK):
        yield from (html.unescape(target) for target in form.findall(prose))


def _prose(text: str, *, code: bool = False) -> str:
    """The text without blocks of code and comments, and without code in its sentences unless that is asked for."""
    text = _COMMENT.sub("", _FENCE.sub("\n", text))
    return text if code else _CODE.sub("", text)
