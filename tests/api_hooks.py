"""How schemathesis, in a process of its own, gets past the doors: loaded by it, see tests/test_openapi.py.

Most requests come with the right token, and name a session that is there; what a document cannot say (which origins a resumeUrl
may have) is filled in where the request is meant to be good.
"""

import json
import os
import uuid
from typing import Any
from urllib.parse import parse_qs, urlsplit

import schemathesis

_GIVEN = json.loads(os.environ["AISTREAM_CASES"])
#: Ids of sessions -> their viewers' tokens. An unknown one is among those that are given; what is begun on the way is added.
_TOKENS: dict[str, str] = dict(_GIVEN["sessions"])
#: What only this service's configuration knows to be good.
_FAIR = {"resumeUrl": _GIVEN["resume_url"], "model": "echo"}


@schemathesis.auth(refresh_interval=None)
class Tokens:
    """The token that the operation wants. Runs for every request, so sessions are named here, too."""

    def get(self, case: Any, ctx: Any) -> str:
        """n8n's, the metrics', or, by the session in the path, a viewer's."""
        if "id" in (case.path_parameters or {}):
            _name_a_session(case)
        if case.path.startswith("/stream/"):
            return _TOKENS.get(str(case.path_parameters["id"]), "of.nobody.here")
        return str(_GIVEN["metrics_token" if case.path == "/metrics" else "n8n_token"])

    def set(self, case: Any, data: str, ctx: Any) -> None:
        """As the header."""
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Fills in what no schema says."""
    if case.meta is None or case.meta.generation.mode.is_negative or not isinstance(case.body, dict):
        return
    body = case.body
    body.update({name: value for name, value in _FAIR.items() if name in body and body[name] is not None})
    if body.get("fallbackModels"):
        body["fallbackModels"] = ["echo"] * len(body["fallbackModels"])


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Remembers the session that was begun: the document's links lead there."""
    if (case.method, case.path, response.status_code) == ("POST", "/init-stream", 200):
        answer = response.json()
        _TOKENS[answer["streamId"]] = parse_qs(urlsplit(answer["streamUrl"]).query)["access_token"][0]


def _name_a_session(case: Any) -> None:
    """Puts one that is there in the place of an invented one."""
    named = str(case.path_parameters["id"])
    try:
        number = int(uuid.UUID(named))
    except ValueError:
        return  # meant to be none
    if named not in _TOKENS:
        case.path_parameters["id"] = sorted(_GIVEN["sessions"])[number % len(_GIVEN["sessions"])]
