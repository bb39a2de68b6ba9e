"""What is taken from the inside of jax, which no release promises to keep; nothing else imports it.

tests/test_jax_internals.py tells when jax has moved something.
"""

from __future__ import annotations

from jax._src import distributed


def distributed_state() -> distributed.State:
    """How jax knows this process among others; filled by `jax.distributed.initialize`.

    Used are `process_id`, `num_processes`, `coordinator_address` and `client`, the key-value store
    of the coordinator, which has no public name in jax 0.10.
    """
    return distributed.global_state
