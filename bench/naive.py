"""The relay that one would write in an afternoon, as the baseline of `python -m bench`: Flask, gevent, and the SDK as documented.

The same three calls as the service (init, stream, callback) with the session in Redis, and nothing of what sets the service
apart: no log (a reload starts nothing, a lost line loses the answer), no retry, no lease, no limit. No mistakes on purpose
either: one client for all, pools that are large enough, the callback also when the viewer has left.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

from gevent import monkey

monkey.patch_all()

import httpx2
import jwt
import openai
import redis
import requests
from flask import Flask, Response, abort, jsonify, request, stream_with_context

SECRET = os.environ["JWT_SECRET"]

app = Flask(__name__)
# redis-py's own pool raises at the 101st request of one moment.
store = redis.Redis(connection_pool=redis.BlockingConnectionPool.from_url(os.environ["REDIS_URL"], max_connections=100))
# The SDK's own pool of 1,000 connections would hold the 1,001st stream back in silence.
model = openai.OpenAI(http_client=openai.DefaultHttpxClient(limits=httpx2.Limits(max_connections=20_000)))
n8n = requests.Session()


@app.get("/health")
def health() -> Response:
    """Alive."""
    return jsonify(ok=True)


@app.post("/init-stream")
def init_stream() -> Response:
    """Keeps the session for a minute; gives the URL of its stream."""
    body = request.get_json()
    _verified(body.pop("n8nToken"))
    session_id = str(uuid.uuid4())
    store.set(f"naive:{session_id}", json.dumps(body), ex=60)
    token = jwt.encode({"sid": session_id, "exp": int(time.time()) + 60}, SECRET, "HS256")
    return jsonify(ok=True, streamUrl=f"{request.url_root}stream/{session_id}?access_token={token}")


@app.get("/stream/<session_id>")
def stream(session_id: str) -> Response:
    """Asks the model and passes on what it says; then tells n8n."""
    if _verified(request.args.get("access_token", "")).get("sid") != session_id:
        abort(403)
    kept: Any = store.getdel(f"naive:{session_id}")
    if kept is None:
        abort(404)
    answer = Response(stream_with_context(_events(json.loads(kept))), mimetype="text/event-stream")
    answer.headers["Cache-Control"] = "no-cache"
    return answer


def _events(session: dict[str, Any]) -> Iterator[str]:
    parts: list[str] = []
    usage: Any = None
    try:
        chunks = model.chat.completions.create(
            model=session["model"],
            max_tokens=session["max_tokens"],
            messages=[{"role": "user", "content": session["prompt"]}],
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in chunks:
            usage = chunk.usage or usage
            if chunk.choices and (text := chunk.choices[0].delta.content):
                parts.append(text)
                lines = text.replace("\n", "\ndata: ")
                yield f"data: {lines}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        callback = {
            **{name: session[name] for name in ("userId", "chatId", "prompt")},
            "answer": "".join(parts),
            "input_tokens": usage.prompt_tokens if usage else 0,
            "output_tokens": usage.completion_tokens if usage else 0,
            "status": "completed" if usage else "failed",
        }
        n8n.post(session["resumeUrl"], json=callback, timeout=10)


def _verified(token: str) -> dict[str, Any]:
    try:
        return dict(jwt.decode(token, SECRET, algorithms=["HS256"]))
    except jwt.PyJWTError:
        abort(401)
