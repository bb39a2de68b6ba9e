"""The kernels of one query that reads a clip mean what the plain form does."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import clip_reading, evl
from dist_jax.models.stack import Slot


def case(clip, length, channels, heads, dtype, rows):
    """Arguments of `read_clip` for two clips, and what comes back to its result."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    def rounded(*shape, scale=1.0):
        return normal(*shape, scale=scale).astype(jnp.bfloat16).astype(dtype)

    slot = Slot(rounded(2, 2 * clip, length, channels), jnp.asarray(1))
    shape = rows, (length - 1) // max(rows, 1), channels
    moved = normal(2 * clip, *shape, scale=0.5) if rows else None
    vectors = normal(3, channels), normal(clip, channels, scale=0.3)
    norm = {'scale': 1 + normal(channels, scale=0.2), 'bias': normal(channels, scale=0.2)}
    # Sharp enough that few tokens share most of the weight.
    query = rounded(2, heads, channels, scale=2 * channels**-0.5)
    return (slot, moved, *vectors, norm, query), rounded(2, heads, channels)


def both_ways(forward, backward, rows, inputs, upstream):
    """What the two kernels give, sums over clips taken."""
    slot, _, taps, shift, norm, query = inputs
    mixed, tokens, sums = forward(*inputs)
    means = jnp.einsum('bhc,bhc->bh', *(x.astype(jnp.float32) for x in (upstream, mixed)))
    means = jnp.broadcast_to(means[..., None], sums.shape)
    to_tokens, to_query, summed, to_shift, to_moved = backward(
        slot, taps, shift, norm, query, upstream, tokens, sums, means, rows
    )
    return {
        'mixed': mixed.astype(query.dtype),
        'tokens': tokens,
        'to_tokens': to_tokens,
        'to_query': to_query,
        'to_norm': summed.sum(0)[:2],
        'to_taps': summed.sum(0)[2:5],
        'to_shift': to_shift.sum(0),
    } | ({'to_moved': to_moved} if rows else {})


@pytest.mark.parametrize(
    ('clip', 'length', 'channels', 'heads', 'rows'),
    [(3, 21, 256, 4, 5), (1, 10, 128, 12, 3), (2, 17, 128, 3, 0)],
)
def test_the_kernels_equal_the_plain_form(clip, length, channels, heads, rows):
    """At most a tenth further from float32 than bfloat16 in plain JAX, forward and backward."""
    sizes = clip, length, channels, heads
    here = functools.partial(functools.partial, interpret=True)
    found = both_ways(
        here(clip_reading._run_forward),
        here(clip_reading._run_backward),
        rows,
        *case(*sizes, jnp.bfloat16, rows),
    )
    usual, exact = (
        jax.jit(
            functools.partial(
                both_ways, clip_reading._plain_forward, clip_reading._plain_backward, rows
            )
        )(*case(*sizes, dtype, rows))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    for name, mine in found.items():
        mine, theirs, true = (np.asarray(x, np.float32) for x in (mine, usual[name], exact[name]))
        assert np.abs(mine - true).mean() < 1.1 * np.abs(theirs - true).mean() + 1e-6, name
        assert np.abs(mine - true).max() < 0.05 * np.abs(true).max(), name


def test_gradients_are_those_of_the_tokens_written_out():
    """In float32, of all that may be trained, the tower too."""
    inputs, upstream = case(3, 10, 128, 2, jnp.float32, 3)

    def written_out(slot, moved, taps, shift, norm, query):
        frozen = slot.stack[1].reshape(2, 3, 10, 128)
        center = taps - jnp.asarray([[0.0], [1.0], [0.0]])
        moved = moved.reshape(2, 3, 3, 3, 128)
        terms = evl.Terms({'kernel': center, 'bias': jnp.zeros(128)}, shift, moved)
        return evl.read_memory(query, evl.memory_of(frozen, terms, norm))[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, *floats):
        def run(stack, *rest):
            return function(Slot(stack, inputs[0].index), *rest)

        out, pull = jax.vjp(run, *floats)
        return out, pull(upstream)

    floats = inputs[0].stack, *inputs[1:]
    found, expected = (gradients(f, *floats) for f in (clip_reading.read_clip, written_out))
    for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_which_clips_the_kernels_read():
    def takes(length, channels, dtype=jnp.bfloat16):
        stack = jax.ShapeDtypeStruct((4, 16, length, channels), dtype)
        return clip_reading.fits(stack, 8)

    assert takes(197, 768) and takes(257, 1024)  # B/16, L/14
    assert not takes(577, 1024)  # L/14 at 336 pixels
    assert not takes(197, 768, jnp.float32) and not takes(17, 64)


COMPILE = """
import jax, jax.numpy as jnp
from dist_jax.plan import topology
topology.prepare_environment()
from jax.sharding import NamedSharding, PartitionSpec
from dist_jax.models import clip_reading, evl
from dist_jax.models.stack import Slot
from dist_jax.sharding import make_mesh, on_mesh

devices = topology.devices(topology.parse_topology('v4:2x2x1'))
mesh = make_mesh(devices, fsdp=2)

def array(*shape, axes=(), dtype=jnp.float32):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

batch = ('data', 'fsdp')
stack = array(2, 24, 17, 128, axes=(None, batch), dtype=jnp.bfloat16)
keys = array(24, 17, 2, 64, axes=(batch,), dtype=jnp.bfloat16)
query = array(8, 2, 128, axes=(batch,), dtype=jnp.bfloat16)
vectors = array(3, 128), array(3, 128), {'scale': array(128), 'bias': array(128)}

def loss(stack, keys, query, tables, taps, shift, norm):
    maps = evl.neighbour_attention(keys, keys, 3)
    moved = evl.relative_sum(maps, tables, (4, 4)).reshape(24, 4, 4, 128)
    slot = Slot(jax.lax.stop_gradient(stack), jnp.asarray(1))
    return clip_reading.read_clip(slot, moved, taps, shift, norm, query).astype(jnp.float32).sum()

inputs = stack, keys, query, array(2, 49, 128), *vectors
text = jax.jit(on_mesh(mesh, jax.grad(loss, (2, 3, 4, 5, 6)))).lower(*inputs).compile(
    compiler_options={'exec_time_optimization_effort': -1.0}
).as_text()
print([name for name in ('mean_attention', 'read_clip', 'read_clip_gradient')
       if f'/{name}/' in text])
"""


@pytest.mark.slow
def test_clips_are_read_by_kernels_on_several_chips():
    environment = os.environ | {'XLA_FLAGS': ''}
    command = [sys.executable, '-c', COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["['mean_attention', 'read_clip', 'read_clip_gradient']"]
