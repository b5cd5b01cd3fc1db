# syntax=docker/dockerfile:1
# The service's image. Built and run in docs/operations.md, "Deploy". Which files go into it: .dockerignore.
#
# Python 3.11 on Debian 12 is what the tests run on, here and in CI. The tag is exact and not a digest: none could be looked up where this
# was written. `docker buildx imagetools inspect python:3.11.14-slim-bookworm` shows the digest to append.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS packages
COPY requirements.txt /
# Wheels alone: no package's own code runs in the build, and no compiler is needed. pip leaves bytecode behind.
RUN python -m venv --without-pip /venv && \
    python -m pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check --no-input \
    --require-hashes --only-binary :all: --requirement /requirements.txt
COPY aistream /app/aistream/
COPY wsgi.py gunicorn.conf.py generate_token.py /app/
# The service can write no bytecode: its files are root's. Checked by content, since a copy has another time than its source.
RUN python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${PYTHON}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="aistream" \
    org.opencontainers.image.description="Streams AI answers from an n8n workflow to a browser, and reports the whole answer back" \
    org.opencontainers.image.version="${VERSION}"
COPY --from=packages /venv /venv
COPY --from=packages /app /app
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0
WORKDIR /app
# A number, so that Kubernetes' runAsNonRoot can see that it is not root. Nothing of the image belongs to it.
USER 10001:10001
EXPOSE 8000
# Alive, not ready: who is told that it is unhealthy may kill it, and a worker that drains or waits for Redis must live.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; line = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); line.request('GET', '/health'); sys.exit(line.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
CMD ["gunicorn", "wsgi:app"]
