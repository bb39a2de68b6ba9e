"""Kernels mean what their plain forms mean, and compile for TPUs that are not here."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import kernels, layers


@pytest.mark.parametrize(
    ('length', 'num_heads', 'head_dim'), [(5, 4, 64), (37, 2, 64), (21, 4, 32), (130, 2, 128)]
)
def test_frame_attention_equals_the_plain_form(length, num_heads, head_dim):
    """Any number of tokens, and one, two or four heads in a register."""
    rng = np.random.default_rng(0)
    width = num_heads * head_dim
    # Large logits: a softmax that was not shifted would overflow.
    z = jnp.asarray(rng.normal(size=(2, length, width)) * 6, jnp.bfloat16)
    kernel = jnp.asarray(
        rng.normal(size=(width, 3, num_heads, head_dim)) * width**-0.5, jnp.bfloat16
    )
    bias = jnp.asarray(rng.normal(size=(3, num_heads, head_dim)), jnp.bfloat16)
    qkv, q, k = kernels.grouped_projection(z, kernel, bias)
    ours = kernels.frame_attention(qkv, num_heads, head_dim, interpret=True)
    ours = np.asarray(ours, np.float32).reshape(q.shape)
    plain, plain_q, plain_k = kernels.self_attention(z, kernel, bias)  # not on TPU here
    for mine, theirs in ((q, plain_q), (k, plain_k)):  # products may be summed in another order
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=2**-7)
    # In float32, from the same rounded queries, keys and values.
    v = jnp.einsum('nlw,whd->nlhd', z, kernel[:, 2]) + bias[2]
    exact = np.asarray(layers.attend(*(x.astype(jnp.float32) for x in (q, k, v))))
    error, usual = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (ours, plain))
    assert error < 0.01 * np.abs(exact).max()
    assert error < 1.5 * usual


def test_what_the_kernel_takes():
    assert kernels.fits(12, 64, jnp.bfloat16)
    assert kernels.fits(16, 64, jnp.bfloat16) and kernels.fits(3, 128, jnp.bfloat16)
    assert not kernels.fits(12, 64, jnp.float32)
    assert not kernels.fits(11, 64, jnp.bfloat16)  # half a register would be left
    assert not kernels.fits(16, 88, jnp.bfloat16)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dist_jax.models import kernels, layers
from dist_jax.plan import topology
topology.prepare_environment()
from dist_jax.sharding import make_mesh, on_mesh

for name in sys.argv[1:]:
    mesh = make_mesh(topology.devices(topology.parse_topology(name)), fsdp=2, tensor=2)
    split = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    whole = NamedSharding(mesh, PartitionSpec())
    shape = lambda s, where: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where)
    inputs = (shape((8, 197, 256), split), shape((256, 3, 4, 64), whole), shape((3, 4, 64), whole))

    def loss(*inputs):
        return kernels.self_attention(*inputs)[0].astype(jnp.float32).sum()

    for function in (loss, jax.grad(loss)):
        text = jax.jit(on_mesh(mesh, function)).lower(*inputs).compile().as_text()
        print(name, 'tpu_custom_call' in text)
"""


@pytest.mark.slow
def test_kernels_compile_for_several_chips_and_their_gradient_does():
    environment = os.environ | {'XLA_FLAGS': ''}
    command = [sys.executable, '-c', COMPILE, 'v4:2x2x1', 'v5e:2x2']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split('\n')
    assert 'v4:2x2x1 True' in lines and 'v5e:2x2 True' in lines
