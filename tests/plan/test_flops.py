"""Counting products: alone, in loops, and in gradients that nobody traced."""

import jax
import jax.numpy as jnp
import pytest

from dist_jax.configs import dist, evl
from dist_jax.plan import compiling, flops
from dist_jax.sharding import make_mesh

ROWS, INNER, COLUMNS = 6, 5, 4
X = jax.ShapeDtypeStruct((ROWS, INNER), jnp.float32)
W = jax.ShapeDtypeStruct((INNER, COLUMNS), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((INNER, INNER), jnp.float32)
PRODUCT = 2 * ROWS * INNER * COLUMNS
STEP = 2 * ROWS * INNER * INNER


def looped(w, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]


@pytest.mark.parametrize(
    ('function', 'arguments', 'wrt', 'forward', 'backward'),
    [
        (lambda w, x: x @ w, (W, X), (), PRODUCT, 0),
        (lambda w, x: x @ w, (W, X), (0,), PRODUCT, PRODUCT),
        (lambda w, x: x @ w, (W, X), (0, 1), PRODUCT, 2 * PRODUCT),
        (lambda w, x: (x + 1) @ jax.lax.stop_gradient(w), (W, X), (0,), PRODUCT, 0),
        # What the result does not need is no work.
        (lambda w, x: (x @ w, x)[1], (W, X), (0,), 0, 0),
        # The first turn has no gradient for its input, but the loop computes it all the same.
        (looped, (SQUARE, X), (0,), 7 * STEP, 2 * 7 * STEP),
        (looped, (SQUARE, X), (), 7 * STEP, 0),
        (jax.checkpoint(looped), (SQUARE, X), (0,), 7 * STEP, 2 * 7 * STEP),
        (jax.jit(looped), (SQUARE, X), (0,), 7 * STEP, 2 * 7 * STEP),
        # Two forms of one thing: the model asks for the cheaper.
        (
            lambda w, x: jax.lax.platform_dependent(
                w, x, cpu=lambda w, x: (x @ w) @ w, default=lambda w, x: x @ w
            ),
            (SQUARE, X),
            (),
            STEP,
            0,
        ),
        (
            lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: (x @ w) @ w),
            (SQUARE, X),
            (),
            2 * STEP,
            0,
        ),
        (
            lambda w, x: jnp.einsum('abi,io->abo', x, w),
            (W, jax.ShapeDtypeStruct((3, ROWS, INNER), jnp.float32)),
            (0,),
            3 * PRODUCT,
            3 * PRODUCT,
        ),
    ],
)
def test_products_count(function, arguments, wrt, forward, backward):
    assert flops.count(function, *arguments, wrt=wrt) == flops.Flops(forward, backward)


def test_convolutions_count_their_taps():
    found = flops.count(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=2
        ),
        jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 3, 10), jnp.float32),
    )
    assert found.forward == 2 * (2 * 8 * 8 * 10) * (3 * 3 * 3)


def test_the_step_sends_no_gradient_through_the_backbone():
    config = evl.get_config('demo')
    config.batch_size = 3
    one = compiling.train_step(config, make_mesh(jax.devices()[:1]))
    traced = flops.count(one.function, *one.arguments.values())
    assert one.model_flops.features > 0
    assert 3 * one.model_flops.total == traced.forward


@pytest.mark.parametrize('gradients', ['frozen', 'through_backbone', 'full'])
def test_a_derived_gradient_is_the_traced_one(gradients):
    config = dist.get_config('demo')
    config.batch_size = 3
    one = compiling.train_step(config, make_mesh(jax.devices()[:1]), gradients)
    traced = flops.count(one.function, *one.arguments.values())
    assert 3 * one.model_flops.total == traced.forward
    # Recomputation is in the traced step, not in the model.
    config.backbone.name = 'vit_b32'
    config.data.image_size = 224
    config.model.update(remat=True, unroll=False)
    one = compiling.train_step(config, make_mesh(jax.devices()[:1]), gradients)
    assert 3 * one.model_flops.total < flops.count(one.function, *one.arguments.values()).forward
