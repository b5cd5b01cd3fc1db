"""gunicorn's settings, from the service's own configuration. Read by `gunicorn wsgi:app` in this folder by itself."""

import os
import sys

from aistream import kernel_limits, loglines, server_lines, shared_metrics
from aistream.config import DRAIN_MARGIN
from aistream.environment import load
from aistream.errors import ConfigError

try:
    service = load()
except ConfigError as error:
    sys.exit(str(error))


def address(host, port):
    """As gunicorn wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


metrics_address = address(service.metrics_host or service.host, service.metrics_port)
bind = [address(service.host, service.port), *([metrics_address] if service.metrics_port else [])]
workers = service.web_concurrency
worker_class = "aistream.worker.Worker"
# Fewer where the limit of file descriptors carries fewer.
worker_connections = kernel_limits.CONNECTIONS
backlog = 4_096
# A gevent worker's heartbeat only fails when its hub is blocked.
timeout = 60
keepalive = 75
# Longer than the drain, which ends by itself: what gunicorn kills has said no last words.
graceful_timeout = int(service.drain_seconds) + DRAIN_MARGIN
# A bad cursor is no cursor, also one of 10 KB: at gunicorn's own limit of 8 KB the answer is one that ends an EventSource.
limit_request_field_size = 16_384
limit_request_fields = 64
# The service writes its own lines, without query strings: those hold access tokens.
accesslog = None
# In the form of ours, and never at debug: then gunicorn quotes clients.
server_lines.Logger.as_text = loglines.wants_text(service)
logger_class = server_lines.Logger
loglevel = "info" if service.log_level == "debug" else service.log_level
# Heartbeat files on disk can block a worker for seconds.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # nosec B108  # a name of its own
control_socket_disable = True


def on_starting(server):
    """Refuses what the configuration could not see, given on gunicorn's command line; makes room for the workers' metrics."""
    if server.cfg.is_ssl:
        sys.exit("aistream cannot start with gunicorn's certfile: it speaks plain HTTP, and TLS ends at the proxy before it")
    if service.embedded_store and server.cfg.workers > 1:
        sys.exit(f"aistream cannot start {server.cfg.workers} workers without REDIS_URL: they cannot share the embedded store")
    shared_metrics.make()


def on_exit(server):
    """Removes what `on_starting` made."""
    shared_metrics.remove()


def when_ready(server):
    """Says where it is and what it runs on."""
    store = "embedded store (forgotten at exit; set REDIS_URL to keep sessions)" if service.embedded_store else "Redis"
    where = service.base_url if service.dev_mode else f"{service.host}:{service.port}, for browsers {service.base_url}"
    metrics = f", metrics on {metrics_address}" if service.metrics_port else ""
    ready = f"aistream is ready: {where}{'/' if service.dev_mode else ''}{metrics}   [{store}]"
    if server_lines.Logger.as_text:
        print(ready, file=sys.stderr, flush=True)
    else:
        server.log.info(ready)


def post_worker_init(worker):
    """Starts the worker's loops, after fork and patch."""
    worker.begin()


def child_exit(server, worker):
    """In the master: a dead worker's gauges are gone, its counts stay."""
    shared_metrics.bury(worker.pid)


def worker_exit(server, worker):
    """However it leaves (SIGINT, SIGQUIT, a parent that is gone), what it has begun is waited for."""
    if getattr(worker, "wsgi", None) is not None:
        worker.background.drain()
