"""The services that aistream talks to, as tests need them: real sockets, real wire formats, failures on demand.

`provider` stands for OpenAI and Anthropic (its own process; what it does is chosen by the model's name), `receiver` for
the n8n that waits for a callback (in the test process). `scenarios` says what a model does, `wires` how the two
providers write that down, and `http1` has the bytes, chunk boundaries and endings of a connection in its hand.
Importing them starts nothing.
"""
