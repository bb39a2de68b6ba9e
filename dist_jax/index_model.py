"""What an index is made with and searched with: one model, its clips on one side, words on another.

A side is loaded when it is asked for: a sentence needs no image tower.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax import backbones
from dist_jax.embed import Embedder
from dist_jax.index_file import Index
from dist_jax.models import converted, plain
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import TEXT, ClassTexts, text_features
from dist_jax.models.layers import l2_normalize
from dist_jax.sharding import make_mesh
from input_pipeline.escape import terminal
from input_pipeline.pipeline import EvalReader
from input_pipeline.tokenizer import tokenize

log = logging.getLogger('dist_jax')

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
QUERIES = 128  # windows of another video that are compared at once
MOST_FRAMES = 1024  # of a window, in what a file says
MEAN, EACH = 'meanP', 'wti'  # interactions: one vector a window, or one a frame with weights

# Of a chunk of an index, {'vectors': (C, ...), 'weights': (C, T) if it has any} -> float32 (C,).
Score = Callable[[Mapping[str, jax.Array]], jax.Array]


class IndexModel(Protocol):
    """A model that can make an index and search it.

    Attributes:
      identity: JSON values that say which it is: hashes of weights, interaction, dtype.
      place: where it lies, an absolute path.
      views: how clips are made of a video, as JSON values and as a reader.
    """

    identity: dict[str, Any]
    place: str
    views: EvalReader

    def embedder(self, batch_size: int) -> Embedder:
        """Loads what embeds clips; its rows are `vectors`, and `weights` where frames have some."""

    def score_of_sentence(self, sentence: str) -> Score:
        """Loads what embeds words; what the sentence makes of windows."""

    def score_of_rows(self, rows: Mapping[str, np.ndarray]) -> Score:
        """What windows of another video, rows of `embedder`, make of windows: the best of them."""


def preprocessing(views: EvalReader) -> dict[str, Any]:
    """JSON values of a reader: what becomes of a video before a model sees it."""
    names = ('num_frames', 'image_size', 'sampling', 'interval', 'size', 'rounding')
    names += ('interpolation', 'jpeg_decoder')
    found = {name: getattr(views, name) for name in names}
    return found | {'size': list(views.size)}


@dataclasses.dataclass(frozen=True)
class Plain:
    """A converted backbone with a text tower, as it is.

    Attributes:
      backbone: the converted one.
      num_frames: that it sees of a window.
      dtype: of its image tower, a key of `DTYPES`.

    Source: zero-shot retrieval of CLIP4Clip (arXiv:2104.08860), meanP: the mean of the embeddings
    of frames. Differs: they are not brought to unit length before, as in Side4Video's meanP.
    """

    backbone: Backbone
    num_frames: int
    dtype: str = 'float32'

    def __post_init__(self) -> None:
        stored = converted.stored_shapes(self.backbone.path)
        if self.backbone.kind.encode_text is None or not all(name in stored for name in TEXT):
            raise ValueError(
                f'{self.backbone.path} ({self.backbone.name}) has no text tower, so no sentence '
                'can be searched with it; convert a CLIP or EVA-CLIP with both towers'
            )
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r} is not one of {", ".join(DTYPES)}')

    @property
    def identity(self) -> dict[str, Any]:
        return {
            'kind': 'backbone',
            'name': self.backbone.name,
            'sha256': self.backbone.params_sha256,
            'interaction': MEAN,
            'dtype': self.dtype,
        }

    @property
    def place(self) -> str:
        return str(converted.absolute_path(self.backbone.path))

    @property
    def views(self) -> EvalReader:
        """Frames from the middles of equal parts, as CLIP saw its pictures."""
        return EvalReader(
            self.num_frames,
            self.backbone.spec.image_size,
            rounding='torchvision',
            interpolation='smooth_bicubic',
        )

    def embedder(self, batch_size: int) -> Embedder:
        mesh = make_mesh()
        model = plain.build(self.backbone, dtype=DTYPES[self.dtype])
        frozen = model.frozen.load(mesh, ClassTexts())
        return Embedder(model, plain.VARIABLES, frozen, mean_of_frames, mesh, batch_size)

    def score_of_sentence(self, sentence: str) -> Score:
        params = converted.load_params(self.backbone.path, ['text'])
        tokens = tokenize([sentence], self.backbone.spec.context_length, truncate=True)
        (vectors,) = text_features(params['text'], (jnp.asarray(tokens),), self.backbone)
        return score_by_vectors(vectors)

    def score_of_rows(self, rows: Mapping[str, np.ndarray]) -> Score:
        return score_by_vectors(l2_normalize(jnp.asarray(rows['vectors'])))


def mean_of_frames(outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`frames` (B, T, E) -> `vectors` (B, E) float32 of unit length."""
    return {'vectors': l2_normalize(outputs['frames'].mean(1))}


def score_by_vectors(queries: jax.Array) -> Score:
    """The largest product with any of (n, E), of which some are at work at a time."""
    count = min(len(queries), QUERIES)
    filled = jnp.concatenate([queries, jnp.repeat(queries[:1], -len(queries) % count, axis=0)])
    blocks = filled.reshape(-1, count, queries.shape[1])

    def score(rows: Mapping[str, jax.Array]) -> jax.Array:
        vectors = rows['vectors'].astype(jnp.float32)

        def best(before: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
            return jnp.maximum(before, (vectors @ block.T).max(1)), None

        return jax.lax.scan(best, jnp.full(len(vectors), -jnp.inf), blocks)[0]

    return score


def of_backbone(path: str, num_frames: int, dtype: str) -> Plain:
    """A converted backbone as it is.

    Raises:
      ValueError: it has no text tower, or a number does not fit.
    """
    return Plain(backbones.stored(path), num_frames, dtype)


def of_index(index: Index, backbone: str = '') -> IndexModel:
    """The model that made an index, found where it was, or where the caller says.

    Args:
      index: whose model.
      backbone: folder of the converted backbone, if it has moved.

    Raises:
      ValueError: it is not there, or is another one.
    """
    settings = index.settings
    kind = settings['model'].get('kind')
    if kind != 'backbone':
        raise ValueError(
            f'{index.path}: made with a model of kind {terminal(kind)[:40]!r}, unknown'
        )
    num_frames = settings['preprocessing'].get('num_frames')
    if not isinstance(num_frames, int) or not 1 <= num_frames <= MOST_FRAMES:
        raise ValueError(f'{index.path}: windows of {terminal(num_frames)[:40]} frames')
    place = _place(index, backbone, '--backbone')
    found = of_backbone(place, num_frames, str(settings['model'].get('dtype')))
    _check_same_model(index, found)
    return found


def _place(index: Index, given: str, flag: str) -> str:
    """Where the model lies.

    Raises:
      ValueError: a file names a bucket, which nobody asked for, or nothing is there.
    """
    if given:
        return given
    place = index.places['model']
    if '://' in place or not os.path.isdir(place):
        raise ValueError(
            f'{index.path}: made with the model in {terminal(place)}, which is not a folder here; '
            f'pass {flag}=FOLDER, where it lies now'
        )
    return place


def _check_same_model(index: Index, model: IndexModel) -> None:
    """Raises ValueError, naming what differs, unless a model is the one of an index."""
    now = {'model': model.identity, 'preprocessing': preprocessing(model.views)}
    unlike = differences(index.settings, now)
    if unlike:
        raise ValueError(
            f'{model.place} is not the model that made {index.path}:\n  ' + '\n  '.join(unlike)
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines that name what differs between settings of an index and the groups of `new`."""
    return [
        f'{name}: {terminal(old[part].get(name))[:80]} there, {terminal(value)[:80]} now'
        for part in new
        for name, value in sorted({**dict.fromkeys(old[part]), **new[part]}.items())
        if old[part].get(name) != value
    ]
