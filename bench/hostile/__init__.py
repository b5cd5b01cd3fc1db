"""What becomes of honest streams while the service is attacked: `python -m bench.hostile` (after `make test`, for a Redis).

    attacks     each attack as data: what its connections say, how slowly, how many of them
    attacker    a process that carries one out: all its connections on one epoll
    run         the service under honest load, before, during each attack, and after
    report      the table

The service is the real one, with one worker and with two, over a real Redis. Honest streams and inits come at a steady pace in
each phase, with every token checked (`bench.load`), and /health/ready is asked ten times a second on connections of its own.
The attacker takes what is left of the load's core, so that it does not slow down those who measure. A worker takes 2,000
connections here, which the largest attacks exceed, and clients have 5 s where they have 15 and 30 by default.

Exit code 1 where an honest stream, its callback or a readiness check failed, or where connections of attackers are left.
"""
