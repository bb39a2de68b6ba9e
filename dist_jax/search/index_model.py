"""What an index is made with and searched with: one model, its clips on one side, words on another.

A side is loaded when it is asked for: a sentence needs no image tower.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dist_jax import backbones, checkpoint, experiment, recipe, shipped, step, trained
from dist_jax.embedding.embedder import Embedder, Embedding, clip_embedding
from dist_jax.embedding.runner import differences
from dist_jax.models import converted, plain
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import TEXT, ClassTexts
from dist_jax.models.layers import exact_float32
from dist_jax.search.index_file import Index
from dist_jax.sharding import batch_parts, local_rows, make_mesh, to_global
from dist_jax.similarity import Texts, Videos, similarity, unit
from input_pipeline.captions import token_rows
from input_pipeline.escape import terminal
from input_pipeline.pipeline import EvalReader
from input_pipeline.tokenizer import tokenize_counted

log = logging.getLogger('dist_jax')

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
# Parameters of a retrieval network that sentences need, and some small ones that come with them.
TEXT_SIDE = ('text', 'visual', 'logit_scale', 'text_weight', 'video_weight')
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
        parts = (plain.VARIABLES, frozen)
        run = step.make_eval_step(model, Embedding(mean_of_frames), mesh, *parts)
        return Embedder(run, *parts, mesh, batch_size)

    def score_of_sentence(self, sentence: str) -> Score:
        params = converted.load_params(self.backbone.path, ['text'])
        length = self.backbone.spec.context_length
        tokens, counts = tokenize_counted([sentence], length, truncate=True)
        if counts.max() > length:
            _say_cut(length)
        kind, spec = self.backbone.kind, self.backbone.spec
        # Weights as an argument: as constants of the program they would be compiled, too.
        embed = jax.jit(exact_float32(lambda text, rows: unit(kind.encode_text(text, rows, spec))))
        return score_by_vectors(embed(params['text'], tokens))

    def score_of_rows(self, rows: Mapping[str, np.ndarray]) -> Score:
        return score_by_vectors(jnp.asarray(rows['vectors']))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of text-video retrieval.

    Attributes:
      config: the run's, possibly with other paths.
      workdir: of the run.
      folder: of one step in it.
    """

    config: ConfigDict
    workdir: str
    folder: epath.Path

    def __post_init__(self) -> None:
        task = self.config.task.name
        if task != 'retrieve':
            raise ValueError(
                f'{self.workdir} has task.name={task!r}, and only task.name=retrieve brings '
                'sentences and videos together (--config=side4video_retrieval:ROW); pass such a '
                'run, or --backbone=FOLDER for CLIP as it is'
            )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        task = self.config.task
        return trained.identity(self.config, self.folder) | {
            'interaction': task.interaction,
            'masked': task.masked,
            'num_words': task.num_words,
        }

    @property
    def place(self) -> str:
        return str(converted.absolute_path(self.workdir))

    @property
    def views(self) -> EvalReader:
        """As the run's evaluation, one view."""
        return dataclasses.replace(recipe.eval_reader(self.config), num_clips=1, num_crops=1)

    @functools.cached_property
    def _metadata(self) -> dict[str, Any]:
        return checkpoint.read_metadata(self.folder)

    @property
    def _weighted(self) -> bool:
        return self.config.task.interaction == EACH

    def embedder(self, batch_size: int) -> Embedder:
        found = trained.load_trained(self.config, self.workdir, int(self.folder.name))
        reading = weighted_frames if self._weighted else mean_of_frames
        mesh = make_mesh(**self.config.mesh)
        parts = (found.variables, found.frozen)
        run = step.make_eval_step(found.model, Embedding(reading), mesh, *parts)
        return Embedder(run, *parts, mesh, batch_size)

    def score_of_sentence(self, sentence: str) -> Score:
        config, mesh = self.config, make_mesh(**self.config.mesh)
        labels = tuple(map(tuple, self._metadata['class_names']))
        backbone = experiment.find_backbone(config, self.workdir)
        parts = experiment.assemble(config, labels, backbone)
        stored = checkpoint.stored_variables(self.folder)['params']
        abstract = {'params': {name: stored[name] for name in TEXT_SIDE if name in stored}}
        placed = step.place_variables(parts.test_model, abstract, mesh)
        variables = checkpoint.read_variables(self.folder, placed, config.checkpoint.verify)
        rows, num_cut = token_rows([sentence], config.task.num_words)
        if num_cut:
            _say_cut(config.task.num_words)
        # A batch has at least one row for each of its parts.
        batch = {name: np.repeat(row, batch_parts(mesh), axis=0) for name, row in rows.items()}
        embed = step.make_query_step(parts.test_model, parts.task, mesh, variables, {})
        found = local_rows(embed(variables, {}, to_global(batch, mesh)))
        texts = Texts(
            words=found['words'][:1],
            mask=rows['word_mask'],
            logits=found['word_logits'][:1],
            pooled=found['pooled'][:1],
        )
        return self._score(jax.tree.map(jnp.asarray, texts))

    def score_of_rows(self, rows: Mapping[str, np.ndarray]) -> Score:
        """Frames of the other video take the place of words."""
        vectors = jnp.asarray(rows['vectors'])
        if not self._weighted:
            return score_by_vectors(vectors)
        weights = jnp.asarray(rows['weights'])
        mask = jnp.ones_like(weights)
        return self._score(Texts(vectors, mask, _logits(weights), vectors.mean(1)))

    def _score(self, texts: Texts) -> Score:
        if not self._weighted:
            return score_by_vectors(unit(texts.pooled))

        def score(rows: Mapping[str, jax.Array]) -> jax.Array:
            weights = rows['weights']
            frames = rows['vectors'].astype(jnp.float32)
            videos = Videos(frames, jnp.ones_like(weights), _logits(weights))
            return similarity(texts, videos, EACH, self.config.task.masked).max(0)

        return score


def _logits(weights: jax.Array) -> jax.Array:
    """Of which these shares are the softmax."""
    return jnp.log(jnp.maximum(weights, 1e-30))


def mean_of_frames(outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`frames` (B, T, E) -> `vectors` (B, E) float32 of unit length."""
    return {'vectors': clip_embedding(outputs)['clip']}


def weighted_frames(outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`vectors` (B, T, E), frames of unit length, and their `weights` (B, T); float32."""
    return {
        'vectors': unit(outputs['frames'].astype(jnp.float32)),
        'weights': jax.nn.softmax(outputs['frame_logits']),
    }


def _say_cut(num_words: int) -> None:
    log.warning('the sentence is cut: the model reads %d tokens, start and end counted', num_words)


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
    """A converted backbone as it is; 'tiny_clip' is the one of the package.

    Raises:
      ValueError: it has no text tower, or a number does not fit.
    """
    return Plain(backbones.stored(shipped.folder_of(path)), num_frames, dtype)


def of_run(config: ConfigDict, workdir: str, step_number: int | str | None) -> Trained:
    """A run of text-video retrieval.

    Args:
      config: the run's, possibly with other paths.
      workdir: of the run.
      step_number: of the checkpoint, or 'best'; None for the newest.

    Raises:
      ValueError: a run that learned something else.
    """
    return Trained(config, workdir, checkpoint.find_checkpoint(workdir, step_number))


def of_index(index: Index, workdir: str = '', backbone: str = '') -> IndexModel:
    """The model that made an index, found where it was, or where the caller says.

    Args:
      index: whose model.
      workdir: of the run, if it has moved.
      backbone: folder of the converted backbone, if that has moved.

    Raises:
      ValueError: it is not there, or is another one.
    """
    model = index.settings['model']
    kind = model.get('kind')
    if kind == 'backbone':
        found = _plain_of(index, backbone)
    elif kind == 'run':
        found = _trained_of(index, workdir, backbone)
    else:
        raise ValueError(f'{index.path}: made with a model of unknown kind {terminal(kind)[:40]}')
    now = {'model': found.identity, 'preprocessing': preprocessing(found.views)}
    unlike = differences(index.settings, now)
    if unlike:
        raise ValueError(
            f'{found.place} is not the model that made {index.path}:\n  ' + '\n  '.join(unlike)
        )
    return found


def _plain_of(index: Index, backbone: str) -> Plain:
    num_frames = index.settings['preprocessing'].get('num_frames')
    if not isinstance(num_frames, int) or not 1 <= num_frames <= MOST_FRAMES:
        raise ValueError(f'{index.path}: windows of {terminal(num_frames)[:40]} frames')
    dtype = str(index.settings['model'].get('dtype'))
    return of_backbone(_place(index, backbone, '--backbone'), num_frames, dtype)


def _trained_of(index: Index, workdir: str, backbone: str) -> Trained:
    number = index.settings['model'].get('step')
    if not isinstance(number, int) or number < 0:
        raise ValueError(f'{index.path}: made at step {terminal(number)[:40]}')
    workdir = _place(index, workdir, '--workdir')
    config = trained.saved_config(workdir, number)
    if backbone:
        config = config.copy_and_resolve_references()
        config.backbone.checkpoint = backbone
    return of_run(config, workdir, number)


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
