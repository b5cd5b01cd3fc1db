"""GET /aistream.js, /aistream.mjs: the browser's client, for pages that build nothing; `make client` makes it of clients/js."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from flask import Blueprint, Response, request

bp = Blueprint("client", __name__)

_FOLDER = Path(__file__).resolve().parent.parent / "static" / "client"
#: Seconds that nobody asks again: a page that was built against this version gets its fixes within minutes.
MAX_AGE = 300


@bp.get("/aistream.js")
def script() -> Response:
    """The client as a plain script, which sets `globalThis.aistream`. Any page may load it: nothing in it is secret."""
    return _answer("aistream.js")


@bp.get("/aistream.mjs")
def module() -> Response:
    """The client as an ES module. Browsers load a module of another origin by CORS, so those of `ALLOWED_ORIGINS` may."""
    return _answer("aistream.mjs")


def _answer(name: str) -> Response:
    content, tag = _read(name)
    response = Response(content, content_type="text/javascript; charset=utf-8")
    response.headers["Cache-Control"] = f"public, max-age={MAX_AGE}"
    # A plain script of another origin is asked for without CORS.
    response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    response.set_etag(tag)
    response.make_conditional(request)
    return response


@cache
def _read(name: str) -> tuple[bytes, str]:
    """A file and its tag, which is of the content: that of the time would differ between replicas."""
    content = (_FOLDER / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:16]
