"""Mixup and cutmix on a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax.mixup import Mixing, mix

ROWS = 4


@pytest.fixture
def batch():
    # Row i is a clip of the constant i; labels are one-hot rows.
    video = jnp.broadcast_to(
        jnp.arange(ROWS, dtype=jnp.float32)[:, None, None, None, None], (ROWS, 2, 8, 6, 3)
    )
    return video, (jnp.eye(ROWS), jnp.eye(ROWS)[:, ::-1])


def run(batch, mixing, key=0, mask=None):
    mask = jnp.ones(ROWS) if mask is None else jnp.asarray(mask, jnp.float32)
    return jax.jit(mix, static_argnums=4)(jax.random.key(key), *batch, mask, mixing)


@pytest.mark.parametrize('mixing', [Mixing(), Mixing(0.8, 1.0, probability=0.0)])
def test_off_changes_nothing(batch, mixing):
    video, targets = run(batch, mixing)
    np.testing.assert_array_equal(video, batch[0])
    np.testing.assert_array_equal(targets[0], batch[1][0])


@pytest.mark.parametrize('key', range(5))
def test_mixup_blends_with_the_reversed_batch(batch, key):
    video, targets = run(batch, Mixing(mixup_alpha=0.8), key)
    share = targets[0][0, 3]
    assert 0 < share < 1
    expected = batch[0] * (1 - share) + batch[0][::-1] * share
    np.testing.assert_allclose(video, expected, atol=1e-5)
    np.testing.assert_allclose(targets[0][1], [0, 1 - share, share, 0], atol=1e-6)
    np.testing.assert_allclose(targets[1], targets[0][:, ::-1], atol=1e-6)


@pytest.mark.parametrize('key', range(8))
def test_cutmix_pastes_one_box_and_corrects_the_share(batch, key):
    video, targets = run(batch, Mixing(cutmix_alpha=1.0), key)
    pasted = np.asarray(video[0, :, :, :, 0] == 3.0)
    assert np.all(pasted | np.asarray(video[0, :, :, :, 0] == 0.0))
    np.testing.assert_array_equal(pasted[0], pasted[1])  # the same box in every frame
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    np.testing.assert_array_equal(pasted[0], rows[:, None] & columns[None])
    np.testing.assert_allclose(targets[0][0, 3], pasted[0].mean(), atol=1e-6)


@pytest.mark.parametrize('mixing', [Mixing(mixup_alpha=0.8), Mixing(cutmix_alpha=1.0)])
def test_rows_of_pixels_are_mixed_alike(batch, mixing):
    rows = batch[0].reshape(*batch[0].shape[:3], -1)
    video, targets = run(batch, mixing, 1)
    of_rows, other = run((rows, batch[1]), mixing, 1)
    np.testing.assert_array_equal(video, of_rows.reshape(video.shape))
    np.testing.assert_array_equal(targets[0], other[0])


def test_both_take_turns(batch):
    seen = set()
    for key in range(20):
        video, _ = run(batch, Mixing(0.8, 1.0), key)
        values = np.unique(np.asarray(video[0]).round(4))
        seen.add('cutmix' if set(values) <= {0.0, 3.0} else 'mixup')
    assert seen == {'cutmix', 'mixup'}


@pytest.mark.parametrize('mixing', [Mixing(mixup_alpha=0.8), Mixing(cutmix_alpha=1.0)])
def test_a_clip_without_partner_stays_whole(batch, mixing):
    # Row 0 could not be read; its partner is row 3.
    video, targets = run(batch, mixing, 3, [0, 1, 1, 1])
    np.testing.assert_array_equal(video[3], batch[0][3])
    np.testing.assert_array_equal(targets[0][3], batch[1][0][3])
    assert np.abs(np.asarray(targets[0][1]) - batch[1][0][1]).max() > 0


def test_targets_stay_distributions(batch):
    for key in range(5):
        _, targets = run(batch, Mixing(0.8, 1.0), key)
        np.testing.assert_allclose(targets[0].sum(-1), 1.0, rtol=1e-6)


def test_draws_differ_between_keys(batch):
    shares = {float(run(batch, Mixing(mixup_alpha=0.8), key)[1][0][0, 3]) for key in range(5)}
    assert len(shares) == 5
