"""What an evaluation of random scores found, for tests of what is shown of it."""

import numpy as np

from dist_jax import metrics
from dist_jax.evaluate import with_videos
from dist_jax.tasks.classify_figures import classification_figures


def names(sizes=(4,)):
    return tuple(tuple(f'class {i} of {size}' for i in range(size)) for size in sizes)


def found(sizes=(4,), num_videos=12):
    """`metrics.classification` of each head; the last class of each has no video."""
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(num_videos) % (size - 1) for size in sizes], 1)
    scores = tuple(rng.random((num_videos, size)) for size in sizes)
    return tuple(metrics.classification(s, labels[:, i]) for i, s in enumerate(scores))


def figures(sizes=(4,), num_videos=12, bad=(), class_names=None):
    heads = found(sizes, num_videos)
    joint = heads[0]['top1'] if len(heads) > 1 else None
    judged = classification_figures(heads, joint, class_names or names(sizes))
    return with_videos(judged, num_videos, bad)


def stored(judged, bad=()):
    """What `evaluation.json` holds."""
    return {**judged.scalars, 'views': 3, 'bad_videos': list(bad), **judged.details}
