"""Log lines and metrics by name: one line per finished thing, with ids, durations and counts.

Never a prompt, an answer, a token or the query of a resumeUrl. JSON on standard output unless that is a terminal.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from aistream import loglines
from aistream.config import Config
from aistream.events import Usage
from aistream.session import Counts

log: Any = structlog.get_logger("aistream")

#: The metrics of this process, or, where gunicorn.conf.py has set PROMETHEUS_MULTIPROC_DIR, its share of all workers'.
_REGISTRY = CollectorRegistry()
_ATTEMPTS = Counter(
    "aistream_callback_attempts",
    "Attempts to deliver a callback, by what came of them: delivered, retry, dead.",
    ["outcome"],
    registry=_REGISTRY,
)
# There from the start, at 0. This also opens the file of all counters of this worker, for which there may be no descriptor later.
for _outcome in ("delivered", "retry", "dead"):
    _ATTEMPTS.labels(_outcome)
_ATTEMPT = Histogram(
    "aistream_callback_attempt_seconds",
    "Time that one attempt took.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=_REGISTRY,
)
_DELIVERY = Histogram(
    "aistream_callback_delivery_seconds",
    "Time from a session's ending to the delivery of its callback.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 1_800, 7_200, 36_000),
    registry=_REGISTRY,
)

_SESSIONS = Counter(
    "aistream_sessions_ended",
    "Sessions by how they ended: state, and finish reason or code of the failure.",
    ["state", "reason", "provider"],
    registry=_REGISTRY,
)
_TOKENS = Counter(
    "aistream_tokens",
    "Tokens of ended sessions: input, output; and who said so: provider, partial, estimated.",
    ["provider", "kind", "source"],
    registry=_REGISTRY,
)
_REQUESTS = Counter(
    "aistream_provider_attempts",
    "Attempts to get an answer from a provider, by what came of them: answered, stopped, or the code of the failure.",
    ["provider", "outcome"],
    registry=_REGISTRY,
)
_RETRIES = Counter(
    "aistream_provider_retries", "Attempts that were made again with the same model.", ["provider"], registry=_REGISTRY
)
_FALLBACKS = Counter(
    "aistream_provider_fallbacks",
    "Answers for which this provider was given up for another model.",
    ["provider"],
    registry=_REGISTRY,
)
_ADAPTATIONS = Counter(
    "aistream_provider_adaptations",
    "Requests that were made once more without a parameter that the model does not take.",
    ["provider", "parameter"],
    registry=_REGISTRY,
)
_QUEUE = Histogram(
    "aistream_provider_queue_seconds",
    "Time that an answer waited for a place with its provider, of those that had to.",
    ["provider"],
    buckets=(0.001, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    registry=_REGISTRY,
)
_FIRST_TOKEN = Histogram(
    "aistream_provider_first_token_seconds",
    "Time from an attempt's beginning to its first token.",
    ["provider"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    registry=_REGISTRY,
)

_LIMITED = Counter(
    "aistream_limited",
    "What a limit has refused, by its name; `store`: inits that nothing could count, since Redis was away.",
    ["limit"],
    registry=_REGISTRY,
)

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(config: Config) -> None:
    """Sets up this process's log lines. May be called again, with another configuration."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            loglines.without_values,
            loglines.harmless,
            structlog.dev.ConsoleRenderer()
            if loglines.wants_text(config)
            else structlog.processors.JSONRenderer(serializer=loglines.to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.log_level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, loglines.Stdout())),
        cache_logger_on_first_use=False,
    )
    # The HTTP client's own line holds whole URLs.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def own_process(config: Config, hub: Any) -> None:
    """For whoever owns the process, once: whatever else is said in it takes the form of our lines. `hub`: gevent's."""
    loglines.take_over(log, hub, as_text=loglines.wants_text(config))
    werkzeug = logging.getLogger("werkzeug")
    werkzeug.addFilter(_quotes_nobody)
    werkzeug.propagate = False  # `flask run` keeps its own form: a person reads it


def callback_attempted(outcome: str, seconds: float, age: float) -> None:
    """Counts an attempt. `outcome`: delivered, retry or dead; `age`: seconds since the session ended."""
    _ATTEMPTS.labels(outcome).inc()
    _ATTEMPT.observe(seconds)
    if outcome == "delivered":
        _DELIVERY.observe(age)


def session_ended(state: str, reason: str, provider: str, usage: Usage) -> None:
    """Counts an ending and its tokens."""
    _SESSIONS.labels(state, reason if reason in _REASONS or state != "completed" else "other", provider).inc()
    _TOKENS.labels(provider, "input", usage.source).inc(usage.input_tokens)
    _TOKENS.labels(provider, "output", usage.source).inc(usage.output_tokens)


#: Finish reasons that are a label of their own; a compatible server may make up any.
_REASONS = frozenset({"stop", "length", "content_filter", "refusal", "tool_calls", "pause_turn"})


def provider_asked(provider: str, outcome: str) -> None:
    """Counts an attempt that is over. `outcome`: answered, stopped or the code of the failure."""
    _REQUESTS.labels(provider, outcome).inc()


def provider_retried(provider: str) -> None:
    """Counts a model that is asked again."""
    _RETRIES.labels(provider).inc()


def provider_fell_back(provider: str) -> None:
    """Counts an answer that goes on to its next model. `provider`: the one that is given up."""
    _FALLBACKS.labels(provider).inc()


def provider_adapted(provider: str, model: str, parameters: Sequence[str]) -> None:
    """Counts a request that is made once more without these, and says so: it happens about once an hour for a model."""
    for parameter in parameters:
        _ADAPTATIONS.labels(provider, parameter).inc()
    log.info("provider.adapted", provider=provider, model=model, parameters=parameters)


def provider_queued(provider: str, seconds: float) -> None:
    """Notes how long a place with the provider was waited for, where there was none at once."""
    _QUEUE.labels(provider).observe(seconds)


def provider_began(provider: str, seconds: float) -> None:
    """Notes how long an attempt took to its first token."""
    _FIRST_TOKEN.labels(provider).observe(seconds)


def limited(limit: str) -> None:
    """Counts what a limit has refused."""
    _LIMITED.labels(limit).inc()


class _Standing(Collector):
    """What the store says at this moment: the same from every worker."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield GaugeMetricFamily("aistream_callbacks_owed", "Callbacks that are still to be delivered.", counts.owed)
        yield GaugeMetricFamily(
            "aistream_callbacks_oldest_owed_seconds",
            "How long the oldest owed callback has been owed; 0 without any.",
            counts.oldest_owed,
        )
        yield GaugeMetricFamily("aistream_callbacks_dead", "Dead letters that are kept.", counts.dead)


def exposition(counts: Counts) -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, with its content type."""
    shown = CollectorRegistry()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
    else:
        shown.register(_REGISTRY)
    shown.register(_Standing(counts))
    return generate_latest(shown), CONTENT_TYPE_LATEST


def _quotes_nobody(record: logging.LogRecord) -> bool:
    """What `flask run`'s server may print: of a request nothing, which has a line of ours; of a fault no more than its kind."""
    message = str(record.msg)
    if '"%s" %s %s' in message:
        return False
    if "Error on request" in message:
        record.msg, record.args = "Error on request", ()  # its traceback ends with the exception's message
    elif "code %d, message" in message and isinstance(record.args, tuple):
        # "Bad request syntax ('GET /…?access_token=…')"
        record.args = tuple(arg.partition("(")[0].rstrip() if isinstance(arg, str) else arg for arg in record.args)
    return True
