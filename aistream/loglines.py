"""How a log line looks, whoever says it: the service, gunicorn, a library, or Python itself.

One JSON object per line, or on a terminal text that a person reads. Control characters are escaped in both and texts are cut, so
that no client can write a line of its own. Of an exception type and place are told, never its message: that may quote a prompt,
a URL or a key. Without structlog, for gunicorn's master: it forks, and needs none.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from aistream.config import Config

#: Characters of one text in a line; what is longer is cut.
MAX_CHARS = 500
#: Libraries whose lines below warnings hold prompts and whole URLs. OPENAI_LOG and ANTHROPIC_LOG may have asked for them.
TALKATIVE = ("openai", "anthropic", "httpx2", "httpcore2", "urllib3")
#: Innermost frames of an exception that are told.
MAX_FRAMES = 8

#: What none of our lines may have, and what a foreign text is rid of: queries (access tokens, n8n's signatures), JWTs, keys.
_SECRETS = re.compile(
    r"\?[^\s\"'>)]+"  # the query of a URL
    r"|eyJ[\w-]+\.[\w-]*\.?[\w-]*"
    r"|(?i:bearer)\s+\S+"
    r"|(?:sk|pk|whsec)[-_][\w+/=-]{8,}"
)

Line = MutableMapping[str, Any]


def wants_text(config: Config) -> bool:
    """Whether lines are for a person: LOG_FORMAT, and where that is auto, whether standard output is a terminal."""
    return config.log_format == "console" or (config.log_format == "auto" and sys.stdout.isatty())


def harmless(_logger: Any, _method: str, line: Line) -> Line:
    """The line with every text cut to MAX_CHARS, and without a character that a terminal or a parser of lines would obey."""
    for name, value in line.items():
        if type(value) is not int:
            line[name] = _harmless(value)
    return line


def without_values(_logger: Any, _method: str, line: Line) -> Line:
    """`error`, where that is an exception, as its type, with its cause's, and where it was raised."""
    if isinstance(line.get("error"), BaseException):
        line.update(_told(line.pop("error")))
    return line


def to_json(line: Any, **_: Any) -> str:
    """The line as JSON; what JSON does not know goes in as its text."""
    return _ENCODER.encode(line).decode()


_ENCODER = msgspec.json.Encoder(enc_hook=str)


class Stdout:
    """Whatever standard output is when a line is written: a test or a server may have put another in its place.

    A line that cannot be written is lost, and nothing else: a full disk behind it ends no answer.
    """

    def write(self, text: str) -> None:
        """Writes, if that is possible."""
        try:
            sys.stdout.write(text)
        except (OSError, ValueError):  # ValueError: it is closed, or has no such character
            return

    def flush(self) -> None:
        """Has it out at once: nobody waits for a buffer to fill."""
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            return


class Foreign(logging.Handler):
    """Writes to standard error what others say through `logging`, in the form of our own lines.

    From warnings on, whatever LOG_LEVEL is: below that the SDKs write whole requests, prompts included, and HTTP clients whole
    URLs. Their messages are told without what is filled into them. gunicorn is the exception to both: see `server_lines`.
    """

    def __init__(self, *, as_text: bool, stream: TextIO | None = None, trusted: bool = False) -> None:
        super().__init__(logging.NOTSET if trusted else logging.WARNING)
        self._as_text = as_text
        self._stream = stream
        self._trusted = trusted

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line. Like every handler it raises nothing."""
        try:
            stream = self._stream or sys.stderr
            stream.write(self._line(record) + "\n")
            stream.flush()
        except (OSError, ValueError):
            return

    def _line(self, record: logging.LogRecord) -> str:
        line: Line = {"event": f"{record.name.partition('.')[0]}.said", "message": _SECRETS.sub("…", self._message(record))}
        if record.exc_info and record.exc_info[1] is not None:
            line.update(_told(record.exc_info[1]))
        harmless(None, "", line)
        level = record.levelname.lower()
        at = datetime.fromtimestamp(record.created, UTC)
        if self._as_text:
            more = "".join(f" {name}={value}" for name, value in line.items() if name not in ("event", "message"))
            return f"{at:%Y-%m-%dT%H:%M:%S.%fZ} [{level:<9}] {line['event']}: {line['message']}{more}"
        return to_json({**line, "level": level, "timestamp": f"{at:%Y-%m-%dT%H:%M:%S.%fZ}"})

    def _message(self, record: logging.LogRecord) -> str:
        if record.name == "py.warnings":
            return record.getMessage().partition("\n")[0]  # what follows is a line of code
        return record.getMessage() if self._trusted else str(record.msg)


def take_over(log: Any, hub: Any, *, as_text: bool) -> None:
    """Has this process say all it says in one form: libraries, warnings, and the exceptions that nobody catches.

    Called once, by whoever owns the process; `log` takes our own lines, `hub` is gevent's.
    """
    logging.basicConfig(handlers=[Foreign(as_text=as_text)], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    # Each of these would print the exception's message, and gevent the arguments of the greenlet as well.
    hub.print_exception = lambda _context, kind, error, _trace: log.error("greenlet.broke", error=error or kind())
    sys.unraisablehook = lambda unraisable: log.error("exception.ignored", error=unraisable.exc_value)
    threading.excepthook = lambda thread: log.error("thread.broke", error=thread.exc_value)


def _told(error: BaseException) -> dict[str, Any]:
    told: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, OSError) and error.errno is not None:
        told["errno"] = errno.errorcode.get(error.errno, error.errno)
    elif isinstance(error, ImportError) and error.name:
        told["module"] = error.name
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        told["cause"] = type(cause).__name__
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    told["trace"] = frames[-MAX_FRAMES:]
    return told


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > MAX_CHARS:
            value = value[:MAX_CHARS] + "…"
        return value if value.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [_harmless(one) for one in value]
    if isinstance(value, dict):
        return {_harmless(name): _harmless(one) for name, one in value.items()}
    return value


def _escaped(character: str) -> str:
    # Also the separators that only Unicode knows, what turns the direction of writing, and half a surrogate pair.
    return character.encode("unicode_escape").decode()
