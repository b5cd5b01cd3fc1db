"""The demo page, in DEV_MODE only: the whole path on one page, with this service playing n8n's part as well."""

from __future__ import annotations

import json
import shlex
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
from flask import Blueprint, Response, request, send_from_directory

from aistream.api import as_page, json_response, parts
from aistream.api.init import accept, read_body
from aistream.callback import timestamp
from aistream.errors import NotFound

bp = Blueprint("demo", __name__)

_ASSETS = Path(__file__).resolve().parent.parent / "static"
#: Headers of a callback that the page shows: what an author may want to check, and no noise.
_SHOWN_HEADERS = ("Content-Type", "User-Agent", "webhook-id", "webhook-timestamp", "webhook-signature")


@bp.get("/")
def page() -> Response:
    """The page."""
    return _asset("demo/index.html")


@bp.get("/static/<path:name>")
def asset(name: str) -> Response:
    """The page's own files."""
    return _asset(name)


@bp.get("/favicon.ico")
def icon() -> Response:
    """None: browsers ask for it all the same."""
    return Response(status=204)


@bp.get("/demo/models")
def models() -> Response:
    """What a person may choose from."""
    providers = parts().providers
    shown = [{"id": providers.name_of(route), "provider": route.provider} for route in providers.shown()]
    default = parts().config.default_model
    if default not in [model["id"] for model in shown]:
        default = shown[0]["id"]
    return json_response({"models": shown, "default": default})


@bp.post("/demo/start")
def start() -> Response:
    """Does n8n's part: signs a token and asks for an answer, exactly as POST /init-stream is asked."""
    asked = read_body(request.get_data(cache=False))
    key = uuid.uuid4().hex
    path = f"demo/callback/{key}"
    # The port of the socket itself: under `flask run --port` the configured one is another.
    origin = f"http://127.0.0.1:{request.environ.get('SERVER_PORT', parts().config.port)}"
    body: dict[str, Any] = {name: asked[name] for name in ("prompt", "model") if name in asked}
    body |= {"resumeUrl": f"{origin}/{path}", "userId": "demo", "chatId": "demo"}
    token = parts().tokens.sign_caller("demo", int(time.time()) + 300)
    answer, _ = accept(body, parts().tokens.verify_caller(token))
    shown = json.dumps({"n8nToken": token, **body}, ensure_ascii=False)
    curl = f"curl -X POST {origin}/init-stream -H 'Content-Type: application/json' -d {shlex.quote(shown)}"
    return json_response({**msgspec.to_builtins(answer), "callbackPath": path, "curl": curl})


@bp.post("/demo/callback/<key>")
def receive(key: str) -> Response:
    """Plays n8n's Wait node: takes the callback."""
    headers = {name: request.headers[name] for name in _SHOWN_HEADERS if name in request.headers}
    kept = {"received_at": timestamp(round(time.time() * 1000)), "headers": headers, "body": request.get_json()}
    parts().store.keep_demo_callback(_key(key), msgspec.json.encode(kept))
    return json_response({"message": "Workflow was started"})


@bp.get("/demo/callback/<key>")
def received(key: str) -> Response:
    """What the callback brought; 204 while it has not come."""
    kept = parts().store.demo_callback(_key(key))
    return Response(status=204) if kept is None else json_response(msgspec.Raw(kept))


@bp.post("/demo/drop/<session_id>")
def drop(session_id: str) -> Response:
    """Ends the stream's connections on this worker without an ending, as a broken line would."""
    viewers = parts().viewing.viewers(session_id)
    for viewer in viewers:
        viewer.leave()
    return json_response({"dropped": len(viewers)})


def _asset(name: str) -> Response:
    return as_page(send_from_directory(_ASSETS, name, max_age=0))


def _key(text: str) -> str:
    try:
        return uuid.UUID(text).hex
    except ValueError:
        raise NotFound("There is no such callback.") from None
