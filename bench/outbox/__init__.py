"""What becomes of the callbacks: `python -m bench.outbox` (after `make test`, which installs a Redis).

Thousands of sessions end, in every way there is, over the real service (gunicorn, two workers) and a real Redis. Four in five
of them report to an n8n that fails by a script, the rest to one on another origin that is well. Meanwhile workers are killed,
and a few streams are watched.

    the failing n8n as a whole                               with one session in particular
    down      connections are refused                        early     409 "running already" at first
    starting  200 with a page, 404 with a page, or 503       cut       takes the callback, and resets the connection
    hang      takes requests and says nothing; a restart     error     takes the callback, and answers 500
              cuts them all                                  half      takes it, and breaks off in the middle of its 200
    errors    500, or 503                                    held      answers 200 after a while
    cut       resets connections, whether it took the        hung      says nothing to the first request
              callback or not                                refused   401, or 404 for a wrong method: for good
    busy      409 "running already", or 503 to all           hopeless  500 for ever

As a real one does, it says 409 "finished already" to whatever comes after a callback that it took.

Nothing the service says about itself is taken for proof: what must arrive is known before it is asked for, and what arrived,
when, over which connection, and what was answered to it, is the receivers' own record. Redis is asked at the end what is
owed, delivered and dead.

**What may come twice.** An answer is *final* where it was written whole to a sender that was still there a moment (0.5 ms)
before: a 2xx that is no page, 409 "finished already", 401, 404 for a wrong method. After a final answer nothing may come, with
one exception, and that is looked up, never guessed: the worker that sent the attempt was killed before its `settle` had
reached Redis. For each kill the worker is first stopped, for some milliseconds, so that neither it nor this process does
anything between the look and its death; the kernel then says which ports it has connections from; it is killed; when it is
gone, and Redis has taken what it had sent before (two round trips, 50 ms apart), Redis says what it holds as owed. A callback
after a final answer to attempt n is excused where one and the same kill shows all of this: n had come from a port of that
worker; the answer was written at most 2 s before the worker's death, which a settle never takes (the table says how long it
was); and Redis held the session as still owed, at attempt n. A dead worker can settle nothing any more, so it had to be sent
again. Everything else must be 0. Answers that are not final explain what follows them by themselves; they are counted by
kind, those that may have arrived (500, cut, half, hung, killed in mid-attempt) apart from clear refusals.

The same record is asked where an attempt's number is higher than the schedule is long: a worker was killed in the last one.

Exit code 1, every finding with the story of its session, and all artefacts kept, where a row that must be 0 is not.
"""

from gevent import monkey

if not monkey.is_module_patched("socket"):
    monkey.patch_all()
