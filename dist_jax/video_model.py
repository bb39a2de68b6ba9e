"""A trained model in Python: paths or numpy arrays in, numpy arrays out.

The views, their average and the compiled steps are those of the evaluation: a video gets the scores
here that it gets there. `dist_jax predict` is made of this.

A *video* is the path of a file, or all its frames in order, (N, H, W, 3) uint8 RGB of any size and
number. Whatever the run samples and crops of a file it samples and crops of them. Frames that are
as many as a clip has (`num_frames`) are the clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import numbers
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dist_jax import attention_map, experiment, metrics, paths, recipe, step
from dist_jax.config_arguments import FIELDS, no_field, read_config
from dist_jax.configs import base
from dist_jax.embedding.embedder import Done, Embedder, Embedding, Row, clip_embedding
from dist_jax.hub import client as hub
from dist_jax.long_videos import track as over_time
from dist_jax.models import converted
from dist_jax.models.api import Tree
from dist_jax.models.frozen import ClassTexts
from dist_jax.models.layers import exact_float32
from dist_jax.sharding import batch_parts, batched, make_mesh
from dist_jax.tasks.api import Labels, neutral_text
from dist_jax.tasks.classifier import Classifier
from dist_jax.times import clock
from dist_jax.trained import (
    Trained,
    backbone_config,
    load_backbone,
    load_trained,
    saved_config,
)
from dist_jax.views import ViewStep
from input_pipeline.decode import DecodeError
from input_pipeline.machine import num_cpus
from input_pipeline.sampling import REFERENCE_FPS
from input_pipeline.video_list import Record
from input_pipeline.windows import Window, WindowReader

Video = str | os.PathLike[str] | np.ndarray
Ranking = tuple[tuple[str, float], ...]  # (class name, probability), best first

WINDOWS_AT_ONCE = 8  # of a step, or more where there are more devices
MOST_VIDEOS_AT_ONCE = 4  # that are read, where windows of many are asked for


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says about one video.

    Attributes:
      path: of the video; '' for frames.
      top: the most probable classes of each head; empty after an error.
      scores: (num_classes,) probabilities of each head; likewise.
      video: (V, T, H, W, 3) uint8 RGB, the views as the model got them; None likewise.
      attention: (V, t, g, g) float32, see `Model.attention`; None if it was not asked for, and
        likewise.
      error: '' or why there is no prediction: the video cannot be read, or the model's scores are
        NaN or infinite.
    """

    path: str
    top: tuple[Ranking, ...] = ()
    scores: tuple[np.ndarray, ...] = ()
    video: np.ndarray | None = None
    attention: np.ndarray | None = None
    error: str = ''

    def summary(self) -> dict[str, Any]:
        """JSON values: path, error, and `top` as lists of {label, probability}."""
        return {
            'path': self.path,
            'error': self.error,
            'top': [
                [{'label': name, 'probability': share} for name, share in ranking]
                for ranking in self.top
            ],
        }


class WindowPrediction(NamedTuple):
    """What a model says about a part of a video.

    Attributes:
      start: seconds.
      end: seconds.
      top: the most probable classes of each head.
      scores: (num_classes,) float32 probabilities of each head.
    """

    start: float
    end: float
    top: tuple[Ranking, ...]
    scores: tuple[np.ndarray, ...]


# Sees a window when it is read: the number of its video, and the window.
Seen = Callable[[int, Window], None]


@dataclasses.dataclass(frozen=True)
class _Watched(WindowReader):
    """Shows its windows to someone; labels of records are numbers of videos."""

    seen: Seen = lambda number, window: None

    def read(self, record: Record) -> Iterator[Window]:
        for window in super().read(record):
            self.seen(record.label, window)
            yield window


class VideoModel:
    """A model with its weights, as `load` makes it.

    Steps are compiled when they are first used, for each number of videos at once.

    Attributes:
      config: of its run; `eval` holds the views and the fusion with the frozen backbone.
      trained: the parts that it is made of.
      reader: makes the views of a video.
    """

    def __init__(self, trained: Trained, config: ConfigDict):
        """Makes it of a model that `load_trained` read, and of the config of its run."""
        self.config, self.trained = config, trained
        self.reader = recipe.eval_reader(config)
        self._mesh = make_mesh(**config.mesh)
        self._other: tuple[tuple[str, ...], VideoModel] | None = None
        self._of_windows: Embedder | None = None

    def __repr__(self) -> str:
        classes = ', '.join(f'{len(names)} classes' for names in self.labels) or 'no classes'
        views = f'{self.reader.num_views} views' if self.reader.num_views > 1 else 'one view'
        return (
            f'VideoModel({self.config.model.family}, {classes}, {views} of {self.num_frames} '
            f'frames of {self.image_size} x {self.image_size})'
        )

    @property
    def labels(self) -> Labels:
        """Class names of each head; () where there are none."""
        return () if self.trained.task is None else self.trained.task.labels

    @property
    def num_frames(self) -> int:
        """Frames of a clip, T."""
        return self.reader.num_frames

    @property
    def image_size(self) -> int:
        """Height and width of a clip in pixels."""
        return self.reader.image_size

    @property
    def variables(self) -> Tree:
        """`network`, what is trained, and `frozen`, the backbone's, as `apply` takes them."""
        return {'network': self.trained.variables, 'frozen': self.trained.frozen}

    def apply(self, variables: Tree, clips: jax.Array) -> Tree:
        """The network as a pure function, for `jax.jit`, `jax.grad` and others.

        Args:
          variables: as `self.variables`.
          clips: (B, T, H, W, 3), T `num_frames`, H and W `image_size`; pixels 0 to 255, uint8 or
            float.

        Returns:
          The outputs of the family: of a classifier `logits`, a tuple of float32 (B, num_classes),
          and `embedding` (B, E).
        """

        def outputs(variables: Tree, clips: jax.Array) -> Tree:
            model = self.trained.model
            inputs = model.inputs(variables['frozen'], {'video': model.normalize(clips)})
            return model.net.apply(variables['network'], inputs)

        return exact_float32(outputs)(variables, clips)

    def views(self, video: Video, fps: float = REFERENCE_FPS) -> np.ndarray:
        """What the model sees of a video: (V, T, H, W, 3) uint8 RGB.

        Args:
          video: see the module.
          fps: of frames; files know theirs.

        Raises:
          DecodeError: the file cannot be read.
          ValueError: frames of another shape or dtype.
        """
        if isinstance(video, (str, os.PathLike)):
            return self.reader.read(Record(os.fspath(video), 0, os.fspath(video)))[0]
        return self.reader.views_of(video, fps)

    def predict(
        self, video: Video, most: int = 5, *, attention: bool = False, fps: float = REFERENCE_FPS
    ) -> Prediction:
        """The most probable classes of a video.

        Args:
          video: see the module.
          most: classes in a ranking.
          attention: also say where the model's query looked; another pass over the video.
          fps: see `views`.

        Raises:
          DecodeError: the file cannot be read.
          FloatingPointError: the model's scores are NaN or infinite.
          ValueError: something else than a classifier, fusion without text features, or attention
            of a model in which no query looks at patches.
        """
        self._check(attention, most)
        path = os.fspath(video) if isinstance(video, (str, os.PathLike)) else ''
        return self._predicted(path, self.views(video, fps), most, attention)

    def predict_all(
        self,
        videos: Sequence[str | os.PathLike[str]],
        most: int = 5,
        *,
        attention: bool = False,
    ) -> Iterator[Prediction]:
        """Predicts files one after the other.

        Args:
          videos: paths.
          most: classes in a ranking.
          attention: see `predict`.

        Yields:
          One prediction a path, in order. A video that cannot be read, or whose scores are no
          numbers, gets one with an error.

        Raises:
          ValueError: as `predict`, at once.
        """
        self._check(attention, most)
        return self._predictions([os.fspath(path) for path in videos], most, attention)

    def predict_windows(
        self,
        path: str | os.PathLike[str],
        window: float = 2.0,
        stride: float | None = None,
        most: int = 5,
        *,
        smooth: int = 1,
        batch_size: int | None = None,
    ) -> Iterator[WindowPrediction]:
        """What is said of a long video from window to window.

        Every frame is decoded once, and memory does not grow with the length of the video. A window
        is one view: of the run's test views, `eval.num_clips` and `eval.num_crops` do not count.

        Args:
          path: a video file, or a folder of frames.
          window: seconds. All windows have this length, the last one being moved back to end with
            the video; a video that is shorter is one window.
          stride: seconds from one start to the next; half a window by default.
          most: classes in a ranking.
          smooth: windows, an odd number: scores are the mean of so many around each.
          batch_size: windows of a step, a multiple of the devices; 8 by default, or as many more as
            these need.

        Yields:
          A prediction a window, in order of time.

        Raises:
          DecodeError: the file cannot be read, possibly after some of its windows came out.
          FloatingPointError: scores of a window are NaN or infinite, likewise.
          ValueError: something else than a classifier, a window or a stride that is none, at once.
        """
        videos = self.predict_windows_all(
            [path], window, stride, most, smooth=smooth, batch_size=batch_size
        )

        def predictions() -> Iterator[WindowPrediction]:
            with contextlib.closing(videos):
                yield from next(videos)

        return predictions()

    def predict_windows_all(
        self,
        paths: Sequence[str | os.PathLike[str]],
        window: float = 2.0,
        stride: float | None = None,
        most: int = 5,
        *,
        smooth: int = 1,
        batch_size: int | None = None,
        seen: Seen | None = None,
    ) -> Iterator[Iterator[WindowPrediction]]:
        """`predict_windows` of several videos, whose windows share the steps.

        Args:
          paths: video files.
          window, stride, most, smooth, batch_size: see `predict_windows`.
          seen: called with each window when it is read, before it is predicted, in threads.

        Yields:
          What `predict_windows` yields of each video, in order; each is to be used up before the
          next. Of a video that cannot be read it raises DecodeError, and of scores that are no
          numbers FloatingPointError; the next one comes nonetheless.

        Raises:
          ValueError: as `predict_windows`, at once.
        """
        self._check(most=most)
        over_time.check_smooth(smooth)
        if not window > 0:
            raise ValueError(f'window={window} must be more than 0 seconds')
        one_view = dataclasses.replace(self.reader, num_clips=1, num_crops=1)
        stride = window / 2 if stride is None else stride
        reader = WindowReader(one_view, window, stride)
        if seen is not None:
            reader = _Watched(one_view, window, stride, seen)
        embedder = self._embedder(batch_size)
        return self._windows([os.fspath(path) for path in paths], embedder, reader, most, smooth)

    def score(
        self,
        video: Video,
        labels: Sequence[str] | None = None,
        *,
        fps: float = REFERENCE_FPS,
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        """Probabilities of all classes; those of a multi-label model need not add up to 1.

        Args:
          video: see the module; or clips (B, N, H, W, 3), B videos of frames.
          labels: other classes, as text; of a text head only. Those of the last call are kept.
          fps: see `views`.

        Returns:
          Float32 (num_classes,), or (B, num_classes); a tuple of them where there are several
          heads.

        Raises:
          DecodeError, FloatingPointError, ValueError: as `predict`.
        """
        if labels is not None:
            names = _names(labels)
            if self._other is None or self._other[0] != names:
                self._other = names, self.with_labels(names)
            return self._other[1].score(video, fps=fps)
        self._check()
        scores = self._run(self._score_step, video, fps)['scores']
        metrics.check_finite(scores)
        own = tuple(head if _many(video) else head[0] for head in scores)
        return own if len(own) > 1 else own[0]

    def embed(self, video: Video, *, fps: float = REFERENCE_FPS) -> np.ndarray:
        """What the head reads of a video: one vector, the mean over its views.

        As it is, not of unit length. A view of a backbone alone or of a model of retrieval is the
        mean of its frames, of unit length.

        Args:
          video: as `score`.
          fps: see `views`.

        Returns:
          Float32 (E,), or (B, E).

        Raises:
          DecodeError: the file cannot be read.
          FloatingPointError: it is NaN or infinite.
          ValueError: frames of another shape or dtype.
        """
        found = self._run(self._embed_step, video, fps)['clip']
        if not np.isfinite(found).all():
            raise FloatingPointError(f'the embedding is not finite. {metrics.CAUSE}')
        return found if _many(video) else found[0]

    def with_labels(self, labels: Sequence[str]) -> VideoModel:
        """The same model, sharing all weights, that tells other classes apart.

        Args:
          labels: the classes, as text.

        Raises:
          ValueError: its head is not a text head, or these are no class names.
        """
        names, frozen, data = (_names(labels),), self.trained.model.frozen, self.config.data
        if frozen is None or not frozen.reads_classes or self.trained.task is None:
            raise ValueError(
                f'only model.head=text can take other classes; this is {self!r}. A backbone takes '
                'them from the start: dist_jax.load(FOLDER, labels=[...])'
            )
        task = experiment.make_task(self.config, names)
        texts = ClassTexts(names, data.split_names, data.truncate_texts, neutral_text(task))
        verify = self.config.checkpoint.verify
        tree = frozen.with_texts(self.trained.frozen, self._mesh, texts, verify=verify)
        return VideoModel(dataclasses.replace(self.trained, task=task, frozen=tree), self.config)

    @property
    def _placed(self) -> tuple[Tree, Tree]:
        return self.trained.variables, self.trained.frozen

    @functools.cached_property
    def _score_step(self) -> ViewStep:
        model, task = self.trained.model, self.trained.task
        return step.make_eval_step(model, task, self._mesh, *self._placed)

    @functools.cached_property
    def _embed_step(self) -> ViewStep:
        return step.make_eval_step(
            self.trained.model, Embedding(clip_embedding), self._mesh, *self._placed
        )

    @functools.cached_property
    def _attention_step(self) -> Callable[[Tree, Tree, Tree], jax.Array]:
        return attention_map.make_attention_step(self.trained.model, self._mesh, *self._placed)

    def _embedder(self, batch_size: int | None) -> Embedder:
        """What scores windows; of the last size that was asked for it is compiled."""
        if batch_size is None:
            parts = batch_parts(self._mesh)
            batch_size = -(-WINDOWS_AT_ONCE // parts) * parts
        if self._of_windows is None or self._of_windows.batch_size != batch_size:
            self._of_windows = Embedder(self._head_scores, *self._placed, self._mesh, batch_size)
        return self._of_windows

    def _head_scores(self, variables: Tree, frozen: Tree, batch: Tree) -> dict[str, jax.Array]:
        """The scores of a head by its number, as a name."""
        scores = self._score_step(variables, frozen, batch)['scores']
        return {str(number): head for number, head in enumerate(scores)}

    def _windows(
        self,
        paths: Sequence[str],
        embedder: Embedder,
        reader: WindowReader,
        most: int,
        smooth: int,
    ) -> Iterator[Iterator[WindowPrediction]]:
        records = (Record(path, number, path) for number, path in enumerate(paths))
        threads = max(1, min(num_cpus(), len(paths), MOST_VIDEOS_AT_ONCE))
        with contextlib.closing(embedder.embed(records, reader, num_threads=threads)) as items:
            for number, own in itertools.groupby(items, operator.itemgetter(0)):
                yield self._windows_of(paths[number], (item for _, item in own), most, smooth)

    def _windows_of(
        self, path: str, items: Iterator[Row | Done], most: int, smooth: int
    ) -> Iterator[WindowPrediction]:
        error = ''

        def scored() -> Iterator[over_time.Scored]:
            nonlocal error
            for item in items:
                if isinstance(item, Done):
                    error = item.error
                    return
                scores = tuple(item.values[str(i)] for i in range(len(self.labels)))
                name = f'{path}, from {clock(item.start)} to {clock(item.end)}'
                rows = [head[None] for head in scores]
                metrics.check_finite(rows, lambda _, name=name: name, 'windows')
                yield item.start, item.end, scores

        for start, end, scores in over_time.smoothed(scored(), smooth):
            yield WindowPrediction(start, end, _rankings(self.labels, scores, most), scores)
        if error:
            kind, _, reason = error.partition(': ')
            raise DecodeError(path, kind, reason)

    def _check(self, attention: bool = False, most: int = 1) -> None:
        """Raises ValueError if it is no classifier, or has not what is asked for."""
        if not isinstance(most, numbers.Integral) or most < 1:
            raise ValueError(f'most={most!r} must be a whole number of classes, at least 1')
        task = self.trained.task
        if task is None:
            raise ValueError(
                'a backbone alone has no classes: dist_jax.load(FOLDER, labels=[...]) gives it '
                'some; `embed` needs none'
            )
        if not isinstance(task, Classifier):
            raise ValueError(
                f'classes are what classifiers tell, and task.name={self.config.task.name!r} is '
                'none of them; `dist_jax evaluate` judges such runs'
            )
        if attention and self.trained.model.attention is None:
            raise ValueError(
                f'model.family={self.config.model.family!r} with the options of this run has no '
                'query that looks at patches, so there is no attention to show: predict without '
                '--attention, or take a run of a model that pools by attention'
            )

    def _run(self, run: ViewStep, video: Video, fps: float) -> Tree:
        """A step on one video, or on many: numpy arrays, axis 0 being videos."""
        videos = list(video) if _many(video) else [video]
        if not videos:
            raise ValueError('clips of shape (0, ...): there is no video')
        views = np.stack([self.views(each, fps) for each in videos])
        found = run(*self._placed, self._batch(views))
        return jax.tree.map(lambda rows: np.asarray(rows)[: len(views)], found)

    def _batch(self, views: np.ndarray) -> dict[str, jax.Array]:
        """(B, V, T, H, W, 3) on the devices, with as many rows of zeros as they need more."""
        parts = batch_parts(self._mesh)
        filled = np.zeros((-(-len(views) // parts) * parts, *views.shape[1:]), np.uint8)
        filled[: len(views)] = views
        rows = filled.reshape(*filled.shape[:-2], -1)  # as `sharding.to_global` has them
        return {'video': jax.device_put(rows, batched(self._mesh))}

    def _predictions(
        self, names: Sequence[str], most: int, attention: bool
    ) -> Iterator[Prediction]:
        for path in names:
            try:
                yield self._predicted(path, self.views(path), most, attention)
            except DecodeError as error:
                yield Prediction(path, error=f'cannot be read: {error.kind}: {error.reason}')
            except metrics.NonFiniteScoresError:
                yield Prediction(path, error=f'scores are not finite numbers. {metrics.CAUSE}')

    def _predicted(self, path: str, views: np.ndarray, most: int, attention: bool) -> Prediction:
        batch = self._batch(views[None])
        found = self._score_step(*self._placed, batch)
        scores = tuple(np.asarray(head)[0] for head in found['scores'])
        metrics.check_finite([head[None] for head in scores], lambda _: path or 'the frames')
        top = _rankings(self.labels, scores, most)
        maps = None
        if attention:
            maps = np.asarray(self._attention_step(*self._placed, batch))[0]
        return Prediction(path, top, scores, views, maps)


def load(
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    step: int | str | None = None,
    config: ConfigDict | str | None = None,
    backbone: str | os.PathLike[str] = '',
    overrides: Mapping[str, Any] | None = None,
) -> VideoModel:
    """Reads a model and its weights.

    Args:
      path: a run's folder; a release of one, here or on the Hugging Face Hub ('hf://owner/name',
        'hf://owner/name@revision'); a checkpoint that `dist_jax convert` made of a trained
        network, with `config`; or a converted backbone ('tiny_clip' for the one of the package),
        which embeds as it is, and with `labels` tells classes by their texts (zero-shot).
      labels: class names. Of a run those that it was trained on, unless a text head is to tell
        others apart; of a converted network those that its authors trained it on, in their order.
      step: of a run's checkpoint, or 'best'; None for the newest.
      config: of a converted network, by name ('dist:b16_8+16f_k400') or as it is.
      backbone: where the converted backbone lies, if it has moved or the config does not say.
      overrides: fields of the config by name, {'eval.num_clips': 4}; files of data are not read.

    Raises:
      ValueError: nothing to read there, parts that do not fit, or no such field.
      ConnectionError: the Hub cannot be reached, and this was not fetched before.
    """
    path = os.fspath(path)
    names = None if labels is None else (_names(labels),)
    if path.startswith(paths.HUB):
        path = os.fspath(hub.fetch_release(path, with_backbone=not backbone).path)
    if paths.is_release(path) or (converted.absolute_path(path) / paths.CHECKPOINTS).exists():
        if config is not None:
            raise ValueError(f'{path} is of a run and has its own config; change it with overrides')
        found = _changed(saved_config(path, step), backbone, overrides)
        return VideoModel(load_trained(found, path, step, names), found)
    if step is not None:
        raise ValueError(f'{path} is no run, and only runs have steps')
    if config is None:
        is_backbone = path == paths.SHIPPED or converted.is_there(path)
        near = '' if is_backbone else paths.runs_near(path)
        if near:
            raise ValueError(f'{path} is neither a run nor a backbone; did you mean {near}?')
        return _of_backbone(path, names, overrides)
    if isinstance(config, str):
        config = read_config([f'--config={config}'])
    if names is None:
        raise ValueError(f'{path} is no run, so nothing says what its classes are: pass labels')
    found = _changed(config, backbone, {**(overrides or {}), 'init_from': path})
    return VideoModel(load_trained(found, '', None, names), found)


def _of_backbone(
    path: str, names: Labels | None, overrides: Mapping[str, Any] | None
) -> VideoModel:
    """A converted backbone as it is.

    Raises:
      ValueError: it is something else.
    """
    config = _changed(backbone_config(path), '', overrides)
    found = load_backbone(config) if names is None else load_trained(config, '', None, names)
    return VideoModel(found, config)


def _changed(
    config: ConfigDict, backbone: str | os.PathLike[str], fields: Mapping[str, Any] | None
) -> ConfigDict:
    """A copy of a config with other fields, locked.

    Raises:
      ValueError: no such field, or a value of another type.
    """
    fields = dict(fields or {}) | ({'backbone.checkpoint': os.fspath(backbone)} if backbone else {})
    found = config.copy_and_resolve_references()
    known = base.flat(found)
    for name, value in fields.items():
        if name not in known:
            raise ValueError(no_field(str(name), known))
        try:
            found.update_from_flattened_dict({name: value})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{name}={value!r}: {error} {FIELDS}') from None
    return found.lock()


def _names(labels: Sequence[str]) -> tuple[str, ...]:
    """Class names, checked.

    Raises:
      ValueError: none, one text where a list belongs, something else than text, or one twice.
    """
    if isinstance(labels, str):
        raise ValueError(f'labels={labels!r} is one text; pass a list of them')
    names = tuple(labels)
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong or not names:
        raise ValueError(f'labels are texts, at least one; there is {(wrong or [names])[0]!r}')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'labels name {twice[0]!r} twice')
    return names


def _rankings(labels: Labels, scores: Sequence[np.ndarray], most: int) -> tuple[Ranking, ...]:
    """The most probable classes of each head."""
    return tuple(
        tuple((names[i], float(head[i])) for i in np.argsort(-head, kind='stable')[:most])
        for names, head in zip(labels, scores)
    )


def _many(video: Video) -> bool:
    """Whether it is several videos."""
    return not isinstance(video, (str, os.PathLike)) and np.ndim(video) == 5
