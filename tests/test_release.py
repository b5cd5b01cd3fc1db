"""What is released: one version number, and packages that hold what they should and work where nothing else is.

`make release` does more, in minutes: it installs the pinned packages anew, and does the Dockerfile's steps (docs/releasing.md).
"""

import datetime
import email
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from aistream import __version__
from scripts.release import build, files, installs, version
from scripts.release.__main__ import Release
from scripts.release.build import Failed
from scripts.release.version import CHANGELOG, Refused
from tests.conftest import missing
from tests.service import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EPOCH = 1_700_000_000
TODAY = datetime.date(2027, 1, 31)
#: Of the image, and of the wheel: what .dockerignore names, and the package.
IN_THE_IMAGE = ("aistream/", "wsgi.py", "gunicorn.conf.py", "generate_token.py", "requirements.txt")


def tracked(*beginnings: str) -> list[str]:
    """The files that git knows, or would ask about, whose paths begin so."""
    return [path for path in files.project_files() if path.startswith(beginnings)]


# ---- One version ----


def test_every_place_says_one_version() -> None:
    said = {f"{place.path}:{place.line}": place.version for place in version.places()}

    assert {place: other for place, other in said.items() if other != __version__} == {}
    known = {place.partition(":")[0] for place in said}
    packages = {path for path in tracked("") if Path(path).name == "package.json" and '"version"' in (ROOT / path).read_text()}
    locks = {path.replace("package.json", "package-lock.json") for path in packages}
    assert known >= {"aistream/__init__.py", "Dockerfile", "docker-compose.yml", ".env.example", "docs/openapi.json"}
    assert known >= packages | locks and len(packages) >= 2


def test_nowhere_is_the_version_said_in_a_way_that_make_version_does_not_know() -> None:
    known = {(place.path, place.start) for place in version.places()}
    found = set()
    for path in tracked(""):
        # Packages of others have versions too; a record says with which one it was made; a test may say any.
        others = Path(path).name in ("package.json", "package-lock.json") or re.fullmatch(r"requirements.*\.txt", path)
        if others or path == CHANGELOG or path.startswith("tests/"):
            continue
        text = (ROOT / path).read_bytes().decode(errors="replace")
        for match in re.finditer(rf"(?<!==)(?<![\w.^~]){re.escape(__version__)}(?![\w.]*\d)", text):
            line = text[text.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
            if not line.startswith("- versions: "):
                found.add((path, match.start()))

    assert len(found) > 8
    assert {f"{path}, character {start}" for path, start in found - known} == set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project that git has never seen a commit of."""
    files.copy_files(tracked(""), ROOT, tmp_path / "project", EPOCH)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path / "project", check=True)
    return tmp_path / "project"


def contents(project: Path) -> dict[str, bytes]:
    """Every file."""
    return {path: (project / path).read_bytes() for path in files.project_files(project)}


def test_a_new_version_is_set_in_every_place_and_changes_nothing_else(project: Path) -> None:
    before, said = contents(project), list(version.places(project))

    changed = version.set_version("12.34.56", TODAY, project)

    after = contents(project)
    assert changed == said
    assert {place.version for place in version.places(project)} == {"12.34.56"} == {version.current(project)}
    assert len(list(version.places(project))) == len(said)
    assert {path for path in before if before[path] != after[path]} == {CHANGELOG, *(place.path for place in said)}
    for path in {place.path for place in said}:
        there = sum(place.path == path for place in said)
        lines = zip(before[path].splitlines(), after[path].splitlines(), strict=True)
        assert sum(old != new for old, new in lines) <= there
        assert after[path].count(b"12.34.56") == there


def test_a_new_version_heads_what_was_unreleased(project: Path) -> None:
    old = (project / CHANGELOG).read_text()

    version.set_version("12.34.56", TODAY, project)

    assert (project / CHANGELOG).read_text() == old.replace("## Unreleased\n", "## Unreleased\n\n## 12.34.56 - 2027-01-31\n", 1)
    assert version.released(project)[0] == ("12.34.56", "2027-01-31")


def test_the_version_that_is_there_can_be_headed_once(project: Path) -> None:
    current = version.current(project)
    news = (project / CHANGELOG).read_text()
    (project / CHANGELOG).write_text(re.sub(rf"^## {re.escape(current)} .*\n", "### Once more\n", news, flags=re.MULTILINE))

    version.set_version(current, TODAY, project)

    assert version.released(project)[0] == (current, "2027-01-31")
    with pytest.raises(Refused, match=r"has been released: CHANGELOG\.md has it, of 2027-01-31"):
        version.set_version(current, TODAY, project)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        *(
            (text, "is no version")
            for text in ("1", "1.0", "v1.0.0", "01.0.0", "1.0.0+build", "1.0.0-dev.1", "1.0.0-rc", "", "1.0.0\n")
        ),
        ("0.0.9", "is not greater"),
        ("0.1.0-rc.1", "is not greater"),
    ],
)
def test_what_is_no_version_or_an_older_one_is_refused_and_changes_nothing(project: Path, new: str, why: str) -> None:
    before = contents(project)

    with pytest.raises(Refused, match=why):
        version.set_version(new, TODAY, project)

    assert contents(project) == before


def test_a_release_without_news_is_refused(project: Path) -> None:
    version.set_version("12.0.0", TODAY, project)
    before = contents(project)

    with pytest.raises(Refused, match="nothing under"):
        version.set_version("12.0.1", TODAY, project)

    assert contents(project) == before


def test_versions_are_compared_as_semantic_versioning_says() -> None:
    ordered = [
        "0.9.10",
        "0.10.0-alpha.2",
        "0.10.0-alpha.10",
        "0.10.0-beta.1",
        "0.10.0-rc.1",
        "0.10.0",
        "0.10.1",
        "1.0.0",
        "10.0.0",
    ]

    assert sorted(ordered, key=version.precedence) == ordered
    assert len({version.precedence(one) for one in ordered}) == len(ordered)


def test_the_headings_of_the_changelog_are_in_order_and_the_newest_is_the_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / CHANGELOG).read_text(), re.MULTILINE)
    released = version.released()

    assert headings == ["Unreleased", *(f"{one} - {date}" for one, date in released)]
    for newer, older in itertools.pairwise(released):
        assert version.precedence(newer[0]) > version.precedence(older[0]) and newer[1] >= older[1]
    assert not released or released[0][0] == __version__


def test_make_version_lists_the_places_and_says_what_it_refuses() -> None:
    command = [sys.executable, "-m", "scripts.release.version"]

    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    refused = subprocess.run([*command, "0.0.1"], cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert f"{__version__:<12} aistream/__init__.py:3" in listed.stdout.splitlines()
    assert (refused.returncode, refused.stderr) == (1, f"make version: 0.0.1 is not greater than {__version__}\n")


# ---- The image's context ----


@pytest.mark.parametrize(
    ("rules", "let_in"),
    [
        ("", ["a/b/c.py", "a/x.pyc", "b.py", "keep"]),
        ("*", []),
        ("*\n!a", ["a/b/c.py", "a/x.pyc"]),
        ("*\n!a\na/b", ["a/x.pyc"]),
        ("# *\n**/*.py\n", ["a/x.pyc", "keep"]),
        ("*.py", ["a/b/c.py", "a/x.pyc", "keep"]),
        ("a/*", ["b.py", "keep"]),
        ("*\n!a/b/c.py", ["a/b/c.py"]),
        ("**/b\n/keep/", ["a/x.pyc", "b.py"]),
        ("?.py\nke?p", ["a/b/c.py", "a/x.pyc"]),
        ("*\n!**/*.pyc", ["a/x.pyc"]),
    ],
)
def test_dockerignore_is_read_as_docker_reads_it(rules: str, let_in: list[str]) -> None:
    assert files.image_context(["a/b/c.py", "a/x.pyc", "b.py", "keep"], rules) == let_in


@pytest.mark.parametrize("rule", ["[ab]", "../a", "a\\b"])
def test_a_rule_that_is_not_understood_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="more than scripts/release understands"):
        files.image_context(["a"], rule)


def test_the_images_context_is_what_dockerignore_lets_in_and_the_dockerfile(tmp_path: Path) -> None:
    for name in ("tree", "again"):
        files.copy_files(tracked(""), ROOT, tmp_path / name, EPOCH)
        for secret in (".env", "aistream/__pycache__/app.pyc", "aistream/providers/__pycache__/x.pyc", "new.py"):
            (tmp_path / name / secret).parent.mkdir(exist_ok=True)
            (tmp_path / name / secret).write_text("not for the image")
        (tmp_path / f"{name}-built").mkdir()
        build.build_context(tmp_path / name, tmp_path / f"{name}-built", "1.2.3", EPOCH)

    (archive,) = (tmp_path / "tree-built").iterdir()
    with tarfile.open(archive) as tar:
        held = {entry.name: entry for entry in tar.getmembers()}
    assert archive.name == "image-context-1.2.3.tar.gz"
    assert sorted(held) == sorted(["Dockerfile", *tracked(*IN_THE_IMAGE)])
    assert {(entry.uid, entry.gid, entry.uname, entry.mtime) for entry in held.values()} == {(0, 0, "", EPOCH)}
    assert archive.read_bytes() == (tmp_path / "again-built" / archive.name).read_bytes()


def test_every_instruction_of_the_dockerfile_is_one_that_a_release_can_do() -> None:
    said = {name for name, _ in installs.instructions((ROOT / "Dockerfile").read_text())}

    assert said <= {*installs.STEPS, *installs.SAID}


DOCKERFILE = """\
FROM base AS first
COPY folder/ /app/
COPY one.txt two.txt /
# A comment
RUN cat /one.txt \\
    /two.txt > /app/both.txt
FROM base
COPY --from=first /app /app
ENV SAID=yes PATH=/app:$PATH
WORKDIR /app
USER 10001:10001
HEALTHCHECK --interval=1s CMD ["test", "-e", "/app/both.txt"]
CMD ["sh", "-c", "id -u; pwd; echo $SAID $GIVEN; cat both.txt; touch /app/x; in-the-folder; ls /one.txt"]
"""


def test_the_steps_of_a_dockerfile_are_done_and_its_command_runs_in_the_result(tmp_path: Path) -> None:
    if not installs.can_contain():
        missing("bubblewrap and setpriv")
    context = tmp_path / "context"
    (context / "folder").mkdir(parents=True)
    (context / "Dockerfile").write_text(DOCKERFILE)
    for name in ("one", "two"):
        (context / f"{name}.txt").write_text(f"{name}\n")
    program = context / "folder" / "in-the-folder"
    program.write_text("#!/bin/sh\necho found on PATH\n")
    program.chmod(0o755)
    image = installs.Image(tmp_path, {})

    image.build(context)

    command = image.container(image.command, {"GIVEN": "too"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.stdout.splitlines() == ["10001", "/app", "yes too", "one", "two", "found on PATH"]
    assert "Read-only file system" in done.stderr and "/one.txt" in done.stderr
    assert subprocess.run(image.container(image.health, {}), timeout=20).returncode == 0


# ---- The wheel ----


def build_backend() -> None:
    """Ends the test where what builds the wheel is not here, or another."""
    wanted = PYPROJECT["build-system"]["requires"][0]
    try:
        found = f"setuptools=={importlib.metadata.version('setuptools')}"
        importlib.metadata.version("build")
    except importlib.metadata.PackageNotFoundError as error:
        missing(str(error))
    if found != wanted:
        missing(wanted)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution and the wheel."""
    build_backend()
    folder = tmp_path_factory.mktemp("built")
    files.copy_files(tracked(""), ROOT, folder / "tree", EPOCH)
    (folder / "into").mkdir()
    build.build_python(folder / "tree", folder / "into", EPOCH)
    return folder / "into"


def only(folder: Path, pattern: str) -> Path:
    """The one file of this name."""
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = wheel.namelist()
        licence = wheel.read(f"aistream-{__version__}.dist-info/licenses/LICENSE")

    about = f"aistream-{__version__}.dist-info/"
    assert sorted(name for name in names if not name.startswith(about)) == tracked("aistream/")
    assert {name.removeprefix(about) for name in names if name.startswith(about)} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_says_what_it_is(built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        said = email.message_from_bytes(wheel.read(f"aistream-{__version__}.dist-info/METADATA"))

    project = PYPROJECT["project"]
    assert (said["Name"], said["Version"], said["Summary"]) == ("aistream", __version__, project["description"])
    assert (said["License-Expression"], said["Requires-Python"]) == ("MIT", project["requires-python"])
    assert said.get_all("Project-URL") == [f"{name}, {url}" for name, url in project["urls"].items()]
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert [re.sub("[<>=[].*", "", line) for line in said.get_all("Requires-Dist", [])] == [
        re.sub("[<>=[].*", "", line) for line in project["dependencies"]
    ]


def test_the_source_distribution_holds_what_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as tar:
        entries = tar.getmembers()

    root = f"aistream-{__version__}/"
    names = {entry.name.removeprefix(root) for entry in entries}
    assert names - set(tracked("aistream/")) - {name for name in names if name.startswith("aistream.egg-info/")} == {
        *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "requirements.txt", "setup.cfg")
    }
    assert set(tracked("aistream/")) <= names
    assert {(entry.uid, entry.gid, entry.uname, entry.mtime) for entry in entries} == {(0, 0, "", EPOCH)}


def test_the_same_files_give_the_same_bytes_and_the_source_distribution_gives_the_same_wheel(built: Path, tmp_path: Path) -> None:
    files.copy_files(tracked(""), ROOT, tmp_path / "tree", EPOCH + 12_345)
    (tmp_path / "into").mkdir()

    build.build_python(tmp_path / "tree", tmp_path / "into", EPOCH)
    again = build.wheel_of(only(built, "*.tar.gz"), tmp_path / "third", EPOCH)

    assert {path.name: files.sha256(path) for path in built.iterdir()} == {
        path.name: files.sha256(path) for path in (tmp_path / "into").iterdir()
    }
    assert files.sha256(again) == files.sha256(only(built, "*.whl"))


def test_the_wheel_is_built_by_what_the_lock_file_has_with_hashes() -> None:
    (backend,) = PYPROJECT["build-system"]["requires"]

    assert re.fullmatch(r"setuptools==[\d.]+", backend)
    assert backend in PYPROJECT["dependency-groups"]["dev"]
    assert f"\n{backend} \\\n    --hash=" in (ROOT / "requirements-dev.txt").read_text()


def test_the_wheel_alone_serves(built: Path, tmp_path: Path) -> None:
    """In a venv of its own, with the packages of this one; `make release` installs those too."""
    environ = installs.environment(tmp_path / "home")
    venv = tmp_path / "venv"
    installs.run([installs.base_python(), "-m", "venv", "--without-pip", venv], tmp_path, environ)
    packages = Path(
        installs.run([venv / "bin" / "python", "-c", "import site; print(site.getsitepackages()[0])"], tmp_path, environ).strip()
    )
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    installs.run([*pip, only(built, "*.whl")], tmp_path, environ)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = installs.run([venv / "bin" / "python", "-c", "import aistream; print(aistream.__file__)"], tmp_path, environ).strip()
    told = installs.run([venv / "bin" / "aistream", "--version"], tmp_path, environ)
    with installs.serve(venv / "bin", tmp_path / "served", environ) as service:
        installs.see_it_work(service, __version__)

    assert Path(where).is_relative_to(venv)
    assert told == f"aistream, version {__version__}\n"


# ---- The npm packages; tests/test_client_package.py has the browser's client ----


def test_the_packed_node_is_what_n8n_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:{os.environ['PATH']}")
    npm_packages = Path(sys.prefix) / "npm" / "node_modules"
    if shutil.which("npm") is None or not npm_packages.exists():
        missing("Node.js with the packages of tests/tools")
    environ = installs.environment(tmp_path / "home", "node", "npm")
    files.copy_files(tracked("n8n/"), ROOT, tmp_path / "tree", EPOCH)
    modules = tmp_path / "project" / "node_modules"
    modules.mkdir(parents=True)
    for package in npm_packages.iterdir():
        (modules / package.name).symlink_to(package)

    build.build_node(tmp_path / "tree", tmp_path, npm_packages, environ)

    archive = tmp_path / f"n8n-nodes-aistream-{__version__}.tgz"
    with tarfile.open(archive) as tar:
        names = {name.removeprefix("package/") for name in tar.getnames()}
    files.unpack(archive, tmp_path / "unpacked")
    (tmp_path / "unpacked" / "package").rename(modules / "n8n-nodes-aistream")
    installs.load_node(tmp_path / "project", environ)
    assert names >= {"package.json", "README.md", "LICENSE", "dist/icons/aistream.svg"}
    assert {name.partition("/")[0] for name in names} == {"package.json", "README.md", "LICENSE", "dist"}


def test_every_package_has_the_projects_licence() -> None:
    licences = [ROOT / "LICENSE", *(ROOT / folder / "LICENSE" for folder in build.NPM_PACKAGES)]

    assert len({path.read_bytes() for path in licences}) == 1


# ---- What make release hands over ----


def release_of(tmp_path: Path, content: str, *, dirty: bool = False, headed: bool = True) -> tuple[Release, Path]:
    """A release that has built one file."""
    release = Release(tmp_path, tmp_path / "dist")
    release.version, release.dirty, release.headed = "1.2.3", dirty, headed
    folder = tmp_path / f"built-{content}"
    folder.mkdir(exist_ok=True)
    (folder / "a.whl").write_text(content)
    return release, folder


def in_dist(tmp_path: Path) -> Mapping[str, str]:
    """The files there, but for SHA256SUMS."""
    return {str(path.relative_to(tmp_path / "dist")): path.read_text() for path in sorted((tmp_path / "dist").rglob("*.whl"))}


def test_a_version_is_not_replaced_by_other_bytes(tmp_path: Path) -> None:
    for content in ("one", "one"):
        release, folder = release_of(tmp_path, content)
        release.hand_over(folder)
    release, folder = release_of(tmp_path, "other")

    with pytest.raises(Failed, match="with other bytes, and a version is published once"):
        release.hand_over(folder)

    assert in_dist(tmp_path) == {"1.2.3/a.whl": "one"}
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "dist" / "1.2.3", capture_output=True
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize(
    ("dirty", "headed", "kind"), [(True, True, "dirty"), (True, False, "dirty"), (False, False, "unreleased")]
)
def test_what_is_no_release_says_so_and_is_replaced(tmp_path: Path, dirty: bool, headed: bool, kind: str) -> None:
    for content in ("one", "other"):
        release, folder = release_of(tmp_path, content, dirty=dirty, headed=headed)
        release.hand_over(folder)

    assert in_dist(tmp_path) == {f"1.2.3-{kind}/a.whl": "other"}


def test_a_place_that_says_another_version_ends_the_release(tmp_path: Path) -> None:
    release, _ = release_of(tmp_path, "one")
    release.version = "1.2.3"

    with pytest.raises(Failed, match=r"Dockerfile:\d+ says .*make version V=1\.2\.3"):
        release.check_state()
