"""The header Retry-After, as providers and receivers of callbacks send it. Pure."""

from __future__ import annotations

from email.utils import parsedate_to_datetime


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait: a number, or a date (RFC 9110 10.2.3). None for what is neither. `now`: seconds since 1970."""
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])  # some say "never" with a number that no float holds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None
