# Read by `flask run` alone, for debugging; production is gunicorn. The environment and .env win over this file.

# A random secret, the embedded store and the echo provider: starts with no configuration.
DEV_MODE=true

# The same address as `make run`, so that the page and a printed curl command fit both.
FLASK_RUN_HOST=127.0.0.1
FLASK_RUN_PORT=8000
