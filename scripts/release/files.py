"""The project's files as a release takes them: what git knows, copied without this machine's traces, and archives of them
that have the same bytes whenever they are made.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def git(*command: str, root: Path = ROOT) -> str:
    """What a git command prints. Raises CalledProcessError, or FileNotFoundError without git."""
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout


def project_files(root: Path = ROOT, *, untracked: bool = True) -> list[str]:
    """The paths of the files that git knows, or would ask about; without `untracked` only the former."""
    others = ["--others", "--exclude-standard"] if untracked else []
    listed = git("ls-files", "-z", "--cached", *others, root=root).split("\0")
    # A file that is removed, and the removal not committed, is still listed. A symbolic link is nobody's content here.
    return sorted({path for path in listed if path and (root / path).is_file() and not (root / path).is_symlink()})


def copy_files(paths: Iterable[str], root: Path, into: Path, epoch: int) -> None:
    """Copies them, all with the same time, and with no rights but those that git keeps."""
    for path in paths:
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / path).read_bytes())
        target.chmod(0o755 if os.access(root / path, os.X_OK) else 0o644)
        os.utime(target, (epoch, epoch))


def write_archive(paths: Iterable[str], root: Path, archive: Path, epoch: int, prefix: str = "") -> None:
    """Writes a tar.gz of these files; what is in it besides their content is the same on every machine."""
    with archive.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed, _tar(packed) as tar:
        for path in sorted(paths):
            entry = tarfile.TarInfo(prefix + path)
            entry.size = (root / path).stat().st_size
            entry.mode = 0o755 if os.access(root / path, os.X_OK) else 0o644
            entry.mtime = epoch
            with (root / path).open("rb") as content:
                tar.addfile(entry, content)


def unpack(archive: Path, into: Path) -> None:
    """Unpacks an archive of our own into a folder that it makes. By `tar`: Python's own has its filters from 3.11.4 on."""
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(into)], check=True, capture_output=True)


def _tar(packed: gzip.GzipFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT)


def sha256(path: Path) -> str:
    """Of a file, as SHA256SUMS has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- .dockerignore ----


def image_context(paths: Iterable[str], ignore: str) -> list[str]:
    """The files that a .dockerignore with this text lets into the image.

    As Docker reads it: the last rule that fits decides, a rule for a folder is one for all below it, `!` lets in again. `*` and
    `?` end at a `/`, `**` does not. Raises ValueError for what is not understood here: `[`, and `\\`.
    """
    rules = [_rule(line.strip()) for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    return [path for path in paths if _let_in(path, rules)]


def _let_in(path: str, rules: list[tuple[bool, re.Pattern[str]]]) -> bool:
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    let_in = True
    for lets, pattern in rules:
        if any(pattern.fullmatch(one) for one in above):
            let_in = lets
    return let_in


def _rule(line: str) -> tuple[bool, re.Pattern[str]]:
    pattern = line.removeprefix("!").strip().strip("/").removeprefix("./")
    if re.search(r"[\[\]\\]|(^|/)\.\.?(/|$)", pattern):
        raise ValueError(f".dockerignore: {line!r} is more than scripts/release understands")
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = (tokens.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    return line.startswith("!"), re.compile("".join(translated))
