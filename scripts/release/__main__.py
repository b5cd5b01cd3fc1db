"""Builds what is published, installs it as others will, and sees it work; docs/releasing.md says what that shows, and what not.

What comes out lies in dist/VERSION, with SHA256SUMS, and only if all of it has worked. It is built from the files that git knows.
Where they are not the commit's, there is a warning, and the folder is dist/VERSION-dirty; where CHANGELOG.md has no heading for
the version, dist/VERSION-unreleased. A dist/VERSION that is there is not replaced by other bytes: a version is published once.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.release.build import Failed, Source, build_all, run, wheel_of
from scripts.release.files import ROOT, git, project_files, sha256
from scripts.release.installs import (
    can_contain,
    check_client,
    check_context,
    check_node,
    environment,
    install_wheel,
    see_it_work,
    serve,
)
from scripts.release.version import current, places, released

TOOLS = ROOT / "tests" / "tools"


class Release:
    """One run, in a folder that is gone afterwards."""

    def __init__(self, work: Path, dist: Path) -> None:
        self._work = work
        self._started = time.monotonic()
        self.version = current()
        self.commit = git("rev-parse", "--short", "HEAD").strip()
        self.dirty = bool(git("status", "--porcelain").strip())
        self.epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))
        self.headed = self.version in dict(released())
        self._dist = dist
        self.warnings: list[str] = []

    @property
    def kind(self) -> str:
        """What is put behind the version in the folder's name: nothing for a release, which is not replaced."""
        return "-dirty" if self.dirty else "" if self.headed else "-unreleased"

    @property
    def into(self) -> Path:
        """Where it is handed over."""
        return self._dist / f"{self.version}{self.kind}"

    def check_state(self) -> None:
        """Raises Failed where the places differ; notes what keeps this from being a release."""
        self._say(f"aistream {self.version}, commit {self.commit}")
        wrong = [f"{place.path}:{place.line} says {place.version}" for place in places() if place.version != self.version]
        if wrong:
            raise Failed(f"{ROOT.name} is {self.version}, but {', '.join(wrong)}: make version V={self.version}")
        if self.dirty:
            self._warn(
                "the tree is not the commit's: this is for trying out, and has no file that git does not know (git status)"
            )
        if not self.headed:
            self._warn(f"CHANGELOG.md has no heading for {self.version}: make version V={self.version} writes it")

    def build(self) -> Path:
        """Everything twice; the folder with what was built. Raises Failed where a second build gives other bytes."""
        paths = project_files(untracked=False)
        npm = environment(self._work / "home-build", "node", "npm")
        self._packages = self._npm_packages(npm)
        self._say("builds everything, twice ...")
        source = Source(paths, ROOT, self.version, self.epoch)
        first, second = (build_all(source, self._work / name, self._packages, npm) for name in ("first", "second"))
        names = sorted(path.name for path in first.iterdir())
        _, differ, missing = filecmp.cmpfiles(first, second, names, shallow=False)
        if differ or missing:
            raise Failed(f"a second build gives other bytes: {', '.join([*differ, *missing])}")
        self._say("builds the wheel from the source distribution ...")
        again = wheel_of(_only(first, "aistream-*.tar.gz"), self._work / "third", self.epoch)
        if sha256(again) != sha256(_only(first, "*.whl")):
            raise Failed("the source distribution builds another wheel")
        return first

    def try_out(self, built: Path) -> None:
        """Installs each in a clean environment, and sees it work."""
        self._say("installs the wheel and the pinned packages into a fresh venv ...")
        home = self._work / "home-python"
        environ = environment(home)
        programs = install_wheel(_only(built, "*.whl"), ROOT / "requirements.txt", self._work / "venv", environ)
        told = run([programs / "aistream", "--version"], home, environ).strip()
        if told != f"aistream, version {self.version}":
            raise Failed(f"aistream --version says {told!r}")
        self._say("serves from it: an answer, its callback, SIGTERM ...")
        npm = environment(self._work / "home-npm", "node", "npm")
        with serve(programs, self._work / "served", environ) as service:
            see_it_work(service, self.version)
            self._say("installs aistream-client, and watches that service's answers with it ...")
            check_client(_only(built, "aistream-client-*.tgz"), self._work / "project-client", service, self._packages, npm)
        self._say("installs n8n-nodes-aistream beside n8n-workflow, and loads what n8n would ...")
        tools = json.loads((TOOLS / "package.json").read_text())["devDependencies"]
        node = environment(self._work / "home-node", "node", "npm")
        check_node(_only(built, "n8n-nodes-aistream-*.tgz"), self._work / "project-node", tools["n8n-workflow"], node)
        if can_contain():
            self._say("does the Dockerfile's steps in a folder, and starts what it starts ...")
            (self._work / "image").mkdir()
            image = environment(self._work / "home-image")
            check_context(_only(built, "image-context-*.tar.gz"), self._work / "image", image)
        else:
            self._warn("the image's context was not tried: bubblewrap and setpriv are not on this machine")

    def hand_over(self, built: Path) -> None:
        """Puts it into dist. Raises Failed rather than replace what may have been published."""
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(built.iterdir()) if path.name != "SHA256SUMS")
        (built / "SHA256SUMS").write_text(sums)
        there = self.into / "SHA256SUMS"
        if not self.kind and there.exists() and there.read_text() != sums:
            raise Failed(
                f"{self.into} is there, with other bytes, and a version is published once. "
                "make version V=… makes the next one; if that one was not published, remove the folder"
            )
        if self.into.exists():
            shutil.rmtree(self.into)
        self.into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(built, self.into)

    def summary(self, *, tried: bool) -> None:
        """What lies there."""
        print(f"\n{self.into}", file=sys.stderr)
        for path in sorted(self.into.iterdir()):
            print(f"  {path.stat().st_size:>9,} bytes  sha256 {sha256(path)}  {path.name}", file=sys.stderr)
        took = time.monotonic() - self._started
        self._say(f"done in {took:.0f} s. No image was built, and nothing published: docs/releasing.md")
        if not tried:
            self.warnings.insert(0, "nothing of it was installed")
        for warning in dict.fromkeys(self.warnings):
            self._say(f"WARNING: {warning}")

    def _npm_packages(self, environ: dict[str, str]) -> Path:
        """Those of tests/tools: what `make test` has installed, if that is what the lock file says, or else fresh."""
        there = Path(sys.prefix) / "npm"
        lock = there / "package-lock.json"
        if (there / "done").exists() and lock.read_bytes() == (TOOLS / "package-lock.json").read_bytes():
            return there / "node_modules"
        self._say("installs TypeScript and n8n's node interface (180 MB) ...")
        folder = self._work / "tools"
        shutil.copytree(TOOLS, folder)
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder, environ)
        return folder / "node_modules"

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self._say(f"WARNING: {text}")

    def _say(self, text: str) -> None:
        print(f"release: {text}", file=sys.stderr, flush=True)


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="make release", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="the folder for what is built; by default dist")
    parser.add_argument("--build-only", action="store_true", help="install nothing")
    asked = parser.parse_args(arguments)
    os.umask(0o022)  # what others may read of a file is in the packages
    with tempfile.TemporaryDirectory(prefix="aistream-release-") as work:
        try:
            release = Release(Path(work), asked.dist.resolve())
            release.check_state()
            built = release.build()
            if not asked.build_only:
                release.try_out(built)
            release.hand_over(built)
        except (Failed, subprocess.TimeoutExpired) as error:
            print(f"release: failed: {error}", file=sys.stderr)
            return 1
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"release: failed: {error}{getattr(error, 'stderr', None) or ''}", file=sys.stderr)
            return 1
        release.summary(tried=not asked.build_only)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
