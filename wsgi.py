"""The WSGI entry point: `gunicorn wsgi:app` in production, `flask run` for debugging."""

from gevent import monkey

monkey.patch_all()

import sys

from aistream.app import create_app
from aistream.environment import load
from aistream.errors import ConfigError

try:
    app = create_app(load())
except ConfigError as error:
    sys.exit(str(error))
