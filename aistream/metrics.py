"""Metrics by name, for Prometheus: of this process, or of all workers of a gunicorn.

There are three kinds. What happens seldom (an ending, an attempt, a request) is counted when it happens, by a function of its
own here. What happens for each token or round trip is counted in plain numbers by whoever does it, and what only stands
(viewers, places, a backlog) is not counted at all: `meter` reads both once a second and notes them here. What the store knows is
asked of it by the scrape.

Names are those of OpenTelemetry's semantic conventions where it has some, in Prometheus' spelling: `gen_ai_client_*` is what we
see of a provider, `gen_ai_server_*` what our viewers see of us, retries, fallbacks and queues included. A label has a bounded
number of values: a model's name is one only once a provider has answered to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from aistream import __version__, shared_metrics
from aistream.events import Usage
from aistream.session import Counts
from aistream.tally import Tally

#: Buckets in seconds, OpenTelemetry's: for a request to a model, prolonged to what MAX_STREAM_SECONDS allows by default; for the
#: first token, prolonged for models that think; for each further one; for HTTP.
_ANSWER = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 120, 300)
_EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
#: The same for tokens of an answer, by powers of four.
_TOKENS_EACH = tuple(4**power for power in range(14))
#: For round trips to Redis, for how late a viewer's token may be, and for how late the hub is.
REDIS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
LAG = (0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
HUB = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
#: Models that are a label of their own, on each worker. Their names come from callers.
MODELS = 20
#: What the label of any other is.
OTHER = "other"

#: The metrics of this process, or, where gunicorn's master has set PROMETHEUS_MULTIPROC_DIR, its share of all workers'.
_REGISTRY = CollectorRegistry()


class _Histogram(Histogram):
    """Takes whole tallies."""

    def add(self, tally: Tally) -> None:
        """Adds what was tallied since the last call, whose bounds are this histogram's."""
        counts, total = tally.take()
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        if total:
            self._sum.inc(total)


def _counter(name: str, says: str, *labels: str) -> Counter:
    return Counter(name, says, labels, registry=_REGISTRY)


def _histogram(name: str, says: str, *labels: str, buckets: Sequence[float]) -> _Histogram:
    return _Histogram(name, says, labels, buckets=buckets, registry=_REGISTRY)


def _sum(name: str, says: str, *labels: str) -> Gauge:
    """What stands on all living workers together."""
    return Gauge(name, says, labels, multiprocess_mode="livesum", registry=_REGISTRY)


def _worst(name: str, says: str, *labels: str) -> Gauge:
    """What stands on the living worker where it is largest."""
    return Gauge(name, says, labels, multiprocess_mode="livemax", registry=_REGISTRY)


def _each(name: str, says: str) -> Gauge:
    """What stands on each living worker, with its pid."""
    return Gauge(name, says, multiprocess_mode="liveall", registry=_REGISTRY)


_OF_MODEL = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
#: The one operation that we ask of models.
_OPERATION = "chat"

# ---- Sessions ----

_ACCEPTED = _counter("aistream_sessions_accepted", "Sessions that an init has begun here.")
_ENDED = _counter(
    "aistream_sessions_ended",
    "Sessions by how they ended: state, and finish reason or code of the failure.",
    *("state", "reason", "provider"),
)
_RECOVERED = _counter("aistream_sessions_recovered", "Sessions taken over from a worker that was lost.")
_TOKENS = _counter(
    "aistream_tokens",
    "Tokens of ended sessions: input, output; and who said so: provider, partial, estimated.",
    *("provider", "kind", "source"),
)
_DURATION = _histogram(
    "gen_ai_server_request_duration_seconds", "Time from a generation's beginning to its ending.", *_OF_MODEL, "error_type",
    buckets=_ANSWER,
)  # fmt: skip
_FIRST_TOKEN = _histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Time from a generation's beginning to its first token, with queues, retries and fallbacks.",
    *_OF_MODEL,
    buckets=_FIRST,
)
_EACH_TOKEN = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time between the tokens of a completed answer, after its first.",
    *_OF_MODEL,
    buckets=_EACH,
)
_LONGEST_GAP = _histogram(
    "aistream_session_longest_gap_seconds",
    "Longest silence of the provider within an answer, to the second.",
    "provider",
    buckets=(0.1, 1, 2, 5, 10, 20, 30, 60, 300),
)

# ---- Providers ----

_REQUESTS = _counter(
    "aistream_provider_attempts",
    "Attempts to get an answer from a provider, by what came of them: answered, stopped, or the code of the failure.",
    *("provider", "outcome"),
)
_RETRIES = _counter("aistream_provider_retries", "Attempts that were made again with the same model.", "provider")
_FALLBACKS = _counter(
    "aistream_provider_fallbacks", "Answers for which this provider was given up for another model.", "provider"
)
_ADAPTATIONS = _counter(
    "aistream_provider_adaptations",
    "Requests that were made once more without a parameter that the model does not take.",
    *("provider", "parameter"),
)
_QUEUED = _histogram(
    "aistream_provider_queue_seconds",
    "Time that an answer waited for a place with its provider, of those that had to.",
    "provider",
    buckets=(0.001, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_OPERATIONS = _histogram(
    "gen_ai_client_operation_duration_seconds",
    "Time that an attempt with a provider took, to its end.",
    *(*_OF_MODEL, "error_type"),
    buckets=_ANSWER,
)
_FIRST_CHUNK = _histogram(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    "Time from an attempt's beginning to its first token.",
    *_OF_MODEL,
    buckets=_ANSWER,
)
_USAGE = _histogram("gen_ai_client_token_usage", "Tokens of one answer.", *_OF_MODEL, "gen_ai_token_type", buckets=_TOKENS_EACH)
PROVIDER_RUNNING = _sum("aistream_provider_running", "Answers that have a place with this provider now.", "provider")
PROVIDER_WAITING = _sum("aistream_provider_waiting", "Answers that wait for a place with this provider now.", "provider")

# ---- Callbacks ----

_ATTEMPTS = _counter(
    "aistream_callback_attempts", "Attempts to deliver a callback, by what came of them: delivered, retry, dead.", "outcome"
)
_ATTEMPT = _histogram(
    "aistream_callback_attempt_seconds",
    "Time that one attempt took.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
_DELIVERY = _histogram(
    "aistream_callback_delivery_seconds",
    "Time from a session's ending to the delivery of its callback.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 1_800, 7_200, 36_000),
)
CALLBACKS_SENDING = _sum("aistream_callbacks_sending", "Attempts that are being made now.")

# ---- Viewers ----

_JOINED = _counter(
    "aistream_viewers_joined",
    "Viewers that got a stream: whether they came with a cursor, and from where they are served: memory, follower, replay.",
    *("resumed", "source"),
)
_LEFT = _counter("aistream_viewers_left", "Viewers by why they left: complete, gone, slow, refused, drained.", "why")
_VIEWERS_REFUSED = _counter(
    "aistream_viewers_refused", "Viewers with a valid token that got no stream, or no more of it.", "code"
)
VIEWERS = _sum("aistream_viewers", "Viewers that are connected now.")

# ---- The log and the store ----

LOG_FLUSH = _histogram("aistream_log_flush_seconds", "Time from a window's first event to its being stored.", buckets=LAG)
LOG_EVENTS = _counter("aistream_log_events", "Events that the log writer stored.")
LOG_BACKLOG = _sum("aistream_log_backlog_events", "Events that viewers here may have seen and the store has not.")
LOG_BEHIND = _worst("aistream_log_behind_seconds", "How long the oldest of these has been waiting; 0 without any.")
FOLLOWER_LAG = _histogram(
    "aistream_follower_lag_seconds", "Time between two reads of the logs of other workers' sessions.", buckets=LAG
)
FOLLOWED = _sum("aistream_followed_logs", "Sessions of other workers that are watched here now.")
REDIS_SECONDS = _histogram(
    "aistream_redis_seconds", "Time of a round trip to Redis, with the wait for a connection.", "kind", buckets=REDIS
)
_REDIS_ERRORS = _counter(
    "aistream_redis_errors",
    "Round trips to Redis that failed: connection, timeout, or refused (OOM, READONLY, LOADING …).",
    "reason",
)
_STORE_AWAY = _worst("aistream_store_away", "1 while a worker cannot reach Redis.")
_OUTAGES = _counter("aistream_store_outages", "Times that a worker found Redis to be away.")
_OUTAGE_SECONDS = _counter("aistream_store_away_seconds", "Time that it was, counted when it is back.")

# ---- Requests ----

_HTTP_REQUESTS = _histogram(
    "http_server_request_duration_seconds",
    "Time to the head of the answer: of a stream, not how long it lasts.",
    *("http_request_method", "http_route", "http_response_status_code"),
    buckets=_HTTP,
)
_LIMITED = _counter(
    "aistream_limited",
    "What a limit has refused, by its name; `store`: inits that nothing could count, since Redis was away.",
    "limit",
)
_PROBLEMS = _counter("aistream_problems", "Answers that are no success, by their code.", "code")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})

# ---- Workers ----

_STARTED = _counter("aistream_workers_started", "Workers that were started; what goes beyond WEB_CONCURRENCY replaced others.")
WORKERS = _sum("aistream_workers", "Workers that are alive.")
RUNNING = _sum("aistream_sessions_running", "Generations that run now.")
_DRAINING = _worst("aistream_drain_started_timestamp_seconds", "When the drain of a worker began; 0 while none drains.")
_DRAINED = _counter("aistream_drains", "Workers that have drained.")
_CUT = _counter("aistream_drain_cut_sessions", "Generations that were cut since DRAIN_SECONDS were over.")
_GIVEN_UP = _counter("aistream_drain_callbacks_given_up", "Attempts that were broken off since DRAIN_SECONDS were over.")
HUB_LAG = _histogram("aistream_hub_lag_seconds", "How late a timer of a quarter of a second fires.", buckets=HUB)
_GARBAGE = _histogram(
    "aistream_garbage_collection_seconds",
    "Time that a look through all objects took.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
CONNECTIONS = _each("aistream_connections", "Connections of clients that a worker has now.")
CONNECTIONS_LIMIT = _each("aistream_connections_limit", "Most that it takes.")
MEMORY = _each("process_resident_memory_bytes", "Resident memory.")
DESCRIPTORS = _each("process_open_fds", "Open file descriptors.")
DESCRIPTORS_LIMIT = _each("process_max_fds", "Most that there may be.")
START_TIME = _each("process_start_time_seconds", "When the process was started, in seconds since 1970.")
CPU = _counter("process_cpu_seconds", "CPU time of all workers, user and system.")

# There from the start, at 0: what first appears as a 1 has no increase that Prometheus could see. This also opens the file of all
# counters of this worker, for which there may be no descriptor later.
for _outcome in ("delivered", "retry", "dead"):
    _ATTEMPTS.labels(_outcome)
for _why in ("complete", "gone", "slow", "refused", "drained"):
    _LEFT.labels(_why)
for _source in ("memory", "follower", "replay"):
    for _resumed in ("true", "false"):
        _JOINED.labels(_resumed, _source)
for _reason in ("connection", "timeout", "refused"):
    _REDIS_ERRORS.labels(_reason)

#: Models that are a label of their own.
_models: set[str] = set()
#: Finish reasons that are; a compatible server may make up any.
_REASONS = frozenset({"stop", "length", "content_filter", "refusal", "tool_calls", "pause_turn"})


def worker_started(providers: Iterable[str], models: Iterable[str]) -> None:
    """Counts this worker. `providers`, `models`: those that the configuration names."""
    _models.update(list(models)[:MODELS])
    for provider in providers:
        _RETRIES.labels(provider)
        _FALLBACKS.labels(provider)
    _STARTED.inc()
    WORKERS.set(1)


def session_accepted() -> None:
    """Counts a session that an init has begun."""
    _ACCEPTED.inc()


def session_recovered() -> None:
    """Counts a session that was taken over from a lost worker."""
    _RECOVERED.inc()


def session_ended(state: str, reason: str, provider: str, usage: Usage) -> None:
    """Counts an ending and its tokens."""
    _ENDED.labels(state, reason if reason in _REASONS or state != "completed" else OTHER, provider).inc()
    _TOKENS.labels(provider, "input", usage.source).inc(usage.input_tokens)
    _TOKENS.labels(provider, "output", usage.source).inc(usage.output_tokens)


def generation_ended(
    provider: str, model: str, error: str, usage: Usage, seconds: float, first_token: float | None, gap: float
) -> None:
    """Notes what a generation took. `error`: why it was not completed, or `""`; `first_token`: seconds to it, if it came.

    `seconds`: to the last word. `gap`: the longest silence since its first token.
    """
    labels = _OPERATION, provider, _label(model)
    _DURATION.labels(*labels, error).observe(seconds)
    for kind, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
        if tokens:
            _USAGE.labels(*labels, kind).observe(tokens)
    if first_token is not None:
        _FIRST_TOKEN.labels(*labels).observe(first_token)
        _LONGEST_GAP.labels(provider).observe(gap)
        if not error and usage.output_tokens > 1:
            _EACH_TOKEN.labels(*labels).observe((seconds - first_token) / (usage.output_tokens - 1))


def provider_asked(provider: str, model: str, outcome: str, seconds: float) -> None:
    """Counts an attempt that is over. `outcome`: answered, stopped or the code of the failure."""
    _REQUESTS.labels(provider, outcome).inc()
    _OPERATIONS.labels(_OPERATION, provider, _label(model), "" if outcome == "answered" else outcome).observe(seconds)


def provider_retried(provider: str) -> None:
    """Counts a model that is asked again."""
    _RETRIES.labels(provider).inc()


def provider_fell_back(provider: str) -> None:
    """Counts an answer that goes on to its next model. `provider`: the one that is given up."""
    _FALLBACKS.labels(provider).inc()


def provider_adapted(provider: str, parameters: Sequence[str]) -> None:
    """Counts a request that is made once more without these parameters."""
    for parameter in parameters:
        _ADAPTATIONS.labels(provider, parameter).inc()


def provider_queued(provider: str, seconds: float) -> None:
    """Notes how long a place with the provider was waited for, where there was none at once."""
    _QUEUED.labels(provider).observe(seconds)


def provider_began(provider: str, model: str, seconds: float) -> None:
    """Notes how long an attempt took to its first token: so there is such a model."""
    if len(_models) < MODELS:
        _models.add(model)
    _FIRST_CHUNK.labels(_OPERATION, provider, _label(model)).observe(seconds)


def callback_attempted(outcome: str, seconds: float, age: float) -> None:
    """Counts an attempt. `outcome`: delivered, retry or dead; `age`: seconds since the session ended."""
    _ATTEMPTS.labels(outcome).inc()
    _ATTEMPT.observe(seconds)
    if outcome == "delivered":
        _DELIVERY.observe(age)


def viewer_joined(*, resumed: bool, source: str) -> None:
    """Counts a viewer that gets a stream. `resumed`: it came with a cursor; `source`: memory, follower or replay."""
    _JOINED.labels("true" if resumed else "false", source).inc()


def viewer_left(why: str) -> None:
    """Counts a viewer that had a stream. `why`: complete, gone, slow, refused or drained."""
    _LEFT.labels(why).inc()


def viewer_refused(code: str) -> None:
    """Counts a viewer that is told why there is nothing, or nothing more, for it."""
    _VIEWERS_REFUSED.labels(code).inc()


def store_failed(reason: str) -> None:
    """Counts a round trip that found the store to be away. `reason`: connection, timeout or refused."""
    _REDIS_ERRORS.labels(reason).inc()


def store_away() -> None:
    """The store is away, as this worker sees it."""
    _OUTAGES.inc()
    _STORE_AWAY.set(1)


def store_back(seconds: float) -> None:
    """It is back, after so long."""
    _OUTAGE_SECONDS.inc(seconds)
    _STORE_AWAY.set(0)


def drain_began(at: float) -> None:
    """This worker drains since then, in seconds since 1970."""
    _DRAINING.set(at)


def drain_ended(cut: int, given_up: int) -> None:
    """It has drained: so many generations were cut, and so many attempts of callbacks broken off."""
    _DRAINED.inc()
    _CUT.inc(cut)
    _GIVEN_UP.inc(given_up)


def garbage_collected(seconds: float) -> None:
    """Notes a look through all objects."""
    _GARBAGE.observe(seconds)


def request_answered(method: str, route: str, status: int, seconds: float) -> None:
    """Notes an answer's head. `route`: as it is written in the code, `""` where there is none such."""
    _HTTP_REQUESTS.labels(method if method in _METHODS else "_OTHER", route, str(status)).observe(seconds)


def limited(limit: str) -> None:
    """Counts what a limit has refused."""
    _LIMITED.labels(limit).inc()


def problem_told(code: str) -> None:
    """Counts an answer that is no success."""
    _PROBLEMS.labels(code).inc()


def _label(model: str) -> str:
    return model if model in _models else OTHER


class _Standing(Collector):
    """What the store says at this moment, and what the configuration does: the same from every worker."""

    def __init__(self, counts: Counts | None, facts: Mapping[str, float]) -> None:
        self._counts = counts
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("aistream_build_info", "1, of this version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        config = GaugeMetricFamily("aistream_config", "Settings that alerts and panels compare with.", labels=["setting"])
        for name, value in self._facts.items():
            config.add_metric([name], value)
        yield config
        counts = self._counts
        yield _gauge(
            "aistream_store_up", "1 where the store answered this scrape; 0: what it knows is missing.", counts is not None
        )
        if counts is None:
            return
        yield _gauge("aistream_callbacks_owed", "Callbacks that are still to be delivered.", counts.owed)
        yield _gauge(
            "aistream_callbacks_oldest_owed_seconds",
            "How long the oldest owed callback has been owed; 0 without any.",
            counts.oldest_owed,
        )
        yield _gauge("aistream_callbacks_dead", "Dead letters that are kept.", counts.dead)
        yield _gauge("aistream_sessions_open", "Sessions that are pending or running, on all replicas.", counts.open)


def _gauge(name: str, says: str, value: float) -> Any:
    return GaugeMetricFamily(name, says, value)


def exposition(counts: Counts | None, facts: Mapping[str, float]) -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, with its content type. `counts` None: the store is away.

    `facts`: numbers of the configuration by their setting.
    """
    shown = CollectorRegistry()
    shown.register(_Standing(counts, facts))
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        shown.register(_REGISTRY)
        return generate_latest(shown), CONTENT_TYPE_LATEST
    MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
    with shared_metrics.undisturbed():
        return generate_latest(shown), CONTENT_TYPE_LATEST
