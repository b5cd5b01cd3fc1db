"""Puts a measured load on a real service: a paced provider, viewers that check every token, and the CPU of what is between.

    provider    a process: writes answers at a given pace in OpenAI's wire format, and takes the callbacks
    viewers     a process: asks for streams, watches them, checks every token, and knows how late each was
    processes   what the kernel says of a process: CPU, memory, descriptors
    rig         starts all of it, each on its core, and measures

Both load processes are plain non-blocking sockets on one epoll each, since they share a core: what they cost per token bounds
what can be measured. A token's text is `<stamp>.<number> `: the time at which it was written to the socket, and its place in
the answer.
"""

#: A stamp counts 10 µs of the monotonic clock, which all processes of a machine share, and starts again after 100 s.
STAMP_NS = 10_000
STAMPS = 10**7
