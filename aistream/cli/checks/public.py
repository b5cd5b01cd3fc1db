"""The side that browsers see: whether BASE_URL leads to this service, unspoilt by what stands before it.

Asked from here, which is not where browsers are. A stream's head is asked with HEAD, which starts and watches nothing; whether a
proxy holds back a stream that runs cannot be seen without one.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

from aistream import __version__
from aistream.cli.checks import Clock, Finding, Patient, State, reach
from aistream.config import Config
from aistream.installation import EVERYWHERE
from aistream.tokens import Tokens

NAME = "service"
PUBLIC = "BASE_URL"
_TRUST = "give the proxy a certificate from a public authority, with this name and its whole chain"


def check(patient: Patient) -> Iterator[Finding]:
    """The service on this machine, then BASE_URL."""
    config = patient.found.config
    local = _local(config)
    here = _health(local, patient)
    runs = isinstance(here, reach.Answer) and _version(here) is not None
    yield _of_local(local, here)
    if config.base_url != local:
        yield from _of_public(config, patient, runs)
    elif runs:
        yield from _head(config, patient)


def _local(config: Config) -> str:
    host = {EVERYWHERE: "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _health(base: str, patient: Patient) -> reach.Answer | reach.Unreachable:
    try:
        # What a browser says: a proxy that compresses, compresses for it.
        return reach.ask(f"{base}/health", headers={"Accept-Encoding": "gzip, deflate, br"}, trust=_TRUST)
    except reach.Unreachable as unreachable:
        return unreachable


def _version(answer: reach.Answer) -> str | None:
    """The version of the aistream that has answered; None for anything else."""
    try:
        told = json.loads(answer.body)
        return str(told["version"]) if answer.status == 200 and told["status"] == "alive" else None
    except (ValueError, KeyError, TypeError):
        return None


def _of_local(base: str, here: reach.Answer | reach.Unreachable) -> Finding:
    where = urlsplit(base).netloc
    if isinstance(here, reach.Unreachable):
        if here.found.endswith("refuses connections"):
            return Finding(NAME, "skipped", f"nothing listens on {where}: it is not started here", "aistream serve")
        return Finding(NAME, "warning", here.found, here.mend)
    version = _version(here)
    if version is None:
        return Finding(NAME, "problem", f"what answers on {where} is not aistream", "stop that, or set another PORT")
    if version != __version__:
        return Finding(
            NAME,
            "warning",
            f"aistream {version} runs on {where}, and this is {__version__}",
            "restart it: it is of another release",
        )
    return Finding(NAME, "ok", f"aistream {version} runs on {where}")


def _of_public(config: Config, patient: Patient, runs: bool) -> Iterator[Finding]:
    there = _health(config.base_url, patient)
    worse: State = "problem" if runs else "warning"
    if isinstance(there, reach.Unreachable):
        mend = there.mend if runs else f"{there.mend} (and start the service)"
        yield Finding(PUBLIC, worse, f"from here {there.found}", mend)
        return
    if there.ahead is not None:
        patient.clocks.append(Clock(urlsplit(config.base_url).netloc, there.ahead))
    if 300 <= there.status < 400:
        yield Finding(PUBLIC, "problem", f"{config.base_url} redirects ({there.status})", "set BASE_URL to where it leads")
        return
    if there.status >= 500:
        yield Finding(
            PUBLIC, worse, f"{config.base_url} answers {there.status}", "start the service, or correct the proxy's address of it"
        )
        return
    if _version(there) is None:
        mend = "correct BASE_URL (with its path prefix, if it has one), or the proxy's rule for it"
        yield Finding(PUBLIC, "problem", f"what answers at {config.base_url} is not aistream ({there.status})", mend)
        return
    yield from _head(config, patient)


def _head(config: Config, patient: Patient) -> Iterator[Finding]:
    if patient.faulty("JWT_SECRET"):
        yield Finding(f"{PUBLIC} stream", "skipped", "nothing can be signed", "mend JWT_SECRET above first")
        return
    session_id = str(uuid.uuid4())
    token = Tokens(config, time.time).sign_viewer(session_id, int(time.time()) + 60)
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "gzip, deflate, br", "Authorization": f"Bearer {token}"}
    try:
        answer = reach.ask(f"{config.base_url}/stream/{session_id}", method="HEAD", headers=headers, trust=_TRUST)
    except reach.Unreachable as unreachable:
        yield Finding(PUBLIC, "problem", f"a stream's head: {unreachable.found}", unreachable.mend)
        return
    name = f"{PUBLIC} stream"
    told = answer.headers
    if answer.status == 401:
        mend = "give both the same JWT_SECRET, or correct BASE_URL"
        yield Finding(name, "problem", "the aistream there does not accept what this configuration signs", mend)
    elif answer.status != 200 or not told.get("content-type", "").startswith("text/event-stream"):
        mend = "have the proxy pass /stream/ on as it is, with its Authorization header"
        yield Finding(name, "problem", f"a stream's head is answered {answer.status}, and not as one", mend)
    elif "content-encoding" in told:
        mend = "switch compression off for text/event-stream in the proxy: it holds back what it compresses"
        yield Finding(name, "problem", f"a proxy compresses streams ({told['content-encoding'][:20]})", mend)
    elif "no-transform" not in told.get("cache-control", ""):
        mend = "have the proxy leave Cache-Control as it is: another one behind it may compress or keep a stream"
        yield Finding(name, "warning", "a proxy takes no-transform out of a stream's head", mend)
    else:
        yield Finding(name, "ok", f"{config.base_url} passes a stream's head on unspoilt, and accepts what is signed here")
