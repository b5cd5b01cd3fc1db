"""`aistream stream`: an answer in the terminal, as it is written."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click
import gevent

from aistream import parse
from aistream.cli.common import configured, dev
from aistream.cli.following import Following, Lost, Opened, Refused, Said, Started, cancel, start
from aistream.cli.token import SUBJECT, default_resume_url
from aistream.config import Config
from aistream.tokens import Tokens

#: Seconds for which the token is good: it is shown once, at init.
TTL = 300
#: Exit codes.
COMPLETED, FAILED, STOPPED = 0, 1, 130
#: Codes that are not the service's.
_OWN = ("refused", "unreachable")
#: What a terminal would obey, but for lines and tabs.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@click.command(
    short_help="Show an answer as it is written.",
    epilog="""\b
Examples:
  aistream stream "Why is the sky blue?"
  aistream stream --dev "Hello"             beside aistream serve --dev
  git diff | aistream stream --system "Write a commit message." --model gpt-4o > message.txt
  aistream stream --watch "http://127.0.0.1:8000/stream/…?access_token=…"
  aistream stream --json "Hello" | jq -r 'select(.type == "summary").status'

\b
Ctrl-C stops the answer (n8n gets what was written so far); once more leaves at once.
Exit codes: 0 completed, 1 failed, 2 usage, 130 stopped.
""",
)
@click.argument("prompt", required=False)
@click.option("--url", help="Where the service is; by default BASE_URL, which is http://127.0.0.1:PORT in DEV_MODE.")
@click.option("--model", help="By default DEFAULT_MODEL.")
@click.option("--system", help="Instructions for the model.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 to 2.")
@click.option("--resume-url", help="Where the callback goes; by default to DEV_MODE's own receiver, else where nobody waits.")
@click.option("--watch", metavar="STREAM_URL", help="Follow this streamUrl in place of starting an answer.")
@click.option("--reasoning", is_flag=True, help="What the model thinks aloud, on standard error.")
@dev
@click.option("--json", "as_json", is_flag=True, help="One JSON object per event on standard output, a summary as the last.")
def stream(
    prompt: str | None,
    url: str | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    resume_url: str | None,
    watch: str | None,
    reasoning: bool,
    as_json: bool,
) -> None:
    """Has PROMPT answered by a running service, and shows the answer as it is written.

    '-', or something piped in, is read as the prompt. The token is signed with this configuration. The answer's exact text goes
    to standard output, everything else to standard error. A connection that is lost is made again, and the answer goes on where
    it was.
    """
    if watch is not None:
        if prompt is not None or any(one is not None for one in (url, model, system, max_tokens, temperature, resume_url)):
            raise click.UsageError("--watch follows an answer that was asked for: expected no prompt, and no option of one")
        if not re.match(r"https?://[^/]+/.*stream/[^/?]+", watch):
            raise click.UsageError("--watch: expected a streamUrl, such as http://127.0.0.1:8000/stream/… with its access token")
        sys.exit(_Run(_Output(as_json, reasoning)).run(lambda: Started("", watch, [])))
    asked = {"prompt": _prompt(prompt), "model": model, "system": system, "max_tokens": max_tokens, "temperature": temperature}
    config = configured()
    asked["resumeUrl"] = resume_url or default_resume_url(config)
    base_url = _checked(url or config.base_url)
    token = Tokens(config, time.time).sign_caller(SUBJECT, int(time.time()) + min(TTL, int(config.jwt_max_lifetime_seconds)))
    body = {name: value for name, value in asked.items() if value is not None}
    output = _Output(as_json, reasoning, _callback(config, str(asked["resumeUrl"]), given=resume_url is not None))
    sys.exit(_Run(output).run(lambda: start(base_url, token, body)))


def _checked(url: str) -> str:
    try:
        parse.http_url(url)
    except parse.BadValue as bad:
        raise click.UsageError(f"--url: expected {bad}") from None
    return url.rstrip("/")


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise click.UsageError("expected a prompt, or '-' and a prompt on standard input")
    if given is None or given == "-":
        try:
            given = sys.stdin.buffer.read().decode()
        except ValueError:
            raise click.UsageError("expected text in UTF-8 on standard input") from None
    if not given:
        raise click.UsageError("expected a prompt that is not empty")
    return given


def _callback(config: Config, resume_url: str, *, given: bool) -> str:
    """What happens to the callback, for a person. Of a resumeUrl that was given the origin alone: its query is a secret."""
    if given:
        parts = urlsplit(resume_url)
        return f"the callback goes to {parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    if config.dev_mode:
        return f"the callback is shown by {resume_url}"
    return (
        f"the callback goes to {config.resume_url_allowed_origins[0]}, where no execution waits for it: it will be a dead letter "
        "(--resume-url gives another)"
    )


class _Output:
    """Standard output and standard error: the answer and nothing else on the one, notes on the other."""

    def __init__(self, as_json: bool, reasoning: bool, callback: str = "") -> None:
        self.as_json = as_json
        self._reasoning = reasoning
        self.callback = callback
        self._out = sys.stdout.buffer
        self._terminal = sys.stdout.isatty()
        #: The terminal's cursor stands in mid-line.
        self._open_line = False
        #: So does standard error's, after a thought.
        self._thinking = False

    def text(self, text: str) -> None:
        """A piece of the answer, exactly. A terminal gets no control characters: a model could write what it obeys."""
        if self.as_json:
            return
        if self._thinking:
            self._thinking = False
            click.echo(err=True)
        if self._terminal:
            text = _CONTROL.sub("\ufffd", text)
            self._open_line = not text.endswith("\n")
        self._write(text)

    def thought(self, text: str) -> None:
        """A piece of what the model thinks aloud."""
        if self._reasoning and not self.as_json:
            click.secho(_CONTROL.sub("\ufffd", text), dim=True, err=True, nl=False)
            self._open_line = self._thinking = not text.endswith("\n")

    def line(self, told: dict[str, Any]) -> None:
        """An object for programs."""
        if self.as_json:
            self._write(json.dumps(told, ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        """A line for people."""
        if self._open_line:
            click.echo(err=True)
            self._open_line = self._thinking = False
        click.secho(text, dim=True, err=True)

    def _write(self, text: str) -> None:
        # Half a surrogate pair cannot be in UTF-8, and the service sends none.
        self._out.write(text.encode("utf-8", "replace"))
        self._out.flush()


class _Run:
    """One answer, from the request to the last line."""

    def __init__(self, output: _Output) -> None:
        self._output = output
        self._started: Started | None = None
        self._following: Following | None = None
        self._interrupts = 0
        self._characters = 0
        self._opened_at = self._first_at = self._last_at = 0.0
        self._start: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}

    def run(self, begin: Callable[[], Started]) -> int:
        """The exit code."""
        self._opened_at = time.monotonic()
        reader = gevent.spawn(self._guarded, begin)
        handler = gevent.signal_handler(signal.SIGINT, self._interrupted, reader)
        try:
            reader.join()
        finally:
            handler.cancel()
        code = reader.value
        if isinstance(code, int):
            return code
        if isinstance(code, BaseException) and not isinstance(code, gevent.GreenletExit):
            raise code
        if self._started is None:
            self._output.note("left: what may have been asked for expires by itself")
        else:
            self._output.note("left: n8n gets the answer all the same, or its part where it was stopped")
        return STOPPED

    def _guarded(self, begin: Callable[[], Started]) -> int | BaseException:
        try:
            return self._run(begin)
        except BrokenPipeError:
            # Whoever read it has seen enough. Python would complain when it flushes at its own exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._output.note("nobody reads standard output any more: the answer goes on without a viewer")
            return FAILED
        except Exception as error:  # gevent would print it as well
            return error

    def _run(self, begin: Callable[[], Started]) -> int:
        output = self._output
        try:
            self._started = started = begin()
            for warning in started.warnings:
                output.note(f"warning: {warning}")
            self._following = Following(started.stream_url)
            self._opened_at = time.monotonic()
            for one in self._following.run():
                if isinstance(one, Said):
                    self._take(one)
                    if one.ends:
                        return self._end(one.event)
                elif isinstance(one, Lost):
                    output.note(f"{one.reason}; asked again in {one.delay:.1f} s")
                elif isinstance(one, Opened) and one.reconnects:
                    output.note("goes on")
        except Refused as refused:
            error = {"code": refused.code or "refused", "message": str(refused), "retryable": False}
            hint = "; `aistream serve --dev` starts one on this machine" if refused.code == "unreachable" else ""
            return self._end({"type": "error", **error}, hint)
        raise AssertionError("a stream ends with its ending")

    def _take(self, said: Said) -> None:
        event = said.event
        self._output.line({"id": said.id, **event})
        kind, text = event.get("type"), str(event.get("text", ""))
        if kind in ("text", "reasoning"):
            self._last_at = time.monotonic()
            self._first_at = self._first_at or self._last_at
        if kind == "text":
            self._characters += len(text)
            self._output.text(text)
        elif kind == "reasoning":
            self._output.thought(text)
        elif kind == "usage":
            self._usage = event
        elif kind == "start":
            self._start = event

    def _end(self, event: dict[str, Any], hint: str = "") -> int:
        status = {"end": "completed", "cancelled": "cancelled"}.get(event["type"], "failed")
        error = {name: event.get(name) for name in ("code", "message", "retryable")} if status == "failed" else None
        self._output.line(self._summary(status, event.get("finish_reason"), error))
        reason = event.get("finish_reason")
        words = status + (f" ({reason})" if status == "completed" and reason else "")
        if error:
            code = str(error["code"])
            told = code in _OWN or code in str(error["message"])
            words = f"failed: {error['message']}{'' if told else f' ({code})'}{hint}"
        self._output.note(" · ".join([words, *self._figures()]))
        if status == "cancelled":
            self._output.note(f"n8n gets status cancelled, with these {self._characters} characters as the answer")
        if self._output.callback and self._started:
            self._output.note(self._output.callback)
        return {"completed": COMPLETED, "cancelled": STOPPED}.get(status, FAILED)

    @property
    def _rate(self) -> float | None:
        """Tokens per second, between the first and the last piece."""
        tokens, seconds = self._usage.get("output_tokens"), self._last_at - self._first_at
        return tokens / seconds if tokens and seconds > 0.05 else None

    @property
    def _first(self) -> float | None:
        """Seconds until the first piece."""
        return self._first_at - self._opened_at if self._first_at else None

    @property
    def _reconnects(self) -> int:
        return self._following.reconnects if self._following else 0

    def _summary(self, status: str, finish_reason: str | None, error: dict[str, Any] | None) -> dict[str, Any]:
        """The last object for programs."""
        return {
            "type": "summary",
            "status": status,
            "finish_reason": finish_reason if status == "completed" else status,
            "streamId": self._start.get("streamId") or (self._started.stream_id if self._started else None) or None,
            "model": self._start.get("model"),
            "provider": self._start.get("provider"),
            "input_tokens": self._usage.get("input_tokens"),
            "output_tokens": self._usage.get("output_tokens"),
            "tokens_per_second": self._rate and round(self._rate, 1),
            "time_to_first_token_ms": None if self._first is None else round(self._first * 1000),
            "duration_ms": round((time.monotonic() - self._opened_at) * 1000),
            "reconnects": self._reconnects,
            "last_id": self._following.last_id if self._following else "",
            "error": error,
        }

    def _figures(self) -> list[str]:
        """What was measured and counted, for people."""
        tokens, reconnects = self._usage.get("output_tokens"), self._reconnects
        figures = [f"{self._usage.get('input_tokens')} tokens in, {tokens} out"] if tokens is not None else []
        figures += [f"{self._rate:.1f} tokens/s"] if self._rate else []
        figures += [f"first token after {self._first:.2f} s"] if self._first is not None else []
        return figures + ([f"{reconnects} reconnect{'s' if reconnects > 1 else ''}"] if reconnects else [])

    def _interrupted(self, reader: gevent.Greenlet[..., Any]) -> None:
        self._interrupts += 1
        if self._interrupts > 1 or self._started is None:
            reader.kill(block=False)
            return
        self._output.note("stopping the answer; Ctrl-C again leaves at once")
        try:
            cancel(self._started.stream_url)  # the stream itself says what came of it
        except Refused as refused:
            self._output.note(f"it could not be stopped: {refused}")
