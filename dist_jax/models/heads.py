"""From a clip embedding to logits: cosine with class texts, or linear classifiers.

A data set may ask several things of a clip (verb and noun), each with classes and a head of its
own; logits are tuples with one entry a head. In trees of parameters they are called `column_0` and
so on: initial values and stored checkpoints hang on these names.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dist_jax.models.api import Tree
from dist_jax.models.layers import Initializer, LinearHead, l2_normalize, trunc_normal

HEADS = ('text', 'linear')


class Head(nn.Module):
    """Logits of a clip embedding.

    With kind 'text' there are no parameters: logits are cosine similarities with the frozen text
    features of the class names, times exp(logit_scale). With kind 'linear', one classifier a head.

    Attributes:
      kind: 'text' or 'linear'.
      num_classes: classes of each head.
      kernel_init, bias_init: of the classifiers.
    """

    kind: str
    num_classes: tuple[int, ...]
    kernel_init: Initializer = trunc_normal
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, embedding: jax.Array, features: Tree) -> tuple[jax.Array, ...]:
        # Networks name this module `head`: `classes_of` and `take_classes` read its parameters.
        if self.kind == 'text':
            return cosine_logits(embedding, features['text'], features['logit_scale'])
        return tuple(
            LinearHead(classes, self.kernel_init, self.bias_init, name=f'column_{i}')(embedding)
            for i, classes in enumerate(self.num_classes)
        )


def check_kind(kind: str) -> None:
    """Raises ValueError for a head that does not exist."""
    if kind not in HEADS:
        raise ValueError(f'model.head={kind!r} is not one of {HEADS}')


def cosine_logits(
    embedding: jax.Array, text: tuple[jax.Array, ...], logit_scale: jax.Array
) -> tuple[jax.Array, ...]:
    """(..., E) embeddings -> float32 (..., num_classes) a head; `text` is L2-normalised."""
    unit = l2_normalize(embedding)
    return tuple(jnp.exp(logit_scale) * unit @ classes.T for classes in text)


def mean_cosine_logits(
    frames: jax.Array, text: tuple[jax.Array, ...], logit_scale: jax.Array
) -> tuple[jax.Array, ...]:
    """`cosine_logits` of frames (B, T, E), mean over them: float32 (B, num_classes) a head."""
    return tuple(logits.mean(1) for logits in cosine_logits(frames, text, logit_scale))


def classes_of(params: Tree) -> tuple[int, ...]:
    """Classes of each head in the parameters of a network; () for a text head.

    Raises:
      ValueError: `head` is something else.
    """
    head = params.get('head', {})
    if not all(name.startswith('column_') for name in head):
        raise ValueError(
            f'params/head holds {", ".join(head)} where a classifier (models.heads.Head) has '
            'column_0: nothing says which class is which; name that module of the network otherwise'
        )
    return tuple(head[f'column_{i}']['classifier']['bias'].shape[-1] for i in range(len(head)))


def with_classes(head: Tree, num_classes: Sequence[int]) -> Tree:
    """The shapes of a linear head for other numbers of classes; dtypes and shardings stay."""
    return {
        f'column_{i}': jax.tree.map(
            lambda x, n=classes: jax.ShapeDtypeStruct(
                (*x.shape[:-1], n), x.dtype, sharding=x.sharding
            ),
            head[f'column_{i}'],
        )
        for i, classes in enumerate(num_classes)
    }


def take_classes(head: Tree, places: Sequence[np.ndarray], fresh: Tree) -> Tree:
    """A linear head for other classes.

    Args:
      head: of the classes that there are: kernels (E, source classes), biases (source classes,).
      places: for each head the source class of each class, int (classes,); -1: none.
      fresh: the head to take the other classes from. It says where the result lies; without a -1,
        shapes with shardings are enough.
    """
    complete = all((place >= 0).all() for place in places)

    def take(head: Tree, fresh: Tree) -> Tree:
        columns = {}
        for i, place in enumerate(places):
            name = f'column_{i}'
            taken = jax.tree.map(lambda x, p=place: jnp.take(x, p, axis=-1), head[name])
            if not complete:
                taken = jax.tree.map(
                    lambda new, old, p=place: jnp.where(p >= 0, new, old), taken, fresh[name]
                )
            columns[name] = taken
        return columns

    where = jax.tree.map(lambda x: x.sharding, fresh)
    return jax.jit(take, out_shardings=where)(head, None if complete else fresh)
