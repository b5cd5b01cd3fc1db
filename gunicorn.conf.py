"""gunicorn's settings, read by `gunicorn wsgi:app` in this folder by itself: those of `aistream/server.py`."""

from aistream.server import settings

globals().update(settings())
