"""From a config to the parts of an experiment: sources, readers, backbone, model.

Training, evaluation and prediction all build their parts here, so they agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from dist_jax.models import FAMILIES, clip, clip_params, converted, layers
from dist_jax.models.api import Tree, VideoModel
from dist_jax.paths import under
from dist_jax.sharding import (
    FSDP,
    TENSOR,
    check_batch_size,
    check_replicated_share,
    check_samples,
    on_mesh,
    place,
    replicated,
    shardings,
)
from input_pipeline import pipeline, randaugment, transforms
from input_pipeline.class_names import as_words, mirror_pairs
from input_pipeline.datasets import DATASETS, DatasetInfo
from input_pipeline.sources import open_source
from input_pipeline.tokenizer import tokenize
from input_pipeline.video_list import LabelledSource

log = logging.getLogger('dist_jax')

RANDOM = 'random'
MOST_NAMED = 10  # classes in a warning
EVAL_AHEAD = 4  # batches of an evaluation that are made ahead
DTYPES = {'bfloat16': jnp.bfloat16, 'float32': jnp.float32}

ClassNames = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen backbone that was found on disk.

    Attributes:
      spec: geometry, at the image size of the experiment.
      path: of the converted checkpoint.
      name: as it was converted.
      params_sha256: of its weights.
    """

    spec: clip.ClipSpec
    path: str
    name: str
    params_sha256: str

    def summary(self) -> dict[str, str]:
        """What a checkpoint says about its backbone."""
        return {'name': self.name, 'path': self.path, 'params_sha256': self.params_sha256}


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
            f'data.root: the built-in clips are video files and cannot lie in {root}; pass '
            '--config.data.root=FOLDER, a folder that all hosts see'
        )
    # The folder appears whole or not at all, so a list in it means that all of it is there.
    if jax.process_index() == 0 and not os.path.exists(os.path.join(root, 'train.txt')):
        log.info('making the built-in data set %s in %s', config.data.name, root)
        info.generate(root)
    if jax.process_count() > 1:
        jax.experimental.multihost_utils.sync_global_devices('built-in data')
    config.data.root = root
    config.data.train_list = os.path.join(root, 'train.txt')
    config.data.val_list = os.path.join(root, 'val.txt')
    config.data.label_map = os.path.join(root, 'labels.txt')


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
    """A local path from the root of the file system; URLs, 'random' and '' as they are."""
    if not path or path == RANDOM or '://' in path:
        return path
    return os.path.abspath(os.path.expanduser(path))


def open_split(config: ConfigDict, split: str, needs_classes: bool = True) -> LabelledSource:
    """The 'train' or 'val' list of the config.

    Args:
      config: of the experiment.
      split: 'train' or 'val'.
      needs_classes: refuse lists of captions.

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
    root = config.data.root
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
    )
    if needs_classes and not source.class_names:
        raise ValueError(
            f'{path}: has captions and no classes: it is for text-video retrieval and cannot be '
            'used for classification'
        )
    return source


def class_columns(source: LabelledSource) -> ClassNames:
    """Class names of every label column."""
    names = source.class_names
    return names if names and isinstance(names[0], tuple) else (tuple(names),)


def warn_of_classes(source: LabelledSource, field: str) -> None:
    """Warns of a list with nothing to tell apart, and of classes that no video belongs to."""
    if jax.process_index() != 0:
        return
    for names, column in zip(class_columns(source), source.labels.reshape(len(source), -1).T):
        if len(names) == 1:
            log.warning('%s has one class, %r: there is nothing to tell apart', field, names[0])
        empty = np.flatnonzero(np.bincount(column, minlength=len(names)) == 0)
        if len(empty):
            named = ', '.join(repr(names[k]) for k in empty[:MOST_NAMED])
            log.warning(
                '%s has no video of %d of the %d classes: %s',
                *(field, len(empty), len(names)),
                named + (f' and {len(empty) - MOST_NAMED} more' * (len(empty) > MOST_NAMED)),
            )


def list_sha256(source: LabelledSource) -> str:
    """Digest of a list, ids, labels and captions in order: the identity of the training stream."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        record = source[i]
        identity = [record.video_id, record.label, record.start, record.end, *record.captions]
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()


def train_reader(config: ConfigDict, class_names: ClassNames = ()) -> pipeline.TrainReader:
    """The training recipe of the config: policy, crop, flip, colours, erasing; one draw for a clip.

    What moves or recolours pixels comes after the crop where that gives the same clips, since there
    are fewer pixels then.

    Args:
      config: of the experiment.
      class_names: of each label column, which say what labels a mirrored clip swaps; () takes the
        recorded ones of the data set.

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
        steps.append(_flip(info, class_names))
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
                    mean=tuple(255 * level for level in clip.PIXELS.mean),
                    std=tuple(255 * level for level in clip.PIXELS.std),
                )
            )
    with _named('data.num_frames', 'data.sampling', 'data.frame_interval', 'data.num_samples'):
        return pipeline.TrainReader(
            num_frames=data.num_frames,
            image_size=data.image_size,
            sampling=data.sampling or info.sampling,
            interval=data.frame_interval,
            transforms=tuple(steps),
            num_samples=data.num_samples,
        )


def _flip(info: DatasetInfo, class_names: ClassNames) -> transforms.Flip:
    """Mirroring, with the pairs of labels that these classes swap.

    Raises:
      ValueError: sides are named by one of several label columns, which nothing swaps.
    """
    recorded = info.flip.label_pairs
    if all(name.isdigit() for column in class_names for name in column):
        if class_names and recorded:
            log.info(
                'the classes have numbers and no names: mirrored clips swap the labels %s of the '
                'official label map',
                recorded,
            )
        return info.flip
    found = [mirror_pairs(column) for column in class_names]
    if len(found) > 1 and any(found):
        raise ValueError(
            'data.flip: classes name left and right, and with several label columns nothing swaps '
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


def eval_reader(config: ConfigDict) -> pipeline.EvalReader:
    """The test protocol of the config.

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
        )


def readers(config: ConfigDict) -> pipeline.Readers:
    """Who reads the training list."""
    data = config.data
    return pipeline.Readers(
        data.num_threads, data.num_workers, data.buffer_size, data.record_timeout
    )


def eval_readers(config: ConfigDict) -> pipeline.Readers:
    """Who reads the evaluation list. Its batches are large: few are made ahead."""
    return dataclasses.replace(readers(config), buffer_size=EVAL_AHEAD)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Checks the fields of a config, its training recipe, test protocol, and batches on the mesh.

    Raises:
      ValueError: naming the fields that do not fit.
    """
    base.check(config)
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    check_samples(config.batch_size, mesh, train_reader(config).num_samples)
    eval_reader(config)  # checks its fields


def find_backbone(config: ConfigDict, workdir: str) -> Backbone:
    """The converted backbone of the config; a random one is made on first use.

    Raises:
      ValueError: none named, none found, or one of another geometry.
    """
    name, path = config.backbone.name, config.backbone.checkpoint
    if config.eval.image_size not in (0, config.data.image_size):
        raise ValueError(
            f'eval.image_size={config.eval.image_size} is not data.image_size='
            f'{config.data.image_size}, for which the position table of the backbone is made; set '
            'eval.image_size=0'
        )
    if not path:
        raise ValueError(
            'backbone.checkpoint is empty; convert the CLIP weights first '
            '(`dist_jax convert ViT-B-16.pt clip_b16`) '
            'and pass --config.backbone.checkpoint=clip_b16'
        )
    if path == RANDOM:
        path = os.path.join(workdir, 'backbone')
        if not converted.absolute_path(path).exists() and jax.process_index() == 0:
            write_random_backbone(path, name)
        if jax.process_count() > 1:
            jax.experimental.multihost_utils.sync_global_devices('random backbone')
    metadata = converted.load_metadata(path)
    spec = clip_params.spec_from_metadata(metadata)
    expected = _spec(name)
    unlike = {
        field: (getattr(expected, field), getattr(spec, field))
        for field in ('patch_size', 'width', 'depth', 'num_heads')
        if getattr(expected, field) != getattr(spec, field)
    }
    if unlike:
        raise ValueError(
            f'{path} is not a {name} (backbone.name): (expected, found) = {unlike}; '
            'name the geometry that was converted'
        )
    spec = dataclasses.replace(spec, image_size=config.data.image_size)
    return Backbone(spec, str(path), metadata['name'], metadata['params_sha256'])


def _spec(name: str) -> clip.ClipSpec:
    if name not in clip.SPECS:
        raise ValueError(f'backbone.name={name!r} is not one of {", ".join(clip.SPECS)}')
    return clip.SPECS[name]


def write_random_backbone(path: str, name: str, seed: int = 0) -> None:
    """A converted checkpoint with random weights, for the demo and for tests."""
    spec = _spec(name)
    log.info('writing a random %s backbone to %s: no pretrained weights are used', name, path)
    params = jax.device_get(clip.init_params(jax.random.key(seed), spec))
    metadata = {
        'family': 'clip',
        'name': f'{name}-random',
        'spec': dataclasses.asdict(spec),
        'sources': [],
        'source_sha256': '',
        'precision': 'float32',
        'ignored': [],
    }
    converted.save_converted(path, params, metadata)


def make_model(config: ConfigDict, spec: clip.ClipSpec, num_classes: tuple[int, ...]) -> VideoModel:
    """The configured family at the configured size.

    Raises:
      ValueError: a field of config.model that does not fit.
    """
    options = config.model.to_dict()
    family = options.pop('family')
    if family not in FAMILIES:
        raise ValueError(f'model.family={family!r} is not one of {", ".join(FAMILIES)}')
    known = inspect.signature(FAMILIES[family]).parameters
    foreign = [f'model.{name}' for name in options if name not in known]
    if foreign:
        raise ValueError(
            f'model.family={family!r} has no option {", ".join(foreign)}; a family is '
            f'chosen by its file, --config=configs/{family}.py:VARIANT'
        )
    dtype = options.pop('dtype')
    if dtype not in DTYPES:
        raise ValueError(f'model.dtype={dtype!r} is not one of {", ".join(DTYPES)}')
    return FAMILIES[family](
        spec,
        num_classes=num_classes,
        num_frames=config.data.num_frames,
        dtype=DTYPES[dtype],
        **options,
    )


def load_frozen(
    backbone: Backbone,
    model: VideoModel,
    class_names: ClassNames,
    mesh: Mesh,
    truncate_texts: bool = False,
    *,
    split_names: bool = True,
    verify: bool = True,
) -> Tree:
    """The frozen tree of the steps, with text features of these classes, on the devices.

    Every device gets its part of the weights from the file; no stack of layers is ever whole on a
    host or a device.

    Args:
      backbone: where the weights are.
      model: decides what is read, in which precision and what lies where.
      class_names: of each label column.
      mesh: the devices.
      truncate_texts: cut class names that are too long for the text tower.
      split_names: put spaces between the words of names that have none.
      verify: compare the weights with the digests that were stored with them.

    Raises:
      ValueError: the head needs class texts and the data set has none, a text is too long, the
        mesh would leave too much of the weights whole, or they are damaged.
    """
    if jax.process_index() == 0:
        log.info('loading the backbone %s', backbone.path)
    stored = converted.stored_shapes(backbone.path)
    abstract = place(
        {name: stored[name] for name in model.reads if name in stored}, model.frozen_rules, mesh
    )
    table = abstract['visual']['positional_embedding']
    abstract['visual']['positional_embedding'] = jax.ShapeDtypeStruct(
        table.shape, table.dtype, sharding=replicated(mesh)
    )
    params = converted.load_params(backbone.path, model.reads, abstract=abstract, verify=verify)
    visual = params['visual']
    visual['positional_embedding'] = layers.resize_positions(
        np.asarray(visual['positional_embedding']), (backbone.spec.grid,) * 2
    )
    tokens: tuple[Any, ...] = ()
    if 'text' in model.reads:
        tokens = tuple(
            np.asarray(
                tokenize(_texts(column, split_names), backbone.spec.context_length, truncate_texts)
            )
            for column in class_names
        )
    placed = place_frozen(model, jax.eval_shape(model.prepare, params, tokens), mesh)
    prepare = jax.jit(on_mesh(mesh, model.prepare), out_shardings=shardings(placed))
    return prepare(params, tokens)


def place_frozen(model: VideoModel, frozen: Tree, mesh: Mesh) -> Tree:
    """A frozen tree, arrays or shapes, as placed `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError: the mesh would leave too much of it whole.
    """
    placed = place(frozen, model.frozen_rules, mesh)
    check_replicated_share(placed, mesh, 'frozen weights', (FSDP, TENSOR))
    return placed


def _texts(names: tuple[str, ...], split_names: bool) -> list[str]:
    """Class names as prompts. Source: DiST uses the bare label text without double quotes."""
    if all(name.isdigit() for name in names):
        raise ValueError(
            'model.head=text needs class names, but the list has numbers only; '
            'pass --config.data.label_map=FILE with one name a line, or use model.head=linear'
        )
    return [name.replace('"', '') for name in (as_words(names) if split_names else names)]


def abstract_frozen(
    backbone: clip.ClipSpec, model: VideoModel, num_classes: tuple[int, ...]
) -> Tree:
    """Shapes of the frozen tree without any weights: for configuration checks and planning."""
    params = clip.abstract_params(backbone)
    tokens = tuple(
        jax.ShapeDtypeStruct((count, backbone.context_length), np.int32) for count in num_classes
    )
    return jax.eval_shape(model.prepare, {name: params[name] for name in model.reads}, tokens)
