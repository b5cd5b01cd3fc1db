"""Log lines by name: one per finished thing, with ids, durations and counts.

Never a prompt, an answer, a token or the query of a resumeUrl. JSON on standard output unless that is a terminal.
"""

from __future__ import annotations

import logging
from typing import Any, TextIO, cast

import structlog

from aistream import loglines
from aistream.config import Config

log: Any = structlog.get_logger("aistream")


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
    for name in loglines.TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def own_process(config: Config, hub: Any) -> None:
    """For whoever owns the process, once: whatever else is said in it takes the form of our lines. `hub`: gevent's."""
    loglines.take_over(log, hub, as_text=loglines.wants_text(config))
    werkzeug = logging.getLogger("werkzeug")
    werkzeug.addFilter(_quotes_nobody)
    werkzeug.propagate = False  # `flask run` keeps its own form: a person reads it


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
