"""Builds what is published from a copy of the project's files: the wheel and the source distribution, the npm packages, the
image's context. The same files and tools give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.release.files import copy_files, image_context, unpack, write_archive

#: The folders of the npm packages.
NPM_PACKAGES = ("clients/js", "n8n/n8n-nodes-aistream")


class Failed(Exception):
    """A step that failed; the message is what a person reads of it."""


def run(command: Sequence[str | Path], folder: Path, environ: Mapping[str, str], timeout: float = 600) -> str:
    """Runs it; what it printed on standard output. Raises Failed with all it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(words)} (in {folder}) ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_python(tree: Path, into: Path, epoch: int) -> None:
    """The source distribution, and the wheel out of it. In `tree` setuptools leaves its own files."""
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1"}
    # Without isolation: setuptools is the one of the lock file, checked by its hash; `build` refuses another.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tree.parent / "dist", "."], tree, environ)
    (sdist,) = (tree.parent / "dist").glob("*.tar.gz")
    _normalise(sdist, tree.parent / "sdist", epoch)
    for path in (tree.parent / "dist").iterdir():
        shutil.move(path, into)


def wheel_of(sdist: Path, work: Path, epoch: int) -> Path:
    """The wheel that a source distribution builds."""
    tree = _unpack(sdist, work / "unpacked")
    environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONDONTWRITEBYTECODE": "1"}
    run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work, "."], tree, environ)
    (wheel,) = work.glob("*.whl")
    return wheel


def _normalise(sdist: Path, work: Path, epoch: int) -> None:
    # setuptools writes in who built it, and when.
    tree = _unpack(sdist, work)
    paths = [str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()]
    write_archive(paths, tree, sdist, epoch, prefix=f"{tree.name}/")


def _unpack(archive: Path, into: Path) -> Path:
    unpack(archive, into)
    (tree,) = into.iterdir()
    return tree


def build_node(tree: Path, into: Path, npm_packages: Path, environ: Mapping[str, str]) -> None:
    """n8n's node: what n8n's own build does, TypeScript's compiler and the icons, without its 700 MB of tools."""
    folder = tree / "n8n" / "n8n-nodes-aistream"
    (folder / "node_modules").symlink_to(npm_packages)
    run(["node", "node_modules/typescript/bin/tsc", "--project", "."], folder, environ)
    shutil.copytree(folder / "icons", folder / "dist" / "icons")
    _pack(folder, into, environ)


def build_client(tree: Path, into: Path, npm_packages: Path, environ: Mapping[str, str]) -> None:
    """The browser's client, by its own build script."""
    folder = tree / "clients" / "js"
    (folder / "node_modules").symlink_to(npm_packages)
    run(["npm", "run", "build"], folder, environ)
    _pack(folder, into, environ)


def _pack(folder: Path, into: Path, environ: Mapping[str, str]) -> None:
    # By npm, so that `files` means what it means when it publishes. The packages' scripts have had their turn.
    run(["npm", "pack", "--ignore-scripts", "--pack-destination", into], folder, environ)


def build_context(tree: Path, into: Path, version: str, epoch: int) -> None:
    """What Docker would be sent: the files that .dockerignore lets in, and the Dockerfile."""
    paths = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    let_in = image_context(paths, (tree / ".dockerignore").read_text())
    write_archive({*let_in, "Dockerfile"}, tree, into / f"image-context-{version}.tar.gz", epoch)


@dataclass(frozen=True, slots=True)
class Source:
    """What is built: these files below `root`, as this version; `epoch` is the time that is written into what is built."""

    paths: Sequence[str]
    root: Path
    version: str
    epoch: int


def build_all(source: Source, work: Path, npm_packages: Path, environ: Mapping[str, str]) -> Path:
    """Everything, in the new folder `work`; gives the folder with what was built."""
    into = work / "built"
    into.mkdir(parents=True)
    build_context(_copy(source, work / "context"), into, source.version, source.epoch)
    build_python(_copy(source, work / "python"), into, source.epoch)
    build_node(_copy(source, work / "node"), into, npm_packages, environ)
    build_client(_copy(source, work / "client"), into, npm_packages, environ)
    return into


def _copy(source: Source, folder: Path) -> Path:
    # One for each: none finds what another has left.
    copy_files(source.paths, source.root, folder / "tree", source.epoch)
    return folder / "tree"
