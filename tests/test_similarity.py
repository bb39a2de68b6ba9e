"""Similarities of sentences and videos: their formula, blocks, padding and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import losses
from dist_jax import similarity as similarities
from dist_jax.similarity import INTERACTIONS, MASKED, Texts, Videos, similarity
from dist_jax.tasks.retrieve import Retrieve

VIDEOS, WORDS, FRAMES, WIDTH = 5, 4, 3, 8


def _embedded(sentences=6, seed=0, dtype=np.float32):
    """Sentences of 1 to 4 real words, videos of 1 to 3 real frames; what is not real is noise."""
    rng = np.random.default_rng(seed)

    def mask(count, length):
        return (np.arange(length) < rng.integers(1, length + 1, (count, 1))).astype(np.float32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    texts = Texts(
        normal(sentences, WORDS, WIDTH),
        mask(sentences, WORDS),
        rng.normal(size=(sentences, WORDS)).astype(np.float32),
        normal(sentences, WIDTH),
    )
    frame_logits = rng.normal(size=(VIDEOS, FRAMES)).astype(np.float32)
    return texts, Videos(normal(VIDEOS, FRAMES, WIDTH), mask(VIDEOS, FRAMES), frame_logits)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _softmax(x):
    return np.exp(x) / np.exp(x).sum()


def _pair(texts, videos, i, j, interaction, masked):
    """The formula of one sentence and one video; 'ignore' is as if what is not real were not."""
    words, frames = (np.asarray(x, np.float64) for x in (texts.words[i], videos.frames[j]))
    of_words, of_frames = texts.mask[i] > 0, videos.mask[j] > 0
    if interaction == 'meanP':
        mean = frames[of_frames if masked == 'ignore' else slice(None)].mean(0)
        return _unit(np.asarray(texts.pooled[i], np.float64)) @ _unit(mean)
    weights = _softmax(texts.logits[i][of_words]), _softmax(videos.logits[j][of_frames])
    if masked == 'ignore':
        products = _unit(words[of_words]) @ _unit(frames[of_frames]).T
        return (weights[0] @ products.max(1) + weights[1] @ products.max(0)) / 2
    products = (_unit(words) @ _unit(frames).T) * of_words[:, None] * of_frames
    by_word, by_frame = products.max(1)[of_words], products.max(0)[of_frames]
    return (weights[0] @ by_word + weights[1] @ by_frame) / 2


@pytest.mark.parametrize('masked', MASKED)
@pytest.mark.parametrize('interaction', INTERACTIONS)
def test_they_follow_their_formula(interaction, masked):
    texts, videos = _embedded()
    expected = [
        [_pair(texts, videos, i, j, interaction, masked) for j in range(VIDEOS)] for i in range(6)
    ]
    found = similarity(texts, videos, interaction, masked)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


def _value_and_gradients(texts, videos, masked):
    """Similarities, and the gradients of all floats of sentences and videos."""
    upstream = np.random.default_rng(1).normal(size=(len(texts.mask), VIDEOS))

    @jax.jit
    def both(texts, videos):
        def compare(texts, videos):
            found = similarity(texts, videos, 'wti', masked)
            return (found * upstream).sum(), found

        (_, found), grads = jax.value_and_grad(compare, (0, 1), has_aux=True)(texts, videos)
        return found, grads

    return jax.device_get(both(texts, videos))


@pytest.mark.parametrize(('sentences', 'room', 'parts'), [(6, 4, 2), (6, 0, 6), (7, 4, 7)])
def test_blocks_change_nothing(monkeypatch, sentences, room, parts):
    """`room`: sentences of which products may be in memory; not all divide their number."""
    embedded = _embedded(sentences)
    whole = _value_and_gradients(*embedded, 'ignore')
    row_bytes = 4 * WORDS * FRAMES * VIDEOS
    monkeypatch.setattr(similarities, 'BLOCK_BYTES', room * row_bytes)
    assert similarities._parts(sentences, row_bytes) == parts
    found = _value_and_gradients(*embedded, 'ignore')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, whole)
    assert all(np.abs(leaf).max() > 0.01 for leaf in (whole[1][0].words, whole[1][1].frames))


@pytest.mark.parametrize('masked', MASKED)
def test_blank_rows_are_finite_and_learn_nothing(masked):
    texts, videos = _embedded()
    texts.mask[2] = videos.mask[2] = 0
    texts = texts.replace(words=texts.words.at[2].set(0))
    videos = videos.replace(frames=videos.frames.at[2].set(0))
    found, (of_texts, of_videos) = _value_and_gradients(texts, videos, masked)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, of_texts, of_videos)))
    blank = of_texts.words[2], of_texts.logits[2], of_videos.frames[2], of_videos.logits[2]
    assert not any(leaf.any() for leaf in blank)


def test_half_precision_is_near():
    wide, narrow = (
        _value_and_gradients(*_embedded(dtype=dtype), 'zero')
        for dtype in (np.float32, jnp.bfloat16)
    )
    assert narrow[0].dtype == np.float32
    np.testing.assert_allclose(narrow[0], wide[0], atol=0.01)
    for found, expected in zip(jax.tree.leaves(narrow[1]), jax.tree.leaves(wide[1])):
        error = np.linalg.norm(np.float32(found) - expected)
        assert error <= 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize('positives', ['pair', 'video'])
def test_pairs_whose_video_is_missing_are_as_if_they_were_not(positives):
    texts, videos = _embedded(VIDEOS)
    outputs = {
        'words': texts.words,
        'word_logits': texts.logits,
        'pooled': texts.pooled,
        'frames': videos.frames,
        'frame_logits': videos.logits,
        'logit_scale': np.full(VIDEOS, np.log(20.0), np.float32),
    }
    targets = {'word_mask': texts.mask, 'video': np.array([7, 3, 7, 7, 3])}
    mask = np.array([1, 1, 0, 1, 1], np.float32)
    task = Retrieve(positives=positives)

    @jax.jit
    def learn(outputs, targets, mask):
        def loss(outputs):
            return losses.masked_mean(task.loss(outputs, targets, mask), mask, mask.sum())

        return jax.value_and_grad(loss)(outputs)

    loss, grads = learn(outputs, targets, mask)
    real = np.flatnonzero(mask)
    expected = learn(*jax.tree.map(lambda leaf: leaf[real], (outputs, targets, mask)))
    assert not any(leaf[2].any() for leaf in grads.values())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        (loss, {name: leaf[real] for name, leaf in grads.items()}),
        expected,
    )
