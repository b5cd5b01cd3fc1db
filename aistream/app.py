"""The composition root: the only place that knows all parts. Creating an app starts nothing and connects to nothing."""

from __future__ import annotations

import time

from flask import Flask

from aistream import api, limits, telemetry
from aistream.api import Parts, client, demo, health, init, openapi, operator, stream
from aistream.background import Background
from aistream.config import Config
from aistream.delivery import SENDERS, Delivery
from aistream.destination import Destinations
from aistream.estimate import Estimator
from aistream.follower import Follower
from aistream.generation import Generations
from aistream.meter import Meter
from aistream.outbound import Outbound
from aistream.providers import Providers
from aistream.pulse import Pulse
from aistream.recall import Recall
from aistream.store import Store
from aistream.tokens import Tokens
from aistream.viewing import Viewing
from aistream.writer import LogWriter


def create_app(config: Config, *, store: Store | None = None) -> Flask:
    """The service as a Flask app. `store`: one to use in place of the configured one (tests share an embedded store so)."""
    telemetry.configure(config)
    store = store or Store(config)
    providers = Providers(config)
    pulse = Pulse(hole=config.lease_seconds / 2)
    writer = LogWriter(store, pulse)
    recall = Recall(config, store)
    destinations = Destinations(config)
    delivery = Delivery(config, store.outbox, destinations, Outbound(destinations, pool_size=SENDERS), recall)
    estimator = Estimator(config.token_encoding)
    generations = Generations(config, store, providers, writer, recall, pulse, estimator, on_ended=delivery.wake)
    follower = Follower(store, config)
    viewing = Viewing(config, generations, follower)
    meter = Meter(config, store, providers, writer, follower, generations, viewing, delivery)
    background = Background(config, store, providers, writer, follower, recall, pulse, generations, viewing, delivery, meter)

    app = Flask("aistream", static_folder=None)
    app.extensions["aistream"] = Parts(
        config, store, providers, Tokens(config, time.time), destinations, generations, viewing, delivery, background
    )
    api.init_app(app, config)
    limits.init_app(app, config)
    for bp in (init.bp, stream.bp, client.bp, health.bp, operator.bp):
        app.register_blueprint(bp)
    if config.dev_mode:
        app.register_blueprint(demo.bp)
        app.register_blueprint(openapi.bp)
    return app
