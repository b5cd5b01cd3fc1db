"""The pictures of the documentation: current, well-formed, told in words too, of themselves alone, and readable."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from tests import markdown
from tests.service import ROOT

FOLDER = ROOT / "docs" / "pictures"
PICTURES = sorted(FOLDER.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
#: Texts that leave their box or the picture, and pairs that touch, as the browser's own font has them.
CROWDED = """
const box = (shape) => shape.getBBox(), ends = ({x, y, width, height}) => [x, y, x + width, y + height];
const within = (inner, outer) => {
  const [a, b] = [ends(inner), ends(outer)];
  return a[0] > b[0] + 1 && a[1] > b[1] + 1 && a[2] < b[2] - 1 && a[3] < b[3] - 1;
};
const touch = (one, other) => {
  const [a, b] = [ends(one), ends(other)];
  return a[0] < b[2] && b[0] < a[2] && a[1] + 3 < b[3] && b[1] + 3 < a[3];
};
const ground = box(document.querySelector(".ground"));
const texts = [...document.querySelectorAll("text")], boxes = [...document.querySelectorAll(".box rect")];
const wrong = [];
for (const text of texts) {
  const own = text.closest(".box")?.querySelector("rect"), others = own ? texts : [...texts, ...boxes];
  if (!within(box(text), own ? box(own) : ground)) wrong.push("out: " + text.textContent);
  for (const other of others)
    if (other !== text && touch(box(text), box(other))) wrong.push(text.textContent + " | " + other.textContent);
}
return wrong;
"""


def colours(svg: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The scheme, and what each selector is filled with in it."""
    style = re.search(r"<style>(.*?)@media \(prefers-color-scheme: dark\) \{(.*?)</style>", svg, re.DOTALL)
    assert style
    for scheme, rules in zip(("light", "dark"), style.groups(), strict=True):
        yield scheme, dict(re.findall(r"([.\w][.\w ]*?) \{ fill: (#\w{6})", rules))


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", ROOT / "scripts" / "draw-pictures", tmp_path], check=True, timeout=60)

    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert drawn.keys() == {path.name for path in PICTURES}
    assert [name for name, text in drawn.items() if (FOLDER / name).read_text() != text] == []  # make docs


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_well_formed_told_in_words_and_of_itself_alone(picture: Path) -> None:
    text = picture.read_text()

    root = ElementTree.fromstring(text)

    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert title is not None and title.text and description is not None and len((description.text or "").split()) > 20
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "desc", "style", "defs", "marker", "path", "rect", "g", "text", "tspan", "circle")
    }
    assert not re.search(r"href|@import|url\((?!#)", text)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_pictures_text_is_told_from_its_ground_in_light_and_in_dark(picture: Path) -> None:
    for scheme, fills in colours(picture.read_text()):
        grounds = [fill for selector, fill in fills.items() if selector.endswith(" rect")] + [fills[".ground"]]

        assert len(grounds) == 7
        assert min(contrast(fills["text"], ground) for ground in grounds) >= 7, scheme
        assert contrast(fills[".soft"], fills[".ground"]) >= 4.5, scheme
        assert contrast(fills[".step circle"], fills[".step text"]) >= 7, scheme


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_no_text_of_a_picture_leaves_its_box_or_covers_another(picture: Path, chrome: Chrome) -> None:
    chrome.get(picture.as_uri())

    crowded: Any = chrome.execute_script(CROWDED)  # type: ignore[no-untyped-call]

    assert crowded == []


def test_every_picture_is_shown_with_its_words() -> None:
    shown: dict[str, list[str]] = {}
    for page in markdown.pages(ROOT):
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]*pictures/\w+\.svg)\)", page.read_text()):
            shown.setdefault(Path(target).name, []).append(words)

    assert shown.keys() == {path.name for path in PICTURES}
    assert all(words for several in shown.values() for words in several)
