"""What is taken from the inside of jax is there. Runs of several processes show that it works."""

import importlib

import jax
import pytest


def test_jax_knows_its_process_where_we_look():
    try:
        state = importlib.import_module('dist_jax.jax_internals').distributed_state()
        for name in ('process_id', 'num_processes', 'coordinator_address', 'client'):
            getattr(state, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f'jax {jax.__version__} has moved what dist_jax/jax_internals.py takes from its inside '
            f'({error}): find where it is now, and change `distributed_state` there'
        )
