"""Redis: reached, the right one, and one that keeps what it is given."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from aistream.cli.checks import Clock, Finding, Patient, State
from aistream.config import Config
from aistream.connections import Connections, connect
from aistream.parse import RedisAddress

NAME = "redis"
#: The oldest that has NOMKSTREAM.
LEAST = (6, 2)
#: Seconds of a round trip from which on each init and each flush of the log is noticeably late.
SLOW = 0.005
FULL = 0.9
PINGS = 11


def check(patient: Patient) -> Iterator[Finding]:
    """Nothing but skipped where there is no Redis to ask."""
    config = patient.found.config
    address = config.redis_address
    if patient.faulty("REDIS_"):
        yield Finding(NAME, "skipped", "it is not known how to reach it", "mend REDIS_… above first")
        return
    if address is None:
        yield Finding(
            NAME, "skipped", "the embedded store is inside the service", "set REDIS_URL to keep sessions over a restart"
        )
        return
    if address.master:
        yield from _sentinels(config, address)
    connections = connect(config)
    try:
        try:
            connections.call("PING")  # connects: what that takes is no part of the question
            began = time.time()
            seconds, micros = connections.call("TIME")
            patient.clocks.append(Clock("Redis", int(seconds) + int(micros) / 1e6 - (began + time.time()) / 2))
        except Exception as error:  # redis-py's own, and what may lie below
            yield _unreached(error, address, config)
            return
        yield from _asked(connections, config, address)
    finally:
        connections.close()


def _asked(connections: Connections, config: Config, address: RedisAddress) -> Iterator[Finding]:
    times = []
    for _ in range(PINGS):
        began = time.monotonic()
        connections.call("PING")
        times.append(time.monotonic() - began)
    latency = statistics.median(times)
    try:
        text = connections.call("INFO").decode()
        said = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    except Exception:  # an ACL without INFO, or what may lie below redis-py: it is told as unknown, and the rest is asked
        said = {}
    version = said.get("redis_version", "")
    how = f"{'TLS, ' if address.tls else ''}{latency * 1000:.1f} ms for a round trip"
    yield Finding(NAME, "ok", f"Redis {version or '(it does not say which)'} answers at {_place(address)}: {how}")
    if latency > SLOW:
        yield Finding(
            f"{NAME} latency",
            "warning",
            f"a round trip takes {latency * 1000:.1f} ms: an init takes several",
            "put Redis into the same data centre as the service",
        )
    yield from _writable(connections, said)
    if not said:
        yield Finding(f"{NAME} memory", "skipped", "it does not say what kind of Redis it is", "give its user the right +info")
        return
    if version and tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < LEAST:
        yield Finding(f"{NAME} version", "problem", f"Redis {version} is too old", "use 6.2 or newer")
    yield _memory(said)
    yield _persistence(said)
    clients, most = int(said.get("connected_clients", 0)), int(said.get("maxclients", 0) or 0)
    wanted = config.web_concurrency * config.redis_pool_size
    if most and most < clients + wanted:
        yield Finding(
            f"{NAME} clients",
            "warning",
            f"maxclients is {most}, {clients} are connected, and this service may open {wanted} connections",
            "raise Redis's maxclients, or set a smaller REDIS_POOL_SIZE",
        )


def _writable(connections: Connections, said: dict[str, str]) -> Iterator[Finding]:
    """Whether it would take what the service writes: commands that find nothing to do are refused just as others."""
    if said.get("role") == "slave":
        yield Finding(
            f"{NAME} role", "problem", "it is a replica: it takes no writes", "set REDIS_URL to the master, or to the Sentinels"
        )
        return
    tried = connections.many(
        [
            # NOMKSTREAM on a stream that is not there: nothing is written. EVALSHA of no script: NOSCRIPT.
            ("XADD", "aistream:{0}:log:doctor", "NOMKSTREAM", "*", "text", "x"),
            ("EVALSHA", "0" * 40, 0),
        ]
    )
    words = [str(reply) if isinstance(reply, Exception) else "" for reply in tried]
    refused = next((word for word in words if word and "NOSCRIPT" not in word and "No matching script" not in word), "")
    if refused:
        mend = "give its user the rights of docs/operations.md" if _lacks_right(refused) else "look into Redis's log"
        if "maxmemory" in refused:
            mend = "raise Redis's maxmemory: it is full"
        yield Finding(f"{NAME} writes", "problem", f"it does not take what the service writes: {refused[:200]}", mend)
        return
    replicas = int(said.get("connected_slaves", 0))
    role = "a master" + (f" with {replicas} replica{'s' if replicas > 1 else ''}" if replicas else "")
    yield Finding(f"{NAME} role", "ok", f"{role if said else 'it'} takes writes and runs scripts")


def _lacks_right(words: str) -> bool:
    return "permission" in words.lower() or "NOPERM" in words


def _memory(said: dict[str, str]) -> Finding:
    policy, used, most = said.get("maxmemory_policy", ""), int(said.get("used_memory", 0)), int(said.get("maxmemory", 0))
    of = f"{used / 2**20:.0f} MiB used of {most / 2**20:.0f}" if most else f"{used / 2**20:.0f} MiB used, no maxmemory"
    if policy != "noeviction":
        mend = "set maxmemory-policy to noeviction: Redis may drop sessions when it is full"
        return Finding(f"{NAME} memory", "warning", f"maxmemory-policy is {policy}, {of}", mend)
    if most and used > FULL * most:
        mend = "raise maxmemory, or lower REPLAY_SECONDS and TOMBSTONE_SECONDS: a full Redis refuses every init"
        return Finding(f"{NAME} memory", "warning", f"nearly full: {of}", mend)
    return Finding(f"{NAME} memory", "ok", f"maxmemory-policy is noeviction, {of}")


def _persistence(said: dict[str, str]) -> Finding:
    name = f"{NAME} persistence"
    if said.get("aof_enabled") == "1":
        if said.get("aof_last_write_status", "ok") != "ok":
            return Finding(name, "problem", "the append-only file cannot be written", "look at Redis's disk")
        return Finding(name, "ok", "an append-only file: a restart loses a second at most")
    if said.get("rdb_last_bgsave_status", "ok") != "ok":
        return Finding(name, "problem", "the last snapshot could not be written", "look at Redis's disk")
    mend = "set appendonly to yes: a Redis that restarts without its data forgets what no worker knows"
    return Finding(name, "warning", "no append-only file", mend)


def _sentinels(config: Config, address: RedisAddress) -> Iterator[Finding]:
    told: dict[str, str] = {}
    for host, port in address.hosts:
        login = f"{quote(config.redis_sentinel_username, '')}:{quote(config.redis_sentinel_password, '')}@"
        login = login if config.redis_sentinel_password else ""
        place = f"[{host}]" if ":" in host else host
        url = f"redis{'s' if address.tls else ''}://{login}{place}:{port}"
        alone = dataclasses.replace(config, redis_url=url, redis_sentinel_username="", redis_sentinel_password="")  # nosec B106
        connections = connect(alone)
        try:
            reply: Any = connections.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master)
            told[f"{host}:{port}"] = f"{reply[0].decode()}:{reply[1].decode()}" if reply else f"knows no {address.master}"
        except Exception as error:  # as above; one that is away hides none of the others
            told[f"{host}:{port}"] = _words(error, f"{host}:{port}")[0]
        finally:
            connections.close()
    masters = {said for said in told.values() if said.rpartition(":")[2].isdigit() and " " not in said}
    good = sum(said in masters for said in told.values())
    others = "; ".join(f"{place}: {said}" for place, said in told.items() if said not in masters)
    name = f"{NAME} sentinels"
    if len(masters) > 1:
        yield Finding(
            name, "problem", f"they disagree about the master: {', '.join(sorted(masters))}", "look at the Sentinels' logs"
        )
    elif good == len(told):
        yield Finding(name, "ok", f"{good} of {good} call {masters.pop()} the master of {address.master}")
    else:
        state: State = "warning" if good else "problem"
        yield Finding(
            name, state, f"{good} of {len(told)} tell the master: {others}", "mend those: a vote needs a majority of them"
        )


def _unreached(error: Exception, address: RedisAddress, config: Config) -> Finding:
    found, mend = _words(error, _place(address))
    if not address.tls and found.endswith("closed the connection"):
        mend = "write rediss:// in REDIS_URL if that Redis speaks TLS"
    return Finding(NAME, "problem", found, mend)


#: What redis-py or Redis says, and what it means. The first that occurs counts.
_MEANS = (
    ("WRONGPASS|invalid username-password|invalid password", "does not accept the user or password", "correct them in REDIS_URL"),
    ("NOAUTH|Authentication required", "wants a password", "write it into REDIS_URL: redis://:password@host"),
    ("AUTH <password> called without any|no password is set", "has no password, and got one", "take it out of REDIS_URL"),
    ("certificate verify failed", "has a certificate that is not accepted: {detail}", "set REDIS_CA_FILE to its authority"),
    ("certificate.required|handshake failure", "wants a certificate", "set REDIS_CERT_FILE and REDIS_KEY_FILE"),
    ("wrong.version.number|record layer", "speaks no TLS", "write redis:// in REDIS_URL, or correct the port"),
    ("Connection refused", "refuses connections", "start Redis, or correct REDIS_URL"),
    (
        "not known|name resolution|No address associated",
        "has a name without an address",
        "correct REDIS_URL, or this machine's DNS",
    ),
    ("timed out|no answer in time|Timeout", "does not answer in time", "look at firewalls, and at whether Redis hangs"),
    ("LOADING", "still loads its data", "wait until it has"),
    ("no Sentinel says", "is known to no Sentinel that answers", "mend the Sentinels first"),
    ("the Sentinels' master is none", "is called the master and is none", "wait for the Sentinels, or look at their logs"),
    ("No such file", "is no socket", "start Redis, or correct REDIS_URL"),
    ("permission|NOPERM", "does not give this user its rights", "give it the rights of docs/operations.md"),
    ("no Redis answers|Protocol Error", "is no Redis", "correct REDIS_URL"),
    ("closed|reset|broken|EOF", "closed the connection", "look into Redis's log"),
)


def _words(error: BaseException, place: str) -> tuple[str, str]:
    """What happened and what mends it. Nothing of a URL is in it but host and port."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and len(chain) < 6:
        chain.append(one)
        one = one.__cause__ or one.__context__
    said = " / ".join(str(one) for one in chain)
    for words, means, mend in _MEANS:
        if re.search(words, said, re.IGNORECASE):
            detail = next((str(one.verify_message) for one in chain if hasattr(one, "verify_message")), "not trusted")
            return f"Redis at {place} {means.format(detail=detail)}", mend
    return f"Redis at {place} cannot be used: {type(error).__name__}", "look into Redis's log"


def _place(address: RedisAddress) -> str:
    if address.path:
        return address.path
    if address.master:
        return f"the Sentinels' {address.master}"
    return ":".join(map(str, address.hosts[0]))
