"""`aistream callbacks list | show | redeliver`.

It works on the store itself, with the service's own configuration: it sees those of all subjects, also while no
worker is alive. Whatever it makes due is sent by the workers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

import click
import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aistream.callback import description
from aistream.cli.common import as_json, configured, console
from aistream.config import Config
from aistream.errors import StoreUnavailable
from aistream.outbox import Outbox, Redelivery
from aistream.session import Record
from aistream.store import Store

State = Literal["owed", "dead"]

_TOLD: dict[Redelivery, str] = {
    "owed": "due now: the workers send it at their next look, within a second",
    "trying": "is being attempted at this moment",
    "delivered": "has been delivered: left as it is",
    "not_ended": "has not ended yet: its callback follows the ending",
    "gone": "cannot be delivered any more: its answer is no longer kept",
    "missing": "is not known (any more)",
}
#: What counts as done.
_DONE: tuple[Redelivery, ...] = ("owed", "trying")


@click.group(
    short_help="What n8n is still owed, or could not be given.",
    epilog="""\b
Examples:
  aistream callbacks list --state dead
  aistream callbacks show 3d5f6c1e-…        every attempt, and what came of it
  aistream callbacks redeliver --all        once n8n is back
""",
)
def callbacks() -> None:
    """What n8n is still owed, and what could not be delivered."""


@callbacks.command("list")
@click.option("--state", type=click.Choice(["dead", "owed"]), help="Only these; by default both.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Most of each state to show.")
@as_json
def list_(state: State | None, limit: int, as_json: bool) -> None:
    """Callbacks that are owed or dead, those that have been so for longest first."""
    with _outbox() as outbox:
        states: tuple[State, ...] = (state,) if state else ("owed", "dead")
        found = [record for one in states for record in _take(outbox, one, limit)]
        counts = outbox.counts()
    if as_json:
        for record in found:
            click.echo(msgspec.json.encode(description(record)))
        return
    if found:
        console().print(_table(found))
    click.echo(f"{counts.owed} owed, {counts.dead} dead" + (f"; {len(found)} shown" if found else ""))


@callbacks.command()
@click.argument("session_id")
@as_json
def show(session_id: str, as_json: bool) -> None:
    """One session: its state, its callback, and every attempt with what came of it."""
    with _outbox() as outbox:
        record = outbox.record(session_id)
    if record is None:
        sys.exit(f"{session_id} {_TOLD['missing']}")
    if as_json:
        click.echo(msgspec.json.encode(description(record)))
        return
    console().print(_facts(record))
    if record.callback and record.callback.history:
        console().print(_history(record))


@callbacks.command()
@click.argument("session_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every dead letter.")
@as_json
def redeliver(session_ids: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Has callbacks delivered again, each with its whole schedule before it.

    Exit code 1 where one could not be.
    """
    if bool(session_ids) == everything:
        raise click.UsageError("expected ids of sessions, or --all for every dead letter")
    with _outbox() as outbox:
        asked = [record.id for record in _take(outbox, "dead", None)] if everything else list(session_ids)
        quick = len(asked) < 20 or not sys.stderr.isatty()
        progress = track(asked, "redelivering", console=Console(stderr=True), transient=True, disable=quick)
        outcomes = {session_id: outbox.redeliver(session_id) for session_id in progress}
    for session_id, outcome in outcomes.items():
        if as_json:
            click.echo(json.dumps({"streamId": session_id, "outcome": outcome}))
        elif not everything or outcome not in _DONE:
            click.echo(f"{session_id} {_TOLD[outcome]}")
    done = sum(outcome in _DONE for outcome in outcomes.values())
    if everything and not as_json:
        click.echo(f"{done} of {len(outcomes)} dead letters are due now" if outcomes else "there are no dead letters")
    if done < len(outcomes):
        sys.exit(1)


class _outbox:
    """The callbacks in the configured store; what keeps it from answering is one line and exit code 1."""

    def __enter__(self) -> Outbox:
        self._store = _open(configured())
        return self._store.outbox

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._store.close()
        if isinstance(error, StoreUnavailable):
            sys.exit("aistream: Redis cannot be reached at REDIS_URL, or cannot serve now")


def _open(config: Config) -> Store:
    if config.embedded_store:
        sys.exit(
            "aistream: REDIS_URL is not set. The embedded store lives inside the service's own process: ask it over HTTP "
            "(GET /callbacks?state=dead, POST /callbacks/<id>/redeliver)."
        )
    return Store(config)


def _take(outbox: Outbox, state: State, limit: int | None) -> Iterator[Record]:
    after, left = None, limit
    while left is None or left > 0:
        page = outbox.callbacks(state, after=after, limit=1_000 if left is None else min(left, 1_000))
        yield from page.callbacks
        after, left = page.after, None if left is None else left - len(page.callbacks)
        if after is None:
            return


def _table(records: list[Record]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("session", "callback", "ended", "attempts", "next", "origin", "answer", "last answer"):
        table.add_column(title, no_wrap=title == "session", overflow="fold")
    for record in records:
        callback = record.callback
        if callback is not None:
            table.add_row(
                record.id,
                callback.state,
                _ago(record.ended_at),
                str(callback.attempt),
                "now" if callback.open else _in(callback.next_at) if callback.state == "owed" else "-",
                callback.origin,
                record.state.value,
                callback.last_answer or "-",
            )
    return table


def _facts(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    told = description(record)
    rows = {
        "session": record.id,
        "subject": record.subject or "(none)",
        "status": told.status + (f", {told.error.code}: {told.error.message}" if told.error else ""),
        "model": f"{told.model} ({told.provider})",
        "created": _when(record.created_at),
        "started": _when(record.started_at),
        "ended": _when(record.ended_at),
    }
    if told.usage:
        rows["tokens"] = f"{told.usage.input_tokens} in, {told.usage.output_tokens} out ({told.usage.source})"
    if record.callback:
        callback = record.callback
        rows["callback"] = f"{callback.state} to {callback.origin}, {callback.attempt} attempts"
        if callback.state == "owed":
            rows["next attempt"] = "now" if callback.open else _in(callback.next_at)
        if callback.last_answer:
            rows["last answer"] = callback.last_answer
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _history(record: Record) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("attempt", "at", "outcome", "status", "took", "reason"):
        table.add_column(title, overflow="fold")
    for one in record.callback.history if record.callback else []:
        reason = "its worker was lost in mid-attempt" if one.outcome == "lost" else one.reason or "-"
        took = "-" if one.duration_ms is None else f"{one.duration_ms} ms"
        table.add_row(str(one.attempt), _when(one.at), one.outcome, str(one.status or "-"), took, reason)
    return table


def _when(ms: int | None) -> str:
    return "-" if ms is None else f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(ms: int | None) -> str:
    return "-" if ms is None else f"{_span(time.time() - ms / 1000)} ago"


def _in(ms: int | None) -> str:
    seconds = 0.0 if ms is None else ms / 1000 - time.time()
    return f"in {_span(seconds)}" if seconds >= 1 else "now"


def _span(seconds: float) -> str:
    """A length of time in the largest unit that it has two of."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
