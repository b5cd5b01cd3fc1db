"""How long inits are refused while Sentinels replace a master that was killed: `python -m bench.failover`. Prints a table.

Real processes: a master with a replica, three Sentinels, one worker of the service. An init is tried every 50 ms.
"""

from gevent import monkey

monkey.patch_all()

import sys
import tempfile
import time
from pathlib import Path

from tests.neighbours.redis import RedisServer, Sentinels
from tests.service import Service

#: Milliseconds of silence until a Sentinel takes the master for gone: Redis's default, and shorter ones.
DOWN_AFTER_MS = (30_000, 5_000, 1_000)


def refused_for(folder: Path, down_after_ms: int) -> float:
    """Seconds from the master's death to the first init that was accepted."""
    with RedisServer(folder / "master") as master, RedisServer(folder / "replica") as replica:
        replica.follow(master)
        with Sentinels(folder / "sentinels", master, down_after_ms=down_after_ms) as sentinels:
            service = Service(folder / "log", sentinels.environ)
            service.start()
            try:
                assert service.init().status_code == 200, service.log
                master.kill()
                began = time.monotonic()
                while service.init().status_code != 200:
                    assert time.monotonic() - began < 120, service.log
                    time.sleep(0.05)
                return time.monotonic() - began
            finally:
                service.kill()


def main() -> None:
    """Prints the table; the settings to try may be given."""
    tried = [int(word) for word in sys.argv[1:]] or DOWN_AFTER_MS
    print("| `down-after-milliseconds` | inits refused for |\n|---:|---:|")
    for down_after_ms in tried:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {down_after_ms} | {refused_for(Path(folder), down_after_ms):.1f} s |", flush=True)


if __name__ == "__main__":
    main()
