"""Branches of the side network in kernels mean what they mean in plain JAX."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import batch_norm, side_kernel, side_network
from dist_jax.models.batch_norm import Norm

# Nothing fills registers: clips, frames, tokens, channels, hidden channels.
CLIPS, FRAMES, TOKENS, WIDTH, HIDDEN = 4, 4, 13, 72, 136
BRANCHES = {'MLP': side_kernel.MLP, 'convolution': side_kernel.CONV}


def values(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def dense(seed, inputs, outputs):
    bias = values(seed + 1, outputs, scale=0.5)
    return {'kernel': values(seed, inputs, outputs, scale=1.5 * inputs**-0.5), 'bias': bias}


PARAMS = {
    'MLP': {'c_fc': dense(1, WIDTH, HIDDEN), 'c_proj': dense(3, HIDDEN, WIDTH)},
    'convolution': {
        'pw_1': dense(5, WIDTH, WIDTH),
        'dw': {'kernel': values(7, 3, WIDTH), 'bias': values(8, WIDTH)},
        'pw_2': dense(9, WIDTH, WIDTH),
    },
}


def norm_of(x, groups=2):
    """Of two groups, one of them with a clip that is not real."""
    real = jnp.array([1.0, 1.0, 1.0, 0.0])[:, None]
    wide = x.astype(jnp.float32).reshape(groups, -1, FRAMES, TOKENS, WIDTH)
    mean, variance = (
        jnp.repeat(found(wide, (1, 2, 3)), CLIPS // groups, axis=0) for found in (jnp.mean, jnp.var)
    )
    share = real / (2 * FRAMES * TOKENS)
    scale, bias = 1 + values(11, WIDTH, scale=0.2), values(12, WIDTH, scale=0.2)
    return Norm(scale, bias, mean, variance, share, groups, 1e-5)


@functools.cache
def found(name, form):
    """Output and gradients: in float32, in plain bfloat16, in kernels."""
    branch, dtype = BRANCHES[name], jnp.float32 if form == 'exact' else jnp.bfloat16
    # Rounded first: every form is given the same numbers.
    x, upstream = (values(s, CLIPS, FRAMES, TOKENS, WIDTH).astype(jnp.bfloat16) for s in (20, 21))
    norm = norm_of(2 * x + 1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS[name])
    if name == 'convolution':
        params['dw'] = PARAMS[name]['dw']
    if form == 'exact':
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def kernels(x, norm, params):
        return side_kernel._add(branch, side_kernel.hold(x), norm, params)

    plain = functools.partial(side_kernel._plain, branch)
    inputs = (2 * x + 1).astype(dtype), norm, params
    y, (to_x, to_norm, to_params) = pulled(form, kernels, plain, inputs, upstream.astype(dtype))
    return y, to_x, to_norm.scale, to_norm.bias, to_params


def pulled(form, kernels, plain, inputs, upstream):
    """Result and gradient of a function that takes kernels on TPU, or of its plain form."""

    @jax.jit
    def run(inputs, upstream):
        y, pull = jax.vjp(kernels if form == 'kernel' else plain, *inputs)
        return y, pull(upstream)

    with pytest.MonkeyPatch.context() as patch:
        if form == 'kernel':
            patch.setattr(jax.lax, 'platform_dependent', interpreted)
        return run(inputs, upstream)


def interpreted(*inputs, tpu, default):
    return tpu(*inputs, interpret=True)


def rounded(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def looked(heads):
    """Inputs of attention, and what comes back: queries are far apart, so that weights differ."""
    width = 64 * heads
    x, token = (values(s, CLIPS, FRAMES, n, width) for s, n in ((30, TOKENS), (31, 1)))
    attn = {
        'qkv': {
            'kernel': values(32, width, 3, heads, 64, scale=2 * width**-0.5),
            'bias': values(33, 3, heads, 64),
        },
        'out': {
            'kernel': values(34, heads, 64, width, scale=width**-0.5),
            'bias': values(35, width),
        },
    }
    norm = {'scale': 1 + values(36, width, scale=0.2), 'bias': values(37, width, scale=0.2)}
    rest = rounded((2 * x + 1, token, values(38, TOKENS, width)))
    return (*rest, norm, rounded(attn)), rounded(values(39, *x.shape))


@functools.cache
def seen(heads, form):
    """As `found`."""
    inputs, upstream = looked(heads)
    if form == 'exact':
        inputs, upstream = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, upstream))

    def kernels(*inputs):
        held, moments = side_kernel.attend(*inputs)
        return held.x, moments

    def plain(*inputs):
        y = side_kernel._plain_attend(*inputs)
        return y, batch_norm._clip_statistics(y)

    nothing = (jnp.zeros((CLIPS, 64 * heads)),) * 2
    return pulled(form, kernels, plain, inputs, (upstream, nothing))


@functools.cache
def mixed(layer, form):
    """As `found`, of one of three layers of taps."""
    s, taps, kernel, bias = rounded(
        (
            values(40, CLIPS, FRAMES, TOKENS, WIDTH),
            values(41, 3, CLIPS, FRAMES, TOKENS, 48),
            values(42, 48, WIDTH, scale=0.2),
            values(43, WIDTH),
        )
    )
    upstream = rounded(values(44, *s.shape))
    if form == 'exact':
        wide = (x.astype(jnp.float32) for x in (s, taps, kernel, bias, upstream))
        s, taps, kernel, bias, upstream = wide

    def kernels(s, kernel, bias):
        held, moments = side_kernel.mix(s, taps, jnp.int32(layer), kernel, bias)
        return held.x, moments

    def plain(s, kernel, bias):
        u = side_kernel._plain_mix(s, taps, jnp.int32(layer), kernel, bias)
        return u, batch_norm._clip_statistics(u)

    nothing = (jnp.zeros((CLIPS, WIDTH)),) * 2
    return pulled(form, kernels, plain, (s, kernel, bias), (upstream, nothing))


@functools.cache
def together(layer, form):
    """As `found`: taps, the convolution, attention and the MLP, with norms of their statistics."""
    options = {'mlp_hidden': 136, 'post_norm': False, 'groups': 2, 'train': True, 'record': False}
    options |= {'retrieval': False, 'temporal_conv': True, 'class_token_shift': True}
    dtype = jnp.float32 if form == 'exact' else jnp.bfloat16
    s, token, taps, upstream = (
        leaf.astype(dtype)
        for leaf in rounded(
            (
                values(50, CLIPS, FRAMES, TOKENS, 64),
                values(51, CLIPS, FRAMES, 48),
                values(52, 3, CLIPS, FRAMES, TOKENS, 48),
                values(53, CLIPS, FRAMES, TOKENS, 64),
            )
        )
    )
    positions, mask = values(54, TOKENS, 64), jnp.array([1, 1, 0, 1])
    net = side_network.SideLayer(dtype=dtype, **options)
    stacked = {'token': token, 'layer': jnp.int32(layer)}, positions, mask, taps
    sliced = {'token': token, 'patches': taps[layer]}, positions, mask, None
    rest = stacked if form == 'kernel' else sliced
    params = jax.eval_shape(net.init, jax.random.key(0), s, *rest)['params']
    params = jax.tree.map(
        lambda leaf: (
            values(sum(leaf.shape), *leaf.shape, scale=(leaf.size / leaf.shape[-1]) ** -0.5)
            .astype(jnp.bfloat16)
            .astype(jnp.float32)
        ),
        params,
    )

    def run(s, params):
        (s, _), stats = net.apply({'params': params}, s, *rest, mutable=['batch_stats'])
        return s, stats['batch_stats']

    shape = jax.eval_shape(run, s, params)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    with pytest.MonkeyPatch.context() as patch:
        if form != 'kernel':
            patch.setattr(side_kernel, 'kernels_take', lambda x: False)
        return pulled(form, run, run, (s, params), (upstream, nothing))


CASES = [
    *((found, name) for name in BRANCHES),
    *((seen, heads) for heads in (1, 3)),
    (mixed, 1),
    (together, 2),
]


@pytest.mark.parametrize(('run', 'case'), CASES)
def test_kernels_are_as_near_to_float32_as_the_plain_form(run, case):
    """Outputs, gradients of the stream, of norms and of every parameter."""
    exact = jax.tree_util.tree_leaves_with_path(run(case, 'exact'))
    forms = (jax.tree.leaves(run(case, form)) for form in ('kernel', 'plain'))
    for (path, true), mine, usual in zip(exact, *forms, strict=True):
        assert mine.dtype == usual.dtype, path
        mine, usual, true = (np.asarray(x, np.float32) for x in (mine, usual, true))
        errors = [np.abs(x - true).mean() for x in (mine, usual)]
        assert errors[0] <= 1.1 * errors[1], (path, errors)
        assert errors[0] <= 0.01 * np.abs(true).max(), path


def test_taps_have_a_gradient_too():
    """Of the layer that was read, where someone asks for it."""
    inputs = [values(s, *shape) for s, shape in enumerate(((2, 3, 4, 8), (3, 2, 3, 4, 6)))]
    rest = jnp.int32(2), values(7, 6, 8), values(8, 8)

    def ours(s, taps):
        return side_kernel._mix(s, taps, *rest)[0].x.sum()

    def plain(s, taps):
        return side_kernel._plain_mix(s, taps, *rest).sum()

    for mine, theirs in zip(*(jax.grad(f, (0, 1))(*inputs) for f in (ours, plain))):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


ON_MESHES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from dist_jax.plan import topology
topology.prepare_environment()
from jax.sharding import NamedSharding, PartitionSpec
from dist_jax.models import side_kernel, side_network
from dist_jax.sharding import make_mesh, on_mesh
from tests.models import test_side_kernel as cases

def differences(name):
    x = cases.rounded(cases.values(20, cases.CLIPS, cases.FRAMES, cases.TOKENS, cases.WIDTH))
    inputs = x, cases.norm_of(x), cases.rounded(cases.PARAMS[name])
    def run(*inputs):
        fast = functools.partial(side_kernel._fast, cases.BRANCHES[name], interpret=True)
        pull = functools.partial(side_kernel._fast_gradient, cases.BRANCHES[name], interpret=True)
        return fast(*inputs), pull(*inputs, inputs[0])
    mesh = make_mesh(jax.devices('cpu')[:4], fsdp=2)
    places = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec()))
    found = jax.jit(run)(*inputs), jax.jit(on_mesh(mesh, run))(*places)
    pairs = [[np.asarray(x, np.float32) for x in jax.tree.leaves(tree)] for tree in found]
    return max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*pairs) if a.any())

print(differences('MLP') < 0.01)

KERNELS = ('tap', 'conv', 'attention', 'mlp')
def compiled(mesh, stacked=True, frames=2, tokens=20, tapped=128):
    place = lambda p, *axes: jax.ShapeDtypeStruct(
        p.shape, p.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    layer = side_network.SideLayer(
        mlp_hidden=128, post_norm=False, groups=1, train=True, record=False, retrieval=False,
        temporal_conv=True, class_token_shift=True, dtype=jnp.bfloat16)
    array = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    inputs = jax.eval_shape(lambda: (
        array(8, frames, tokens, 64),
        {'token': array(8, frames, tapped), 'patches': array(8, frames, tokens, tapped)},
        jnp.zeros((tokens, 64)), None, None))
    if stacked:
        tap = {'token': inputs[1]['token'], 'layer': jax.eval_shape(lambda: jnp.int32(1))}
        taps = jax.eval_shape(lambda: array(2, 8, frames, tokens, tapped))
        inputs = inputs[0], tap, *inputs[2:4], taps
    variables = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    def loss(variables, *inputs):
        (s, _), _ = layer.apply(variables, *inputs, mutable=['batch_stats'])
        return jnp.sum(s.astype(jnp.float32) ** 2)
    clips = ('data', 'fsdp')
    axes = {2: (), 3: (clips,), 4: (clips,), 5: (None, clips), 0: ()}
    inputs = jax.tree.map(lambda x: place(x, *axes[x.ndim]), inputs)
    text = jax.jit(on_mesh(mesh, jax.grad(loss))).lower(
        jax.tree.map(place, variables), *inputs).compile(
        compiler_options={'exec_time_optimization_effort': -1.0}).as_text()
    return [name for kernel in KERNELS for name in (f'side_{kernel}', f'side_{kernel}_gradient')
            if f'/{name}/' in text]

devices = topology.devices(topology.parse_topology('v4:2x2x1'))
print(compiled(make_mesh(devices, fsdp=2)))
print(compiled(make_mesh(devices, fsdp=2, tensor=2), stacked=False))
"""


def test_on_several_chips():
    """The same numbers on four devices; compiled for four chips, and, of whole weights, for two."""
    flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
    done = subprocess.run(
        [sys.executable, '-c', ON_MESHES],
        env=os.environ | {'XLA_FLAGS': flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *equal, kernels, of_parts = done.stdout.splitlines()
    assert equal == ['True']
    names = [f'side_{name}' for name in ('tap', 'conv', 'attention', 'mlp')]
    assert kernels == str([name + end for name in names for end in ('', '_gradient')])
    assert of_parts == '[]'
