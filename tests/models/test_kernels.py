"""Kernels mean what their plain forms mean, and compile for TPUs that are not here."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import eva, kernels, layers, transformer
from dist_jax.models.stack import Reading, Slot


@pytest.mark.parametrize(
    ('length', 'num_heads', 'head_dim'),
    [(5, 4, 64), (21, 4, 32), (130, 2, 128), (50, 3, 64), (17, 2, 112)],
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

    @jax.jit
    def kernel_of(z, kernel, bias):
        qkv = kernels.grouped_projection(z, kernel, bias)
        out = kernels.frame_attention(qkv, num_heads, head_dim, interpret=True)
        return *kernels.heads_of(qkv, num_heads, head_dim, arrays=3), *kernels.heads_of(
            out, num_heads, head_dim
        )

    q, k, _, ours = kernel_of(z, kernel, bias)
    plain, plain_q, plain_k = jax.jit(kernels.self_attention)(z, kernel, bias)  # not on TPU here
    for mine, theirs in ((q, plain_q), (k, plain_k)):  # products may be summed in another order
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=2**-7)
    # In float32, from the same rounded queries, keys and values.
    v = jnp.einsum('nlw,whd->nlhd', z, kernel[:, 2]) + bias[2]
    exact = np.asarray(layers.attend(*(x.astype(jnp.float32) for x in (q, k, v))))
    error, usual = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (ours, plain))
    assert error < 0.01 * np.abs(exact).max()
    assert error < 1.5 * usual


def test_heads_that_do_not_fit_together_are_worked_on_in_parts(monkeypatch):
    """Eight heads in one step of the kernel, and in four."""
    qkv = jnp.asarray(np.random.default_rng(3).normal(size=(2, 21, 3 * 512)) * 3, jnp.bfloat16)
    whole = kernels.frame_attention(qkv, 8, 64, interpret=True)
    monkeypatch.setattr(kernels, 'VMEM_BYTES', 80_000)
    assert kernels.heads_tile(21, 8, 64) == 128
    parts = kernels.frame_attention(qkv, 8, 64, interpret=True)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(parts))


def trained(seed, length, num_heads, head_dim, width=64):
    """A frame of two, weights and bias of a trained block; large logits."""
    rng = np.random.default_rng(seed)
    shape = (width, 3, num_heads, head_dim)
    z = jnp.asarray(rng.normal(size=(2, length, width)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=shape) * 2 * width**-0.5, jnp.bfloat16)
    return z, kernel, jnp.asarray(rng.normal(size=shape[1:]), jnp.bfloat16)


@pytest.mark.parametrize(
    ('length', 'queries', 'num_heads', 'head_dim'),
    [(17, 16, 2, 112), (50, 50, 3, 48), (257, 256, 5, 64)],
)
def test_the_gradient_of_attention_equals_that_of_the_plain_form(
    length, queries, num_heads, head_dim
):
    """No further from float32, of the same rounded numbers, than bfloat16 in plain JAX."""
    sizes = num_heads, head_dim
    rng = np.random.default_rng(1)
    qkv = jnp.asarray(3 * rng.normal(size=(2, length, 3, *sizes)), jnp.bfloat16)
    upstream = jnp.asarray(rng.normal(size=(2, queries, 1, *sizes)), jnp.bfloat16)

    @jax.jit
    def kernel(qkv, upstream):
        grouped = kernels.grouped(qkv)
        out = kernels.frame_attention(grouped, *sizes, queries, interpret=True)
        found = kernels.frame_attention_gradient(
            grouped, kernels.grouped(upstream), *sizes, interpret=True
        )
        return out, *found

    @jax.jit
    def plain(qkv, upstream):
        def attention(q, k, v):
            return layers.attend(q[:, :queries], k, v)

        out, gradient = jax.vjp(attention, *jnp.moveaxis(qkv, 2, 0))
        return out[:, :, None], jnp.stack(gradient(upstream[:, :, 0]), axis=2)

    out, gradient, sums = kernel(qkv, upstream)
    whole = np.asarray(gradient, np.float32).sum(1, keepdims=True)
    np.testing.assert_allclose(sums, whole, atol=0.01 * np.abs(whole).max())
    wide = (x.astype(jnp.float32) for x in (qkv, upstream))
    for mine, usual, exact in zip((out, gradient), plain(qkv, upstream), plain(*wide)):
        # In groups, where a head is missing too: there is nothing.
        mine, usual, exact = (
            np.asarray(x, np.float32)
            for x in (mine, kernels.grouped(usual), kernels.grouped(exact))
        )
        assert np.abs(mine - exact).max() < min(
            0.02 * np.abs(exact).max(), 1.5 * np.abs(usual - exact).max()
        )
        assert np.abs(mine - exact).mean() < 1.1 * np.abs(usual - exact).mean()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_trained_attention_is_the_plain_form_where_no_tpu_is(dtype):
    """Values and gradients; in bfloat16 through the groups that a kernel would take."""
    z, kernel, bias = trained(3, 10, 3, 64)
    out = {'kernel': jnp.moveaxis(kernel[:, 0], 0, -1), 'bias': bias[0, 0]}
    attn = {'qkv': {'kernel': kernel, 'bias': bias}, 'out': out}
    z, attn = z.astype(dtype), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), attn)

    def plain(z, attn):
        attn = jax.tree.map(lambda leaf: leaf.astype(dtype), attn)
        q, k, v = (
            jnp.einsum('nlw,wchd->cnlhd', z, attn['qkv']['kernel'])
            + (attn['qkv']['bias'][:, None, None])
        )
        heads = layers.attend(q[:, :9], k, v)
        return jnp.einsum('nlhd,hdw->nlw', heads, attn['out']['kernel']) + attn['out']['bias']

    def ours(z, attn):
        return kernels.trained_attention(z, attn, queries=9)

    traced = str(jax.make_jaxpr(jax.grad(lambda *i: ours(*i).sum()))(z, attn))
    assert ('frame_attention_gradient' in traced) is (dtype == jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, upstream):
        out, pull = jax.vjp(function, z, attn)
        return out, pull(out if upstream is None else upstream)

    found = both(ours, None)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    leaves = jax.tree.leaves((found, both(plain, found[0])))
    for mine, theirs in zip(leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


def test_queries_and_keys_are_rotated_before_they_meet():
    """In the plain form and in the one that a TPU takes, as far as it runs here."""
    z, kernel, bias = trained(4, 10, 3, 64)

    def rotate(x):
        return jnp.concatenate([x[:, :1], -x[:, 1:, :, ::-1]], axis=1)

    out, q, k = kernels.self_attention(z, kernel, bias, rotate=rotate)
    heads, plain_q, plain_k = kernels.self_attention(z, kernel, bias)
    for mine, theirs in ((q, rotate(plain_q)), (k, rotate(plain_k))):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    assert np.abs(np.asarray(out - heads, np.float32)).max() > 0.1
    with pytest.MonkeyPatch.context() as patch:
        here = functools.partial(kernels.frame_attention, interpret=True)
        patch.setattr(kernels, 'frame_attention', here)
        fast, *_ = kernels._fast_heads(z, kernel, bias, rotate=rotate)
    np.testing.assert_allclose(
        np.asarray(fast, np.float32), np.asarray(out, np.float32), rtol=2**-6, atol=2**-6
    )


def block_params(rng, width, num_heads, head_dim, hidden):
    def matrix(*shape, fan_in):
        return jnp.asarray(rng.normal(size=shape) * fan_in**-0.5, jnp.bfloat16)

    def vector(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    inner = num_heads * head_dim
    return {
        'norm': {
            'scale': jnp.asarray(1 + rng.normal(size=width) / 4, jnp.float32),
            'bias': jnp.asarray(rng.normal(size=width) / 4, jnp.float32),
        },
        'attn': {
            'qkv': {
                'kernel': 2 * matrix(width, 3, num_heads, head_dim, fan_in=width),
                'bias': vector(3, num_heads, head_dim),
            },
            'out': {
                'kernel': matrix(num_heads, head_dim, width, fan_in=inner),
                'bias': vector(width),
            },
        },
        'mlp': {
            'c_fc': {'kernel': 2 * matrix(width, hidden, fan_in=width), 'bias': vector(hidden)},
            'c_proj': {'kernel': matrix(hidden, width, fan_in=hidden), 'bias': vector(width)},
        },
    }


@pytest.mark.parametrize(
    ('length', 'width', 'num_heads', 'head_dim', 'hidden'),
    [(5, 256, 4, 64, 1024), (37, 256, 8, 32, 384), (130, 256, 3, 128, 512)],
)
@pytest.mark.parametrize('half', ['attn', 'mlp'])
def test_the_halves_of_a_block_equal_the_plain_ones(
    half, length, width, num_heads, head_dim, hidden
):
    """Against float32 from the same rounded numbers, no worse than the plain form in bfloat16."""
    rng = np.random.default_rng(1)
    params = block_params(rng, width, num_heads, head_dim, hidden)
    x = jnp.asarray(rng.normal(size=(2, length, width)) * 3, jnp.bfloat16)
    inputs = (x, params['norm'], params[half])
    if half == 'attn':
        kernel, plain = kernels.residual_attention, lambda *i: transformer.attention(*i)[0]
        assert kernels.attention_fits(x, params['attn'])
    else:
        kernel, plain = kernels.residual_mlp, lambda *i: transformer.mlp(*i, 'quick_gelu')
        assert kernels.mlp_fits(x, params['mlp'])
    exact = plain(*jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs))
    usual = np.abs(np.asarray(plain(*inputs), np.float32) - exact)
    error = np.abs(np.asarray(kernel(*inputs, interpret=True), np.float32) - exact)
    assert error.mean() < 1.02 * usual.mean()
    assert error.max() < 1.5 * usual.max()


def test_the_first_half_of_a_block_gives_its_queries_and_keys():
    rng = np.random.default_rng(4)
    params = block_params(rng, 256, 4, 64, 512)
    x = jnp.asarray(rng.normal(size=(2, 21, 256)), jnp.bfloat16)
    inputs = x, params['norm'], params['attn']
    found = kernels.residual_attention(*inputs, tapped=True, interpret=True)
    np.testing.assert_array_equal(found[0], kernels.residual_attention(*inputs, interpret=True))
    for mine, theirs in zip(found, transformer.attention(*inputs), strict=True):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(mine - theirs).max() < 0.02 * np.abs(theirs).max()


def test_an_mlp_whose_weights_do_not_fit_is_worked_on_in_parts():
    """Six frames of 200 tokens, two at a time, and four parts of the hidden channels."""
    rng = np.random.default_rng(2)
    params = block_params(rng, 1024, 2, 64, 2048)
    x = jnp.asarray(rng.normal(size=(6, 200, 1024)) * 3, jnp.bfloat16)
    assert kernels.mlp_tile(x.shape, 4096) == (2, 512)
    inputs = (x, params['norm'], params['mlp'])
    whole = kernels.residual_mlp(*inputs, interpret=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, 'mlp_tile', lambda *_, **__: kernels.MlpTile(2, 512))
        parts = kernels.residual_mlp(*inputs, interpret=True)
    error = np.abs(np.asarray(whole, np.float32) - np.asarray(parts, np.float32))
    assert error.max() <= 2**-7 * np.abs(np.asarray(whole, np.float32)).max()
    assert error.mean() < 1e-3


@pytest.fixture
def half():
    """The second half of a block: six frames, what else it takes, for a slot."""
    rng = np.random.default_rng(8)
    params = block_params(rng, 256, 4, 64, 1024)
    x = jnp.asarray(rng.normal(size=(6, 21, 256)) * 3, jnp.bfloat16)
    return x, params['norm'], params['mlp']


def slot_for(x, reading):
    """A stack for what is read of the stream, and its middle place."""
    shape = (3, *jax.eval_shape(reading.of, x).shape)
    stack = jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.bfloat16)
    return Slot(stack, jnp.asarray(1), reading)


READINGS = [Reading(), Reading(patches=True, standardised=True)]


@pytest.mark.parametrize('tile', [(1, 1024), (2, 256)])
@pytest.mark.parametrize('reading', [*READINGS, Reading(patches=True), Reading(standardised=True)])
def test_an_mlp_puts_its_result_into_a_slot_too(half, reading, tile, monkeypatch):
    """And leaves the other slots as they are."""
    inputs, slot = half, slot_for(half[0], reading)
    monkeypatch.setattr(kernels, 'mlp_tile', lambda *_, **__: kernels.MlpTile(*tile))
    alone = kernels.residual_mlp(*inputs, interpret=True)
    y, stack = jax.jit(functools.partial(kernels.residual_mlp, interpret=True))(*inputs, slot=slot)
    np.testing.assert_array_equal(y, alone)
    # The same sums in another order: what is standardised may be rounded to its neighbour.
    expected = np.asarray(slot.written(alone), np.float32)
    tolerance = 2**-7 * np.abs(expected) if reading.standardised else 0
    assert (np.abs(np.asarray(stack, np.float32) - expected) <= tolerance).all()
    np.testing.assert_array_equal(stack[::2], slot.stack[::2])


@pytest.mark.parametrize('reading', READINGS)
def test_gradients_go_through_a_slot_as_through_the_plain_form(half, reading, monkeypatch):
    """By the stream, the weights and the stack, of which a written slot has none."""
    inputs, slot = half, slot_for(half[0], reading)
    plain = functools.partial(transformer.mlp, activation='quick_gelu')
    rng = np.random.default_rng(9)
    upstream = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), (inputs[0], slot.stack)
    )

    def gradients():
        @jax.jit
        def run(stack, *inputs):
            def both(stack, *inputs):
                fast = functools.partial(kernels.residual_mlp, interpret=True)
                return kernels.kept_on_tpu(fast, plain, Slot(stack, slot.index, reading), *inputs)

            return jax.vjp(both, stack, *inputs)[1](upstream)

        return run(slot.stack, *inputs)

    usual = gradients()  # not on TPU here
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, tpu, default: tpu(*args))
    assert not np.asarray(usual[0][1], np.float32).any()
    for mine, theirs in zip(*map(jax.tree.leaves, (gradients(), usual)), strict=True):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(mine - theirs).max() <= 0.02 * np.abs(theirs).max()


def test_an_mlp_with_the_norm_behind_it_equals_the_plain_one(monkeypatch):
    """As the halves above, on EVA's largest tower: GELU, a small eps, parts that are streamed."""
    params = block_params(np.random.default_rng(5), 128, 2, 64, 384)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, 13, 128)) * 3, jnp.bfloat16)
    spec = dataclasses.replace(eva.SPECS['eva_tiny'], width=128, mlp_hidden=384)
    names = {'c_fc': 'fc1', 'c_proj': 'fc2'}
    mlp = {names[name]: dense for name, dense in params['mlp'].items()}
    inputs = (x, params['norm'], mlp)

    def plain(x, norm, mlp):
        return eva._second_half(x, norm, mlp, spec)  # not on TPU here

    assert 'post_norm_mlp' in str(jax.make_jaxpr(plain)(*inputs))
    exact = plain(*jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs))
    usual = np.abs(np.asarray(plain(*inputs), np.float32) - exact)
    # The platform's choice is all that is not run here.
    here = functools.partial(kernels.residual_mlp, interpret=True)
    monkeypatch.setattr(kernels, 'residual_mlp', here)
    monkeypatch.setattr(kernels, 'on_tpu', lambda fast, plain, *inputs: fast(*inputs))
    for tile in ((1, 384), (2, 128)):
        monkeypatch.setattr(kernels, 'mlp_tile', lambda *_, tile=tile, **__: kernels.MlpTile(*tile))
        error = np.abs(np.asarray(plain(*inputs), np.float32) - exact)
        assert error.mean() < 1.02 * usual.mean()
        assert error.max() < 1.5 * usual.max()


def test_which_blocks_the_halves_take():
    """Published towers, at their published sizes: bfloat16 weights and a frame in 16 MiB."""

    def takes(length, width, dtype=jnp.bfloat16):
        params = jax.eval_shape(
            lambda: block_params(np.random.default_rng(0), width, width // 64, 64, 4 * width)
        )
        x = jax.ShapeDtypeStruct((8, length, width), dtype)
        return kernels.attention_fits(x, params['attn']), kernels.mlp_fits(x, params['mlp'])

    assert takes(197, 768) == (True, True)  # B/16
    assert takes(50, 768) == (True, True)  # B/32
    assert takes(257, 1024) == (True, True)  # L/14
    assert takes(577, 1024) == (False, True)  # L/14, 336 pixels
    assert takes(197, 768, jnp.float32) == (False, False)
    assert takes(50, 192) == (False, False)  # half a register would be left
    # EVA-02-bigE: one frame for every part of the weights.
    assert kernels.mlp_tile((64, 257, 1792), 15360, post_norm=True) == (1, 512)
    # With a slot.
    for length, width, tile in (
        (197, 768, (1, 3072)),
        (257, 1024, (2, 512)),
        (577, 1024, (1, 256)),
    ):
        assert kernels.mlp_tile((8, length, width), 4 * width, kept=True) == tile


def test_which_frames_attention_takes():
    """Channels at a time, from all to one group; None takes the plain form."""

    def channels(side, width):
        return kernels.heads_tile(1 + side**2, width // 64, 64)

    assert channels(14, 768) == 768 and channels(24, 1024) == 1024  # B/16, L/14 at 336 pixels
    assert channels(28, 768) == 768  # B/16 at 448
    assert channels(32, 768) == channels(32, 1024) == 256  # B/16 at 512, L/14 at 448
    assert channels(37, 1024) is None  # L/14 at 518
    assert channels(40, 768) is None  # B/16 at 640
    # What a device holds decides, and four heads in a register have twice the logits of two.
    assert kernels.heads_tile(1025, 4, 128) == 512
    assert kernels.heads_tile(1025, 8, 32) is None


def test_long_frames_take_the_plain_form():
    """No kernel is left in a program whose logits would not fit; it computes what it did."""
    for length, expected in ((1025, True), (1601, False)):
        z = jax.ShapeDtypeStruct((1, length, 128), jnp.bfloat16)
        kernel = jax.ShapeDtypeStruct((128, 3, 2, 64), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((3, 2, 64), jnp.bfloat16)
        traced = jax.make_jaxpr(kernels.self_attention)(z, kernel, bias)
        assert ('frame_attention' in str(traced)) is expected


def test_what_the_kernel_takes():
    assert kernels.fits(12, 64, jnp.bfloat16)
    assert kernels.fits(16, 64, jnp.bfloat16) and kernels.fits(3, 128, jnp.bfloat16)
    assert not kernels.fits(12, 64, jnp.float32)
    assert kernels.fits(11, 64, jnp.bfloat16) and kernels.fits(16, 112, jnp.bfloat16)
    assert not kernels.fits(4, 160, jnp.bfloat16)  # wider than a register


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dist_jax.models import clip, kernels
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import with_precision
from dist_jax.plan import topology
topology.prepare_environment()
from dist_jax.sharding import make_mesh, on_mesh

def names(text):
    return [n for n in ('frame_attention', 'residual_attention', 'residual_mlp') if n in text]

def compile(mesh, spec, taps=Taps(outputs=(0,)), gradient=False):
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    # Four frames a core: the next ones arrive while two are worked on, and take room.
    shape = (16, spec.image_size, spec.image_size, 3)
    pixels = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place(('data', 'fsdp')))
    params = with_precision(Backbone(clip.KIND, spec).abstract_params()['visual'], jnp.bfloat16)
    whole = lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place())
    params = jax.tree.map(whole, params)
    def loss(params, pixels):
        found = clip.encode_image(params, pixels, spec, taps)
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(found))
    function = jax.grad(loss) if gradient else loss
    # What fits is found out at any effort; a higher one takes three times as long.
    program = jax.jit(on_mesh(mesh, function)).lower(params, pixels).compile(
        compiler_options={'exec_time_optimization_effort': -1.0}
    )
    return names(program.as_text())

small = dataclasses.replace(clip.SPECS['vit_b16'], depth=1, vocab_size=8, text_depth=1)
tapped = Taps(attention=(0,), outputs=(0,))
devices = topology.devices(topology.parse_topology('v5e:2x2'))
print('v5e', compile(make_mesh(devices, fsdp=2), small))
devices = topology.devices(topology.parse_topology('v4:2x2x1'))
mesh = make_mesh(devices, fsdp=2)
print('tapped', compile(mesh, small, tapped))
print('gradient', compile(mesh, small, gradient=True))
print('tensor', compile(make_mesh(devices, fsdp=2, tensor=2), small))
for tower in ('vit_l14', 'vit_l14_336'):
    spec = dataclasses.replace(clip.SPECS[tower], depth=1, vocab_size=8, text_depth=1)
    print(tower, compile(mesh, spec))
print(512, compile(mesh, dataclasses.replace(small, image_size=512)))
"""


@pytest.mark.slow
def test_towers_compile_for_several_chips_with_the_kernels_that_fit():
    environment = os.environ | {'XLA_FLAGS': ''}
    command = [sys.executable, '-c', 'import dataclasses' + COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, heads, mlp = 'residual_attention', 'frame_attention', 'residual_mlp'
    assert done.stdout.splitlines() == [
        f'{case} {expected}'
        for case, expected in (
            ('v5e', [whole, mlp]),
            ('tapped', [whole, mlp]),
            ('gradient', [heads, whole]),
            ('tensor', [heads]),
            ('vit_l14', [whole, mlp]),
            ('vit_l14_336', [heads, mlp]),
            ('512', [heads]),
        )
    ]


COMPILE_TRAINED = """
import jax, jax.numpy as jnp
from dist_jax.plan import topology
topology.prepare_environment()
from jax.sharding import NamedSharding, PartitionSpec
from dist_jax.models import kernels
from dist_jax.sharding import make_mesh, on_mesh

def compile(mesh, length, num_heads):
    width = 64 * num_heads
    def place(*shape, axes=()):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    def loss(*inputs):
        out = kernels.trained_attention(*inputs, queries=length - 1)
        return jnp.sum(out.astype(jnp.float32) ** 2)
    qkv = {'kernel': place(width, 3, num_heads, 64), 'bias': place(3, num_heads, 64)}
    out = {'kernel': place(num_heads, 64, width), 'bias': place(width)}
    inputs = place(8, length, width, axes=(('data', 'fsdp'),)), {'qkv': qkv, 'out': out}
    text = jax.jit(on_mesh(mesh, jax.grad(loss, (0, 1)))).lower(*inputs).compile(
        compiler_options={'exec_time_optimization_effort': -1.0}
    ).as_text()
    return [name for name in ('frame_attention', 'frame_attention_gradient') if f'/{name}/' in text]

devices = topology.devices(topology.parse_topology('v4:2x2x1'))
print(compile(make_mesh(devices, fsdp=2), 50, 5))
print(compile(make_mesh(devices, fsdp=2, tensor=2), 37, 3))
"""


def test_trained_attention_compiles_with_both_kernels():
    """On four chips, and with heads split over two."""
    environment = os.environ | {'XLA_FLAGS': ''}
    command = [sys.executable, '-c', COMPILE_TRAINED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    both = "['frame_attention', 'frame_attention_gradient']"
    assert done.stdout.splitlines() == [both, both]


@pytest.mark.parametrize('shape', [(4, 17, 64, 96), (3, 5, 128, 40)])
def test_sum_of_products_over_frames_and_tokens(shape):
    frames, length, *channels = shape
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(frames, length, n)), jnp.bfloat16) for n in channels)
    found = kernels.sum_of_products(a, b, interpret=True).sum(0)
    expected = np.einsum('nla,nlb->ab', *(np.asarray(x, np.float32) for x in (a, b)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_frame_product_has_the_gradient_of_the_product():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 8), (8, 6)))

    def loss(product, x, kernel):
        return jnp.sin(product(x, kernel)).sum()

    expected = jax.grad(lambda *a: loss(jnp.matmul, *a), (0, 1))(x, kernel)
    found = jax.grad(lambda *a: loss(kernels.frame_product, *a), (0, 1))(x, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
