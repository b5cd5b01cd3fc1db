"""The WSGI entry point: `gunicorn wsgi:app` in production, `flask run` for debugging."""

from aistream.wsgi import app

__all__ = ["app"]
