"""From a config to the parts of an experiment that compute: backbone, model; data: `recipe`.

Training, evaluation and prediction all build their parts here, so they agree.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from dist_jax.models import FAMILIES, clip, clip_params, converted, layers
from dist_jax.models.api import Tree, VideoModel
from dist_jax.paths import RANDOM
from dist_jax.recipe import ClassNames, eval_reader, train_reader
from dist_jax.sharding import (
    FSDP,
    TENSOR,
    check_batch_size,
    check_repeats,
    check_replicated_share,
    on_mesh,
    place,
    replicated,
    shardings,
)
from input_pipeline.class_names import as_words
from input_pipeline.tokenizer import tokenize

log = logging.getLogger('dist_jax')

DTYPES = {'bfloat16': jnp.bfloat16, 'float32': jnp.float32}


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


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Checks the fields of a config, its training recipe, test protocol, and batches on the mesh.

    Raises:
      ValueError: naming the fields that do not fit.
    """
    base.check(config)
    check_batch_size(config.batch_size, mesh, 'batch_size', config.accumulation)
    check_batch_size(config.eval.batch_size, mesh, 'eval.batch_size')
    check_repeats(config.batch_size, mesh, train_reader(config).repeats)
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
