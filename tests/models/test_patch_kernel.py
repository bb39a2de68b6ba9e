"""Frames cut into patches in a kernel, in interpret mode: nothing is computed, so all is equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.models import layers, patch_kernel


def frames(size, dtype=jnp.bfloat16, count=3):
    return jax.random.normal(jax.random.key(size), (count, size, 3 * size)).astype(dtype)


@pytest.mark.parametrize(('size', 'patch'), [(32, 8), (48, 16), (28, 14), (96, 32), (64, 16)])
def test_patches_are_those_of_the_plain_form(size, patch):
    rows = frames(size)
    assert patch_kernel.fits(rows, patch)
    found = patch_kernel.cut_patches(rows, patch, interpret=True)
    pixels = rows.reshape(*rows.shape[:2], size, 3)
    np.testing.assert_array_equal(found, layers.patchify(pixels, patch))


@pytest.mark.parametrize('form', [layers.as_rows, layers.as_pixels])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_clips_in_either_form_are_cut_and_have_a_gradient(form, dtype):
    clips = form(frames(32, dtype, 6).reshape(2, 3, 32, 96))
    run = jax.jit(lambda x: patch_kernel.patches_of(x, 8))
    found, back = jax.vjp(run, clips)
    assert found.shape == (2, 3, 16, 192)
    np.testing.assert_array_equal(found, layers.clip_patches(clips, 8))
    np.testing.assert_array_equal(back(found)[0], clips)


def test_what_does_not_fit_or_is_float32_takes_the_plain_form():
    shape = lambda *size, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    assert patch_kernel.fits(shape(2, 224, 672), 16)
    assert not patch_kernel.fits(shape(2, 224, 672, dtype=jnp.float32), 16)
    assert not patch_kernel.fits(shape(2, 1024, 3072), 16)
    assert not patch_kernel.fits(shape(2, 224, 960), 16)
    with layers.portable():
        assert not patch_kernel.fits(shape(2, 224, 672), 16)
