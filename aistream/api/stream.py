"""GET /stream/<id>: the answer as Server-Sent Events, to a plain EventSource. POST /stream/<id>/cancel stops it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from flask import Blueprint, Response, g, request

from aistream import metrics
from aistream.api import Ok, bearer, json_response, normal_id, parts, tell
from aistream.callback import one_of
from aistream.errors import Draining, NotFound, Refused, StoreUnavailable
from aistream.events import Cursor
from aistream.session import Missing, State
from aistream.sse import Mode
from aistream.viewing import Viewer, refusal_frame

bp = Blueprint("stream", __name__)

HEADERS = {
    # no-transform: a proxy that compresses a stream also buffers it.
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}


class CancelAnswer(msgspec.Struct, frozen=True, kw_only=True, rename={"stream_id": "streamId"}):
    """`cancelling`: it runs, and its ending follows; else the ending that it has."""

    ok: Ok = True
    stream_id: str
    status: Annotated[str, one_of("cancelling", State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED)]


@bp.get("/stream/<session_id>")
def watch(session_id: str) -> Response:
    """Everything after the cursor, then live. The first to come starts the generation; 204 for who has seen the ending."""
    session_id = _allowed(session_id)
    if request.method == "HEAD":
        return _events(Response())  # whoever checks a link watches nothing, and starts nothing
    if parts().background.draining and request.headers.get("X-Retry-Elsewhere"):
        raise Draining  # to a balancer that has no health checks: it asks another replica, and no browser ever sees this
    cursor = Cursor.parse(request.headers.get("Last-Event-ID") or request.args.get("last_event_id"))
    mode: Mode = "json" if request.args.get("format") == "json" else "text"
    viewer = Viewer(parts().viewing, session_id, cursor, mode, g.request_id)
    try:
        if not viewer.open():
            return Response(status=204, headers=HEADERS)
    except Refused as refused:
        if "text/event-stream" not in request.headers.get("Accept", ""):
            metrics.viewer_refused(refused.code)
            viewer.hang_up()
            raise
        if not refused.held:
            # A browser never shows a person the body of any other status.
            tell(code=refused.code)
            return _events(Response(refusal_frame(refused, cursor, mode)))
        # What may pass is held: the viewer's stream begins with heartbeats.
    environ = request.environ
    sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if sock is not None:
        # gunicorn answers HTTP/1.1 in chunks where a response has no length.
        viewer.watch(sock, chunked="gunicorn.socket" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1")
    tell(event=None)  # viewer.left is its line, when it has
    response = _events(Response(viewer.stream(), direct_passthrough=True))
    response.call_on_close(viewer.close)
    return response


@bp.post("/stream/<session_id>/cancel")
def cancel(session_id: str) -> Response:
    """Stops the session, from any worker. 202 while its ending is still to come, 200 when it has ended; idempotent.

    No body and no header of its own, so that a page may send it without a CORS preflight, also while it is being left.
    """
    session_id = _allowed(session_id)
    state = parts().generations.cancel(session_id)
    if isinstance(state, Missing):
        raise StoreUnavailable if state.perhaps else NotFound("There is no such stream.")
    ended = state is not State.RUNNING
    answer = CancelAnswer(stream_id=session_id, status=state.value if ended else "cancelling")
    return json_response(answer, 200 if ended else 202)


def _allowed(session_id: str) -> str:
    """The id as we write it. Raises Unauthorized without a good token, NotFound with another session's."""
    token = bearer() or request.args.get("access_token")
    normal = normal_id(session_id)
    if parts().tokens.verify_viewer(token) != normal:
        raise NotFound("There is no such stream.")
    tell(session=normal)
    return normal


def _events(response: Response) -> Response:
    response.headers.update(HEADERS)
    response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
    return response
