"""The variables of docker-compose.yml that are no settings of the service, for the manual. Pure.

They stand in the same `.env`, under a heading of their own; the service itself reads none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from aistream import __version__


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of docker-compose.yml; without a default it must be set there."""

    name: str
    default: str
    doc: str


#: The address of whatever browsers come to.
EVERYWHERE = "0.0.0.0"  # nosec B104

VARIABLES = (
    Variable(
        "AISTREAM_TAG",
        __version__,
        "The tag of aistream's image: what is built gets it, what is started has it. Back to another: docs/operations.md.",
    ),
    Variable(
        "BIND_ADDRESS",
        "127.0.0.1",
        "The host's address that aistream's, the balancer's and n8n's ports are published on. 127.0.0.1: nobody outside the host "
        "sees them.",
    ),
    Variable("AISTREAM_PORT", "8000", "aistream's port on the host. BASE_URL must lead to it, or to a proxy before it."),
    Variable("AISTREAM_MEMORY", "2g", "Memory of each instance of aistream, all its workers together."),
    Variable("REDIS_PASSWORD", "", "Redis's password. It stands in a URL: letters and digits alone. Required."),
    Variable(
        "REDIS_MAXMEMORY",
        "1gb",
        "When Redis holds so much it takes nothing more, and init answers 503, until sessions have run out. The host needs twice "
        "that.",
    ),
    Variable(
        "POSTGRES_PASSWORD",
        "",
        "The password of PostgreSQL's superuser, for backups; counts when the database is made. Required.",
    ),
    Variable("N8N_DB_PASSWORD", "", "The password of n8n's role in PostgreSQL; counts when the database is made. Required."),
    Variable("DB_POSTGRESDB_POOL_SIZE", "10", "n8n's connections to PostgreSQL, which takes 100 in all."),
    Variable(
        "N8N_ENCRYPTION_KEY",
        "",
        "Encrypts the credentials in n8n's database. Keep a copy elsewhere: without it they are lost. Required.",
    ),
    Variable(
        "N8N_URL",
        "http://localhost:5678",
        "Where browsers reach n8n, without a path and without a / at its end: https://n8n.example.com.",
    ),
    Variable("N8N_PORT", "5678", "n8n's port on the host."),
    Variable("N8N_PROXY_HOPS", "0", "Proxies before n8n that say whom they speak for (X-Forwarded-For)."),
    Variable("N8N_SECURE_COOKIE", "true", "false: n8n can be logged into by plain HTTP under another name than localhost."),
    Variable("N8N_MEMORY", "2g", "n8n's memory."),
    Variable("REPLICAS", "2", "Profile scale: instances of aistream beside the first one, 9 at most. Set TRUSTED_PROXIES=1."),
    Variable("BALANCER_PORT", "8080", "Profile scale: the balancer's port on the host. BASE_URL must lead to it."),
    Variable(
        "TLS_BIND_ADDRESS",
        EVERYWHERE,
        "Profile tls: the host's address that nginx's ports are published on. Set TRUSTED_PROXIES=1.",
    ),
    Variable("HTTPS_PORT", "443", "Profile tls: nginx's port for HTTPS on the host."),
    Variable("HTTP_PORT", "80", "Profile tls: the port that leads to HTTPS."),
    Variable("PROMETHEUS_PORT", "9090", "Profile observability: Prometheus's port on 127.0.0.1. It asks for no password."),
    Variable("GRAFANA_PORT", "3001", "Profile observability: Grafana's port on 127.0.0.1."),
    Variable(
        "GRAFANA_PASSWORD",
        "",
        "The password of Grafana's user admin; counts at its first start. Required, with or without Grafana.",
    ),
)
