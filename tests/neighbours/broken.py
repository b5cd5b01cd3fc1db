"""Routes that break the service from inside: `broken_app` is the service with them, for gunicorn and `flask run`.

Each way of breaking has `q` of the request's query in everything that Python or a library could print of it.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from flask import Flask, Response, request

from aistream.telemetry import log

#: What a log must not have, and where the net is tried: these do leak.
LEAKS = ("print", "line")


def _raises(word: str) -> None:
    value = {"asked": word}
    raise ValueError(f"it was {word}", value)


def _raises_from_another(word: str) -> None:
    try:
        _raises(word)
    except ValueError as error:
        raise OSError(5, f"reading {word}") from error


def _ignored(word: str) -> None:
    class Leaving:
        def __del__(self) -> None:
            _raises(word)

    Leaving()


def _logged(word: str) -> None:
    for name in ("openai._base_client", "anthropic._base_client", "httpx2", "httpcore2.http11", "urllib3.connectionpool", "new"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "Request options: %s", {"prompt": word})
    try:
        _raises(word)
    except ValueError:
        logging.getLogger("new").exception("Exception on %s", f"/stream/x?access_token={word}")


WAYS: dict[str, Callable[[str], object]] = {
    "route": _raises,
    "cause": _raises_from_another,
    "greenlet": lambda word: gevent.joinall([gevent.spawn(_raises, word)]),
    "hub": lambda word: (gevent.get_hub().loop.run_callback(_raises, word), gevent.sleep(0.01)),
    "thread": lambda word: (threading.Thread(target=_raises, args=(word,)).start(), gevent.sleep(0.01)),
    "finalizer": _ignored,
    "warning": lambda _word: warnings.warn("something is old", UserWarning, stacklevel=1),
    "libraries": _logged,
    "print": lambda word: print("it was", word, flush=True),
    "line": lambda word: log.info("prompt.taken", prompt=word),
}


def _break(way: str) -> Response:
    WAYS[way](request.args["q"])
    return Response("done")


def _break_after(word: str) -> Iterator[bytes]:
    yield b"begun"
    _raises(word)


def breaking(app: Flask) -> Flask:
    """The app with `/break/<way>?q=…`, for each of WAYS, for `stream` (its answer has begun) and for `server` (around it)."""
    app.add_url_rule("/break/<way>", view_func=_break)
    app.add_url_rule("/break/stream", "stream", lambda: Response(_break_after(request.args["q"])))
    inner = app.wsgi_app

    def outer(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/break/server":
            _raises(environ["QUERY_STRING"])
        return inner(environ, start_response)

    app.wsgi_app = outer  # type: ignore[method-assign]
    return app
