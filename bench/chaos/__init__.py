"""What survives: `python -m bench.chaos` (after `make test`, which installs a Redis).

Many streams with known texts run over the real service (gunicorn, two workers, a short lease) and a real Redis with an
append-only file, while a repeatable schedule of faults hits both:

    kill      SIGKILL to a worker                          restart   Redis killed, away for a while, back with its data
    stop      SIGSTOP to a worker for longer than its      empty     Redis killed, back with nothing
              lease, then SIGCONT                          double    Redis emptied within a second of a kill or a stop
    drain     SIGHUP: all workers replaced                 drop      a viewer's socket reset; it comes back with its last id

Nothing the service says about itself is taken for proof. What an answer must be is known before it is asked for; what the
provider was asked, when, and over which connection, is the provider's own record; what n8n was told is the receiver's;
what a viewer saw is what an EventSource of our own decoded. At the end the three are compared with each other and with
the times of the faults. Each row that says "must be 0" is one way in which they could disagree.

What cannot be saved is a session that nobody knew when Redis lost its data: the worker that had accepted it (pending), or
run it, was gone, or was killed or stopped in that same moment. Which worker that was is looked up in the kernel's tables
of connections, not asked of the service. Such sessions have rows of their own, with the reason.

Exit code 1, every finding with the story of its session, and all artefacts kept, where a row that must be 0 is not.
"""

from gevent import monkey

if not monkey.is_module_patched("socket"):
    monkey.patch_all()
