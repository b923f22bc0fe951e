"""External engines: vLLM, SGLang or our own server as the sampler of a run.

`wire.py` says what is asked and read, `client.py` speaks with one engine, `fleet.py` with several,
`weights.py` publishes, `owned.py` starts a command and ends it, `external.py` is the `Sampler`,
`remembered.py` a journal in front of any. What speaks with engines needs no jax: import it by its
module.
"""
