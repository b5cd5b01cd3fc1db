"""gunicorn's own lines, in the form of ours and without what a client sent.

gunicorn quotes the URL of a request that broke: it holds an access token. (One that cannot be read is answered, and told, by
`worker`.) It says nothing below `info`, where it would quote more: LOG_LEVEL=debug is for our own lines.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gunicorn import glogging  # type: ignore[import-untyped]

from aistream.loglines import Foreign

#: How the message begins that quotes a client.
_BROKEN = "Error handling request"


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """What `server` names as `logger_class`."""

    #: Whether lines are for a person. Set before gunicorn makes its logger.
    as_text: ClassVar[bool] = False

    def setup(self, cfg: Any) -> None:
        """gunicorn's hook, at the start and after SIGHUP: as its own, with another handler."""
        super().setup(cfg)
        self.error_log.handlers = [Foreign(as_text=self.as_text, trusted=True)]

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """An error with its traceback, which is told without values; without the URL too."""
        if isinstance(msg, str) and msg.startswith(_BROKEN):
            msg, args = _BROKEN, ()
        elif isinstance(msg, BaseException):
            msg, args = type(msg).__name__, ()
        super().exception(msg, *args, **kwargs)
