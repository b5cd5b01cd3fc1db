"""gunicorn's settings with a look inside: on SIGUSR2 a worker writes down what it holds. For `bench.leaks` alone.

GUNICORN_CMD_ARGS="--config bench/insight.py" INSIGHT=/folder gunicorn wsgi:app
"""

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import gevent
from greenlet import greenlet

_settings = Path("gunicorn.conf.py").read_text()
exec(_settings)  # nosec B102  # the service's own, all of them

_post_worker_init = globals()["post_worker_init"]


def post_worker_init(worker: Any) -> None:
    """As the service does; then listens for the signal."""
    _post_worker_init(worker)
    gevent.signal_handler(signal.SIGUSR2, _write, worker)


def _write(worker: Any) -> None:
    gc.collect()
    parts = worker.wsgi.extensions["aistream"]
    held = {
        "greenlets": sum(isinstance(one, greenlet) and not one.dead for one in gc.get_objects()),
        "generations": len(parts.generations.running),
        "viewers": len(parts.viewing),
        "objects": len(gc.get_objects()),
        "rss_kib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024,
    }
    target = Path(os.environ["INSIGHT"]) / f"{os.getpid()}.json"
    target.with_suffix(".new").write_text(json.dumps(held))
    target.with_suffix(".new").rename(target)
