"""Backbones on disk: found, checked against what was asked for, or made at random."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from dist_jax.models import BACKBONES, converted
from dist_jax.models.backbone import Backbone
from dist_jax.paths import RANDOM

log = logging.getLogger('dist_jax')

OF_RANDOM = '-random'  # behind the name of one whose weights are


def find(name: str, path: str, image_size: int, workdir: str) -> Backbone:
    """A converted backbone; a random one is made on first use.

    Args:
      name: of its geometry (`backbone.name`).
      path: of the converted checkpoint (`backbone.checkpoint`), or RANDOM.
      image_size: that it is to see, in pixels.
      workdir: where a random one lies.

    Raises:
      ValueError: none named, none found, or one of another geometry.
    """
    if not path:
        raise ValueError(
            f'backbone.checkpoint is empty; convert the weights of {name} first '
            '(`dist_jax convert FILE FOLDER`; its --help has examples of each kind) '
            'and pass --config.backbone.checkpoint=FOLDER'
        )
    if path == RANDOM:
        path = made_in(workdir, lambda path: write_random(path, name))
    found = stored(str(path))
    expected = named(name)
    if found.kind is not expected.kind:
        raise ValueError(f'{path} is {found.name}, another kind of backbone than {name}')
    unlike = {
        field: (getattr(expected.spec, field), getattr(found.spec, field))
        for field in found.kind.geometry
        if getattr(expected.spec, field) != getattr(found.spec, field)
    }
    if unlike:
        raise ValueError(
            f'{path} is not a {name} (backbone.name): (expected, found) = {unlike}; '
            'name the geometry that was converted'
        )
    return sized(found, 'data.image_size', image_size)


def made_in(workdir: str, write: Callable[[str], object]) -> str:
    """The folder of the backbone that a workdir makes for itself, once, by its first process.

    Args:
      workdir: where it lies.
      write: makes it in a folder.
    """
    path = os.path.join(workdir, 'backbone')
    if not converted.absolute_path(path).exists() and jax.process_index() == 0:
        write(path)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('made backbone')
    return path


def stored(path: str) -> Backbone:
    """What a converted checkpoint holds, at the image size that it was converted at.

    Raises:
      ValueError: something else than a backbone.
    """
    metadata = converted.load_metadata(path)
    family = metadata.get('family')
    if family not in BACKBONES:
        raise ValueError(
            f'{path} is a checkpoint of family {family!r} where a converted backbone '
            f'({", ".join(BACKBONES)}) is expected'
        )
    kind = BACKBONES[family]
    try:
        spec = kind.spec_class(**metadata['spec'])
    except TypeError as error:
        raise ValueError(
            f'{path}: the spec of this converted {family} does not fit: {error}'
        ) from None
    return Backbone(kind, spec, path, metadata['name'], metadata['params_sha256'])


def family_of(backbone: Backbone) -> str:
    """What the metadata of a converted checkpoint call its kind."""
    return next(family for family, kind in BACKBONES.items() if kind is backbone.kind)


def named(name: str) -> Backbone:
    """The published size of this name, without weights.

    Raises:
      ValueError: no such size.
    """
    for kind in BACKBONES.values():
        if name in kind.specs:
            return Backbone(kind, kind.specs[name])
    names = ', '.join(size for kind in BACKBONES.values() for size in kind.specs)
    raise ValueError(f'backbone.name={name!r} is not one of {names}')


def sized(backbone: Backbone, field: str, size: int) -> Backbone:
    """A backbone at another image size.

    Args:
      backbone: of any size.
      field: of the config, that asks for it.
      size: in pixels.

    Raises:
      ValueError: its patches do not divide that; the message names the field.
    """
    try:
        return backbone.at(size)
    except ValueError as error:
        raise ValueError(f'{field}: {error}') from None


def write_random(path: str, name: str, seed: int = 0) -> None:
    """A converted checkpoint with random weights, for the demo and for tests."""
    backbone = named(name)
    log.info('writing a random %s backbone to %s: no pretrained weights are used', name, path)
    params = jax.device_get(backbone.kind.init_params(jax.random.key(seed), backbone.spec))
    metadata = {
        'family': family_of(backbone),
        'name': f'{name}{OF_RANDOM}',
        'spec': dataclasses.asdict(backbone.spec),
        'sources': [],
        'source_sha256': '',
        'precision': 'float32',
        'ignored': [],
    }
    converted.save_converted(path, params, metadata)
