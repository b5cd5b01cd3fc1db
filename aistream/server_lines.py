"""gunicorn's own lines, in the form of ours and without what a client sent.

gunicorn quotes a request that it cannot read, and the URL of one that broke: both hold access tokens. It says nothing below
`info`, where it would quote more: LOG_LEVEL=debug is for our own lines.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from gunicorn import glogging  # type: ignore[import-untyped]

from aistream.loglines import Foreign

#: How the messages begin that quote a client.
_INVALID = "Invalid request from ip="
_BROKEN = "Error handling request"


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """What gunicorn.conf.py names as `logger_class`."""

    #: Whether lines are for a person. Set before gunicorn makes its logger.
    as_text: ClassVar[bool] = False

    def setup(self, cfg: Any) -> None:
        """gunicorn's hook, at the start and after SIGHUP: as its own, with another handler."""
        super().setup(cfg)
        self.error_log.handlers = [Foreign(as_text=self.as_text, trusted=True)]

    def warning(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A warning; of a request that could not be read, what is wrong with it, by the name that gunicorn has for that."""
        if isinstance(msg, str) and msg.startswith(_INVALID):
            refused = sys.exc_info()[0]
            msg, args = f"Invalid request: {refused.__name__ if refused else 'unreadable'}", ()
        super().warning(msg, *args, **kwargs)

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """An error with its traceback, which is told without values; without the URL too."""
        if isinstance(msg, str) and msg.startswith(_BROKEN):
            msg, args = _BROKEN, ()
        elif isinstance(msg, BaseException):
            msg, args = type(msg).__name__, ()
        super().exception(msg, *args, **kwargs)
