"""When Python looks for garbage: seldom among what is old, since a hub that looks through everything does nothing else meanwhile.

Nearly all that a session leaves behind is freed as it is let go. What refers to itself is found while it is young; the rest waits
for a look through all that is there, which with thousands of open streams lasts for most of a second: at times of Python's own
choosing, every token would wait for it.
"""

from __future__ import annotations

import gc
import time

import gevent

#: Objects that are new since the last look at the young ones; such looks between two at those that outlived one.
YOUNG, MIDDLE = 2_000, 10
#: Share of the time that a look through everything may take, and seconds between two at least.
SHARE = 0.005
REST = 10.0


def settle() -> None:
    """Takes what is loaded by now out of sight: the modules are half a million objects that never become garbage.

    Python looks through everything no more by itself: `run` does.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, 1_000_000)


def run() -> None:
    """The loop that looks through everything from time to time; never returns."""
    # Not at the top: the master imports this module before it has made the folder that prometheus_client looks for.
    from aistream.metrics import garbage_collected

    lasted = 0.0
    while True:
        gevent.sleep(max(REST, lasted / SHARE))
        began = time.monotonic()
        gc.collect()
        lasted = time.monotonic() - began
        garbage_collected(lasted)
