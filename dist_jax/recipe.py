"""The data of an experiment: from config.data and config.eval to lists, readers and transforms.

Training, evaluation and prediction all take theirs from here, so they agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from dist_jax.models.layers import Pixels
from dist_jax.paths import MADE, under
from dist_jax.progress import Bar
from dist_jax.tasks import TASKS
from dist_jax.tasks.api import Labels, Task, label_sets
from dist_jax.views import EvalProtocol
from input_pipeline import pipeline, randaugment, transforms
from input_pipeline.class_names import mirror_pairs
from input_pipeline.datasets import DATASETS, DatasetInfo
from input_pipeline.label_sets import LabelSets
from input_pipeline.sources import open_source
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')

EVAL_AHEAD = 4  # batches of an evaluation that are made ahead; they are large


def dataset_info(config: ConfigDict) -> DatasetInfo:
    """The row of the configured data set.

    Raises:
      ValueError: no such data set.
    """
    if config.data.name not in DATASETS:
        raise ValueError(f'data.name={config.data.name!r} is not one of {", ".join(DATASETS)}')
    return DATASETS[config.data.name]


def prepare_builtin_data(config: ConfigDict, workdir: str) -> None:
    """Makes a built-in data set, in `data.root` or the workdir, and fills in its paths."""
    info = dataset_info(config)
    if info.generate is None or config.data.train_list or config.data.val_list:
        return
    root = config.data.root or os.path.join(workdir, 'data')
    if '://' in root:
        raise ValueError(
            f'data.root: a built-in data set is made of files and cannot lie in {root}; pass '
            '--config.data.root=FOLDER, a folder that all hosts see'
        )
    train_list, val_list = (
        os.path.join(root, info.splits[split].names[0]) for split in ('train', 'validation')
    )
    # The folder appears whole or not at all, so a list in it means that all of it is there.
    if jax.process_index() == 0 and not os.path.exists(train_list):
        make_builtin(config.data.name, root)
    if jax.process_count() > 1:
        jax.experimental.multihost_utils.sync_global_devices('built-in data')
    config.data.root = root
    config.data.train_list = train_list
    config.data.val_list = val_list
    config.data.label_map = ','.join(os.path.join(root, name) for name in info.label_files)


def make_builtin(name: str, root: str, **options: int) -> None:
    """Makes a built-in data set in a folder that lacks it, and says how far it is.

    Args:
      name: a key of `DATASETS`.
      root: the folder.
      options: of its `generate`.
    """
    if not os.path.exists(root):
        log.info('making the built-in data set %s in %s, once', name, root)
    with Bar('make', 0) as bar:
        DATASETS[name].generate(
            root, progress=lambda done, total: bar.update(done, total=total), **options
        )


def resolve_paths(config: ConfigDict) -> None:
    """Makes the local paths of a config absolute, so that its run can be used from any folder.

    Names that are found from `data.root` stay as they are: the root may move with all its files.
    """
    data = config.data
    data.root = _absolute(data.root)

    def found(name: str) -> str:
        name = os.path.expanduser(name.strip())
        return name if data.root and not os.path.exists(name) else _absolute(name)

    data.train_list = found(data.train_list)
    data.val_list = found(data.val_list)
    data.label_map = ','.join(map(found, data.label_map.split(',')))
    config.backbone.checkpoint = _absolute(config.backbone.checkpoint)
    for field, value in _full_origin(config).items():
        config[field] = value


def with_full_origin(saved: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint, possibly from before paths were resolved, to be compared.

    `init_from` and its label map say what a run is and are compared; other paths are free.
    """
    return saved | _full_origin(saved)


def _full_origin(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        field: ','.join(_absolute(name.strip()) for name in config[field].split(','))
        for field in ('init_from', 'init_label_map')
        if field in config
    }


def _absolute(path: str) -> str:
    """A local path from the root of the file system; URLs, what is made and '' as they are."""
    if not path or path in MADE or '://' in path:
        return path
    return os.path.abspath(os.path.expanduser(path))


def task_kind(config: ConfigDict) -> type[Task]:
    """What the config learns.

    Raises:
      ValueError: no such task.
    """
    if config.task.name not in TASKS:
        raise ValueError(f'task.name={config.task.name!r} is not one of {", ".join(TASKS)}')
    return TASKS[config.task.name]


def open_split(config: ConfigDict, split: str) -> LabelledSource:
    """The 'train' or 'val' list of the config.

    Raises:
      ValueError: a field is missing or a file is wrong; the message names it.
    """
    info = dataset_info(config)
    path = config.data[f'{split}_list']
    if not path:
        raise ValueError(
            f'data.{split}_list is empty; pass --config.data.{split}_list=FILE (a list of videos, '
            'or a folder of class folders)'
        )
    root, kind = config.data.root, task_kind(config)
    path = under(root, path)
    label_map = [under(root, name) for name in config.data.label_map.split(',')]
    source = open_source(
        path,
        config.data.list_format or 'auto',
        root=root,
        label_map=label_map if len(label_map) > 1 else label_map[0],
        num_classes=info.num_classes,
        subset=config.data[f'{split}_subset'],
        purpose=split,
        usual_format=info.list_format,
        several=label_sets(kind),
    )
    if kind.needs_classes and isinstance(source.labels, LabelSets) and not label_sets(kind):
        raise ValueError(
            f'{path}: its videos have any number of classes, and task.name={config.task.name!r} '
            'wants one of each; pass --config.task.name=multi_label'
        )
    if kind.needs_classes and not source.class_names:
        raise ValueError(
            f'{path}: has captions and no classes: it is for text-video retrieval and cannot be '
            'used for classification'
        )
    if kind.needs_captions and source.class_names:
        raise ValueError(
            f'{path}: has classes and no captions, and task.name={config.task.name!r} matches '
            'videos and sentences; name a list with captions (a CSV "path,caption", say)'
        )
    return source


def list_sha256(source: LabelledSource) -> str:
    """Digest of a list, ids, labels and captions in order: the identity of the training stream."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        record = source[i]
        label = sorted(record.label) if isinstance(record.label, frozenset) else record.label
        identity = [record.video_id, label, record.start, record.end, *record.captions]
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()


def train_reader(
    config: ConfigDict,
    pixels: Pixels = Pixels(),
    labels: Labels = (),
    annotate: pipeline.Annotate | None = None,
) -> pipeline.TrainReader:
    """The training recipe of the config: policy, crop, flip, colours, erasing; one draw for a clip.

    What moves or recolours pixels comes after the crop where that gives the same clips, since there
    are fewer pixels then.

    Args:
      config: of the experiment.
      pixels: of the model, whose mean and deviation fill what is erased.
      labels: class names of each head, which say what labels a mirrored clip swaps; () takes the
        recorded ones of the data set.
      annotate: what else a clip brings, of the task.

    Raises:
      ValueError: naming the fields of config.data that do not fit.
    """
    data, info = config.data, dataset_info(config)
    if data.crop not in CROPS:
        raise ValueError(f'data.crop={data.crop!r} is not one of {", ".join(CROPS)}')
    for name in ('colour_jitter', 'grayscale', 'erase'):
        if not 0 <= data[name] <= 1:
            raise ValueError(f'data.{name}={data[name]} must be a share of the clips, 0 to 1')
    steps, policy = CROPS[data.crop](data), _policy(data)
    steps = [*steps, *policy] if data.augment_after_crop else [*policy, *steps]
    if data.flip and info.flip is not None:
        steps.append(_flip(info, labels))
    if data.colour_jitter:
        steps.append(transforms.ColourJitter(probability=data.colour_jitter))
    if data.grayscale:
        steps.append(transforms.Grayscale(data.grayscale))
    if data.erase:
        with _named('data.erase_mode'):
            steps.append(
                transforms.RandomErasing(
                    data.erase,
                    data.erase_mode,
                    mean=tuple(255 * level for level in pixels.mean),
                    std=tuple(255 * level for level in pixels.std),
                )
            )
    with _named('data.num_frames', 'data.sampling', 'data.frame_interval', 'data.repeats'):
        return pipeline.TrainReader(
            num_frames=data.num_frames,
            image_size=data.image_size,
            sampling=data.sampling or info.sampling,
            interval=data.frame_interval,
            transforms=tuple(steps),
            repeats=data.repeats,
            annotate=annotate,
            jpeg_decoder=data.jpeg_decoder,
        )


def _flip(info: DatasetInfo, class_names: Labels) -> transforms.Flip:
    """Mirroring, with the pairs of labels that these classes swap.

    Raises:
      ValueError: sides are named by one of several heads, which nothing swaps.
    """
    recorded = info.flip.label_pairs
    if all(name.isdigit() for head in class_names for name in head):
        if class_names and recorded:
            log.info(
                'the classes have numbers and no names: mirrored clips swap the labels %s of the '
                'official label map',
                recorded,
            )
        return info.flip
    found = [mirror_pairs(head) for head in class_names]
    if len(found) > 1 and any(found):
        raise ValueError(
            'data.flip: classes name left and right, and with several heads nothing swaps '
            'them in mirrored clips; pass --config.data.flip=false'
        )
    pairs, names = found[0], class_names[0]
    if pairs:
        log.info(
            'mirrored clips swap the labels of: %s',
            '; '.join(f'{names[a]} / {names[b]} ({a}, {b})' for a, b in pairs),
        )
    if recorded and pairs != recorded:
        log.warning('these are not the pairs of the official label map, %s', recorded)
    return dataclasses.replace(info.flip, label_pairs=pairs)


@contextlib.contextmanager
def _named(*fields: str) -> Iterator[None]:
    """Says which fields of the config an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{", ".join(fields)}: {error}') from error


def _policy(data: ConfigDict) -> list[transforms.Transform]:
    if data.rand_augment and data.auto_augment:
        raise ValueError(
            f'data.rand_augment={data.rand_augment!r} and data.auto_augment={data.auto_augment!r} '
            'exclude each other; set one of them to an empty string'
        )
    with _named('data.augment_interpolation', 'data.augment_fill'):
        warp = randaugment.Warp(data.augment_interpolation, tuple(data.augment_fill))
    if data.rand_augment:
        return [randaugment.parse_rand(data.rand_augment, warp)]
    if data.auto_augment:
        return [randaugment.parse_auto(data.auto_augment, warp)]
    return []


def _resize(data: ConfigDict) -> list[transforms.Transform]:
    if not data.resize:
        return []
    with _named('data.resize', 'data.resize_interpolation', 'data.crop_rounding'):
        return [
            transforms.Resize(tuple(data.resize), data.resize_interpolation, data.crop_rounding)
        ]


def _random_resized(data: ConfigDict) -> list[transforms.Transform]:
    with _named('data.crop_area', 'data.crop_aspect', 'data.crop_interpolation'):
        crop = transforms.RandomResizedCrop(
            data.image_size,
            tuple(data.crop_area),
            tuple(data.crop_aspect),
            data.crop_interpolation,
            data.crop_swap,
        )
    return [*_resize(data), crop]


def _multi_scale(data: ConfigDict) -> list[transforms.Transform]:
    with _named('data.crop_scales', 'data.crop_interpolation'):
        crop = transforms.MultiScaleCrop(
            data.image_size, tuple(data.crop_scales), interpolation=data.crop_interpolation
        )
    return [*_resize(data), crop]


def _centre(data: ConfigDict) -> list[transforms.Transform]:
    with _named('data.resize', 'data.resize_interpolation', 'data.crop_rounding'):
        crop = transforms.CentreCrop(
            data.image_size, data.crop_rounding, tuple(data.resize), data.resize_interpolation
        )
    return [crop]


# config.data.crop -> what cuts the training clip.
CROPS: dict[str, Callable[[ConfigDict], list[transforms.Transform]]] = {
    'random_resized': _random_resized,
    'multi_scale': _multi_scale,
    'centre': _centre,
}


def eval_reader(
    config: ConfigDict, annotate: pipeline.Annotate | None = None
) -> pipeline.EvalReader:
    """The test protocol of the config; `annotate` as for `train_reader`.

    Raises:
      ValueError: naming the fields of config.data and config.eval that do not fit.
    """
    data, test = config.data, config.eval
    with _named('config.eval and config.data'):
        return pipeline.EvalReader(
            num_frames=data.num_frames,
            image_size=test.image_size or data.image_size,
            sampling=data.sampling or dataset_info(config).sampling,
            interval=data.frame_interval,
            num_clips=test.num_clips,
            num_crops=test.num_crops,
            size=tuple(test.resize),
            rounding=data.crop_rounding,
            interpolation=data.resize_interpolation,
            layout=test.crop_layout,
            annotate=annotate,
            jpeg_decoder=data.jpeg_decoder,
        )


def readers(config: ConfigDict) -> pipeline.Readers:
    """Who reads the training list."""
    data = config.data
    return pipeline.Readers(
        data.num_threads, data.num_workers, data.buffer_size, data.record_timeout
    )


def eval_protocol(
    config: ConfigDict,
    annotate: pipeline.Annotate | None = None,
    max_bad_share: float = 0.0,
) -> EvalProtocol:
    """How a list is tested: any number of unreadable videos with `eval.allow_bad_videos`.

    Args:
      config: of the experiment.
      annotate: what else a clip brings, of the task.
      max_bad_share: share of the list that may be unreadable otherwise.
    """
    return EvalProtocol(
        eval_reader(config, annotate),
        config.eval.batch_size,
        dataclasses.replace(readers(config), buffer_size=EVAL_AHEAD),
        1.0 if config.eval.allow_bad_videos else max_bad_share,
    )
