"""What others wrote and the service serves: unchanged, of the version that is locked, with its licence."""

import sys
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.service import ROOT

VENDOR = ROOT / "aistream" / "static" / "vendor"
PACKAGES = Path(sys.prefix) / "npm" / "node_modules"


@pytest.fixture
def packages() -> Path:
    """What npm has installed of tests/tools."""
    if not (PACKAGES / "markdown-it").is_dir():
        missing("the npm package markdown-it")
    return PACKAGES


def test_the_markdown_library_is_served_exactly_as_it_was_published(packages: Path) -> None:
    served = {path.name: path.read_bytes() for path in VENDOR.iterdir() if path.is_file()}

    published = packages / "markdown-it" / "dist" / "browser"
    assert served == {name: (published / name).read_bytes() for name in ["markdown-it.esm.min.mjs"]}


def test_all_that_is_in_the_markdown_library_comes_with_its_licence(packages: Path) -> None:
    licences = {path.stem: path.read_bytes() for path in (VENDOR / "licenses").iterdir()}

    # The file is a bundle: of markdown-it and of what it depends on, which it names by its own sources.
    bundled = {"markdown-it", "linkify-it", "mdurl", "uc.micro", "entities", "punycode.js"}
    assert licences == {name: next((packages / name).glob("LICENSE*")).read_bytes() for name in bundled}
