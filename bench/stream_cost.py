"""What one session costs the service in CPU: `python -m bench.stream_cost` (after `make setup`).

Starts the real service (gunicorn, one worker) on a real Redis, a provider that speaks OpenAI's wire, and a receiver of
callbacks; measures the CPU of the service's processes alone, user and system, over many sessions:

    init       POST /init-stream, nothing else
    session    init, a stream of 20 tokens at 50 tok/s watched by one viewer, the ending and its callback
    sdk        the same 20-token request by the bare SDK, iterated as its documentation says, in a gevent process of its own
    sdk raw    the same, but the raw bytes of its response read to the end: what the service does

What remains of a session beside the SDK's own request is the difference. CPU and not time: other load on the machine moves
it far less. Absolute figures are this machine's; compare figures of one run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent
import httpx
from gevent.pool import Pool

from tests.neighbours.provider import ProviderServer
from tests.neighbours.receiver import Receiver
from tests.service import ROOT, Service, n8n_token, watch

MODEL = "gpt-test-long-n20-d20"
CONCURRENCY = 20

_BARE_SDK = f"""
from gevent import monkey; monkey.patch_all()
import gc, sys, openai, gevent
from gevent.pool import Pool
url, count = sys.argv[1], int(sys.argv[2])
client = openai.OpenAI(api_key="x", base_url=url, max_retries=0)
asked = dict(model={MODEL!r}, stream=True, stream_options={{"include_usage": True}}, max_tokens=4096,
    messages=[{{"role": "user", "content": "Hello"}}])
def raw(_):
    with client.chat.completions.with_streaming_response.create(**asked) as response:
        for _chunk in response.iter_bytes():
            pass
def typed(_):
    for _chunk in client.chat.completions.create(**asked):
        pass
one = {{"raw": raw, "typed": typed}}[sys.argv[3]]
gc.collect()
Pool({CONCURRENCY}).map(one, range(40))
gc.collect()
gc.freeze()  # as the service does
sys.stdin.readline()
Pool({CONCURRENCY}).map(one, range(count))
print("done", flush=True)
sys.stdin.readline()
"""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children, in seconds."""
    ticks = 0
    for one in [pid, *_children(pid)]:
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def progress(text: str, done: int, of: int) -> None:
    """One line that rewrites itself on a terminal."""
    if sys.stderr.isatty():
        bar = "#" * (30 * done // of)
        print(f"\r{text:10} [{bar:30}] {done}/{of} ", end="" if done < of else "\n", file=sys.stderr, flush=True)


def measure(text: str, pid: int, count: int, call: Callable[[int], object]) -> float:
    """CPU of process `pid` for each of `count` calls, in ms."""
    pool = Pool(CONCURRENCY)
    before = cpu_seconds(pid)
    for done, _ in enumerate(pool.imap_unordered(call, range(count)), 1):
        progress(text, done, count)
    gevent.sleep(1.0)  # the callbacks that are still on their way
    return (cpu_seconds(pid) - before) / count * 1000


def main() -> None:
    """Measures and prints the table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    redis_program = shutil.which("redis-server") or sys.exit("redis-server is not installed: `make test` installs one")
    folder = Path(tempfile.mkdtemp())
    socket = folder / "redis.sock"
    redis = subprocess.Popen([redis_program, "--port", "0", "--unixsocket", str(socket), "--save", ""], stdout=subprocess.DEVNULL)
    with ProviderServer() as provider, Receiver() as n8n:
        environ = {**provider.environ, "REDIS_URL": f"unix://{socket}", "LOG_FORMAT": "json"}
        service = Service(folder / "log", environ)
        service.start()
        try:
            client = httpx.Client(verify=False, timeout=30)
            body = {"resumeUrl": n8n.url("/w"), "prompt": "Hello", "model": MODEL}

            def init(_: int) -> str:
                asked = {**body, "n8nToken": n8n_token()}
                answer = client.post(f"{service.url}/init-stream", json=asked)
                assert answer.status_code == 200, service.log[-3000:]
                return str(answer.json()["streamUrl"])

            def session(number: int) -> None:
                with watch(init(number)) as events:
                    assert list(events)[-1].data == "[DONE]"

            measure("warm-up", service.pid, 40, session)
            init_ms = measure("init", service.pid, count, init)
            gevent.sleep(0.5)
            n8n.reset()
            session_ms = measure("session", service.pid, count, session)
            callbacks = len(n8n.wait_for(count, timeout=20))
            typed_ms = _bare_sdk(provider.openai_url, count, "typed")
            raw_ms = _bare_sdk(provider.openai_url, count, "raw")
        finally:
            service.stop()
            redis.terminate()
            redis.wait()
            shutil.rmtree(folder)
    print(f"{count} sessions, {CONCURRENCY} at a time; {callbacks} callbacks. CPU in ms, one figure of one run")
    print(f"  init      {init_ms:6.2f}")
    print(f"  session   {session_ms:6.2f}")
    print(f"  sdk       {typed_ms:6.2f}   beside it, a session costs {session_ms - typed_ms:6.2f}")
    print(f"  sdk raw   {raw_ms:6.2f}   beside it, a session costs {session_ms - raw_ms:6.2f}")


def _bare_sdk(url: str, count: int, how: str) -> float:
    command = [sys.executable, "-c", _BARE_SDK, url, str(count), how]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        time.sleep(5)  # its own warm-up
        before = cpu_seconds(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        process.stdout.readline()
        spent = cpu_seconds(process.pid) - before
        process.stdin.write("end\n")
        process.stdin.flush()
    return spent / count * 1000


if __name__ == "__main__":
    main()
