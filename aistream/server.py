"""gunicorn's settings, from the service's own configuration.

gunicorn.conf.py in the checkout takes them from `settings()`; `aistream serve` gives gunicorn this file itself. Either is read
anew on SIGHUP, and the configuration with it.

What is imported here is in gunicorn's master, which forks the workers before gevent patches them: no ssl, no threading.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from aistream import kernel_limits, loglines, server_lines, shared_metrics
from aistream.config import DRAIN_MARGIN, Config
from aistream.environment import load
from aistream.errors import ConfigError

#: Connections that wait to be accepted.
BACKLOG = 4_096


def settings() -> dict[str, Any]:
    """Every setting that is not gunicorn's default, by gunicorn's names. With a bad configuration it exits, and says why."""
    try:
        service = load()
    except ConfigError as error:
        sys.exit(str(error))
    metrics_address = _address(service.metrics_host or service.host, service.metrics_port)
    # In the form of ours, and never at debug: then gunicorn quotes clients.
    server_lines.Logger.as_text = loglines.wants_text(service)
    # Heartbeat files on disk can block a worker for seconds.
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # nosec B108  # a name of its own
    return {
        "bind": [_address(service.host, service.port), *([metrics_address] if service.metrics_port else [])],
        "workers": service.web_concurrency,
        "worker_class": "aistream.worker.Worker",
        # Fewer where the limit of file descriptors carries fewer.
        "worker_connections": kernel_limits.CONNECTIONS,
        "backlog": BACKLOG,
        # A gevent worker's heartbeat only fails when its hub is blocked.
        "timeout": 60,
        "keepalive": 75,
        # Longer than the drain, which ends by itself: what gunicorn kills has said no last words.
        "graceful_timeout": int(service.drain_seconds) + DRAIN_MARGIN,
        # A bad cursor is no cursor, also one of 10 KB: at gunicorn's own limit of 8 KB the answer would end an EventSource.
        "limit_request_field_size": 16_384,
        "limit_request_fields": 64,
        # The service writes its own lines, without query strings: those hold access tokens.
        "accesslog": None,
        "logger_class": server_lines.Logger,
        "loglevel": "info" if service.log_level == "debug" else service.log_level,
        "worker_tmp_dir": in_memory,
        "control_socket_disable": True,
        **_hooks(service, metrics_address),
    }


def _address(host: str, port: int) -> str:
    """As gunicorn wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hooks(service: Config, metrics_address: str) -> dict[str, Any]:
    def on_starting(server: Any) -> None:
        """Refuses what the configuration could not see, given on gunicorn's command line; makes room for the workers' metrics."""
        if server.cfg.is_ssl:
            sys.exit("aistream cannot start with gunicorn's certfile: it speaks plain HTTP, and TLS ends at the proxy before it")
        if service.embedded_store and server.cfg.workers > 1:
            sys.exit(
                f"aistream cannot start {server.cfg.workers} workers without REDIS_URL: they cannot share the embedded store"
            )
        shared_metrics.make()

    def on_exit(server: Any) -> None:
        """Removes what `on_starting` made."""
        shared_metrics.remove()

    def when_ready(server: Any) -> None:
        """Says where it is and what it runs on."""
        store = "embedded store (forgotten at exit; set REDIS_URL to keep sessions)" if service.embedded_store else "Redis"
        where = service.base_url if service.dev_mode else f"{service.host}:{service.port}, for browsers {service.base_url}"
        metrics = f", metrics on {metrics_address}" if service.metrics_port else ""
        ready = f"aistream is ready: {where}{'/' if service.dev_mode else ''}{metrics}   [{store}]"
        if server_lines.Logger.as_text:
            print(ready, file=sys.stderr, flush=True)
        else:
            server.log.info(ready)

    def post_worker_init(worker: Any) -> None:
        """Starts the worker's loops, after fork and patch."""
        worker.begin()

    def child_exit(server: Any, worker: Any) -> None:
        """In the master: a dead worker's gauges are gone, its counts stay."""
        shared_metrics.bury(worker.pid)

    def worker_exit(server: Any, worker: Any) -> None:
        """However it leaves (SIGINT, SIGQUIT, a parent that is gone), what it has begun is waited for."""
        if getattr(worker, "wsgi", None) is not None:
            worker.background.drain()

    hooks = (on_starting, on_exit, when_ready, post_worker_init, child_exit, worker_exit)
    return {hook.__name__: hook for hook in hooks}


if __name__ == "__config__":  # how gunicorn names a file of settings
    globals().update(settings())
