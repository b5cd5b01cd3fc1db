"""The service as a WSGI app: what `gunicorn aistream.wsgi:app` serves, wherever the package is.

Importing it patches the process and builds the app: it is an entry point, and no other module imports it.
"""

from gevent import monkey

monkey.patch_all()

import sys

import gevent

from aistream import kernel_limits, telemetry
from aistream.app import create_app
from aistream.environment import load
from aistream.errors import ConfigError

# Who has spawned a greenlet is for a debugger: noting it costs ten objects for each.
gevent.config.track_greenlet_tree = False

try:
    config = load()
    # For `flask run`; gunicorn's worker does it once more, with the number of connections that gunicorn was given.
    kernel_limits.raise_descriptors(kernel_limits.demand(config).wanted)
    app = create_app(config)
    telemetry.own_process(config, gevent.get_hub())
except ConfigError as error:
    sys.exit(str(error))
