"""`gunicorn tests.neighbours.broken_app:app`: the service, with routes that break it."""

from wsgi import app as service  # noqa: I001  # first of all: it patches

from tests.neighbours.broken import breaking

app = breaking(service)
