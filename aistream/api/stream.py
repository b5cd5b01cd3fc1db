"""GET /stream/<id>: the answer as Server-Sent Events, to a plain EventSource."""

from __future__ import annotations

import uuid

from flask import Blueprint, Response, request

from aistream.api import bearer, parts
from aistream.errors import NotFound, Refused
from aistream.events import Cursor
from aistream.sse import Mode
from aistream.viewing import Viewer, refusal_frame

bp = Blueprint("stream", __name__)

HEADERS = {
    # no-transform: a proxy that compresses a stream also buffers it.
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}


@bp.get("/stream/<session_id>")
def watch(session_id: str) -> Response:
    """Everything after the cursor, then live. The first to come starts the generation; 204 for who has seen the ending."""
    token = bearer() or request.args.get("access_token")
    if parts().tokens.verify_viewer(token) != _normal(session_id):
        raise NotFound("There is no such stream.")
    cursor = Cursor.parse(request.headers.get("Last-Event-ID") or request.args.get("last_event_id"))
    mode: Mode = "json" if request.args.get("format") == "json" else "text"
    viewer = Viewer(parts().viewing, _normal(session_id), cursor, mode)
    try:
        if not viewer.open():
            return Response(status=204, headers=HEADERS)
    except Refused as refused:
        if "text/event-stream" not in request.headers.get("Accept", ""):
            raise
        if refused.final:
            # A browser never shows a person the body of any other status.
            return _events(Response(refusal_frame(refused, cursor, mode)))
        # What may pass is held: the viewer's stream begins with heartbeats.
    sock = request.environ.get("gunicorn.socket") or request.environ.get("werkzeug.socket")
    if sock is not None:
        viewer.watch(sock)
    response = _events(Response(viewer.stream(), direct_passthrough=True))
    response.call_on_close(viewer.close)
    return response


def _events(response: Response) -> Response:
    response.headers.update(HEADERS)
    response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
    return response


def _normal(session_id: str) -> str:
    """The id as we write it, or `""`: no other text may become part of a key."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return ""
