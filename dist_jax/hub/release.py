"""A trained model as a folder to give away: no optimizer, no paths, nothing that could be run.

    FOLDER/config.json            what a step of a run says of itself (config without paths, class
                                  names, protocol, which backbone), figures of its evaluation, and
                                  the hash of each file of weights; sealed as checkpoints are
    FOLDER/network.safetensors    what evaluation applies: 'params/...' and collections, averaged
                                  where the run averages
    FOLDER/backbone.safetensors   the frozen backbone; only where it was asked for, or where the run
                                  had made it, so that nobody else has it
    FOLDER/README.md              the card; nothing here reads it

`write` makes one of a run, `read` takes one from anybody: JSON and plain tensors, of which names,
types, sizes and hashes are checked before a model is made of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dist_jax import checkpoint
from dist_jax.configs import base
from dist_jax.hub import card as model_card
from dist_jax.json_file import write_json
from dist_jax.metric_writer import METRICS_FILE, read_metrics
from dist_jax.models import BACKBONES, FAMILIES, converted, digests
from dist_jax.models.api import Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.foreign import read_json, shown
from dist_jax.models.params import flatten, tree_sha256, unflatten, write_tensors
from dist_jax.models.source_files import file_sha256, read_safetensors
from dist_jax.paths import MADE, RELEASE, cache_folder, is_release
from dist_jax.scalars import VALIDATION
from dist_jax.tasks.api import Labels
from dist_jax.whole_file import folder_appearing

FORMAT = 'dist_jax release'
FORMAT_VERSION = 1
CONFIG, NETWORK = RELEASE
BACKBONE, CARD = 'backbone.safetensors', 'README.md'
FILES = (CONFIG, NETWORK, BACKBONE, CARD)

# Of a machine: written as '' and, whatever a file says, read as ''.
PATHS = (
    'init_from',
    'init_label_map',
    'backbone.checkpoint',
    'data.root',
    'data.train_list',
    'data.val_list',
    'data.label_map',
)
# What is kept of the metadata of a converted backbone.
ORIGIN = (*converted.REQUIRED, 'kind', converted.HUB)

MAX_CLASSES = 100_000
MAX_TEXT = 1000  # characters of a field, a class or a name
MAX_ITEMS = 1000  # of a field that is a list
MAX_SIZE = 2**20  # of a whole number that describes a network
MAX_PIXEL_BYTES = 2**32  # of the views of one video

_SHA256 = re.compile('[0-9a-f]{64}')
_HUB = re.compile(r'hf://[\w.-]+/[\w.-]+(@[\w./%-]+)?')


@dataclasses.dataclass(frozen=True)
class Release:
    """A release that was read and checked, but for its weights.

    Attributes:
      folder: where it lies.
      metadata: what `config.json` holds.
      config: of the run, locked; without its paths and its mesh.
      labels: class names of each head; () where there are none.
      step: of the run.
    """

    folder: Path
    metadata: dict[str, Any]
    config: ConfigDict
    labels: Labels
    step: int

    def read_variables(self, abstract: Tree, verify: bool = True) -> Tree:
        """What evaluation applies, on the devices.

        Args:
          abstract: {'params': ..., **collections} with shapes, dtypes and shardings.
          verify: compare the file with its hash.

        Raises:
          ValueError: other arrays than these, or a file that is not the one of `config.json`.
        """
        stored, wanted = self._tensors(NETWORK, verify), flatten(abstract)
        converted.check_same(self.folder / NETWORK, stored, wanted)

        def placed(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                return np.asarray(stored[name][index], leaf.dtype)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        return unflatten({name: placed(name, leaf) for name, leaf in wanted.items()})

    def with_backbone(self, config: ConfigDict) -> ConfigDict:
        """A config that says where the backbone is, if `config` does not: the one in the release.

        Raises:
          ValueError: it holds none, or another than its network was trained on.
        """
        own = self.metadata['backbone']
        if own is None or config.backbone.checkpoint:
            return config
        if BACKBONE not in self.metadata['files']:
            hub = own.get('hub', '')
            way = f' (`dist_jax convert {hub} FOLDER` makes it)' if hub else ''
            raise ValueError(
                f'{self.folder} was trained on {checkpoint.describe_backbone(own)}, which is not '
                f'in it: pass backbone=FOLDER, on the command line --config.backbone.checkpoint='
                f'FOLDER, with that backbone as `dist_jax convert` makes it{way}'
            )
        config = config.copy_and_resolve_references()
        config.backbone.checkpoint = self._unpacked()
        return config.lock()

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Says of errors, while a model is made, that the release is their cause."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as e:
            reason = str(e).strip() or type(e).__name__
            raise ValueError(
                f'{self.folder / CONFIG}: no model can be made of it: {reason[:2000]}'
            ) from e

    def _tensors(self, name: str, verify: bool = True) -> dict[str, np.ndarray]:
        path, known = self.folder / name, self.metadata['files'][name]
        if not path.is_file():
            raise ValueError(
                f'{path}: no such file; {CONFIG} names it, so the release is not whole'
            )
        size = path.stat().st_size
        if size != known['bytes'] or (verify and file_sha256(path) != known['sha256']):
            raise ValueError(
                f'{path} is not the file that {CONFIG} was written with ({size} bytes here, '
                f'{known["bytes"]} there, or other content): fetch the whole release again'
            )
        return read_safetensors(path)

    def _unpacked(self) -> str:
        """The backbone as a converted checkpoint, made once for all releases that hold it."""
        own = self.metadata['backbone']
        path = os.path.join(cache_folder('backbones'), own['params_sha256'])
        if os.path.exists(path):
            return path
        with self.blamed():
            kind = BACKBONES[own['family']]
            spec = kind.spec_class(**own['spec'])
            wanted = flatten(Backbone(kind, spec).abstract_params())
        stored = self._tensors(BACKBONE)
        converted.check_same(self.folder / BACKBONE, stored, wanted)
        tree = unflatten(stored)
        if tree_sha256(tree) != own['params_sha256']:
            raise ValueError(
                f'{self.folder / BACKBONE} has other weights than the backbone that {CONFIG} names '
                f'({checkpoint.describe_backbone(own)}); fetch the whole release again'
            )
        made = f'{path}.{os.getpid()}'
        converted.save_converted(made, tree, {name: own[name] for name in ORIGIN if name in own})
        try:
            os.rename(made, path)
        except OSError:  # another process was first
            shutil.rmtree(made, ignore_errors=True)
            if not os.path.exists(path):
                raise
        return path


def read(path: str | os.PathLike[str], step: int | str | None = None) -> Release:
    """Reads all of a release but its weights.

    Args:
      path: the folder.
      step: must be None, or the one that it was made of.

    Raises:
      ValueError: no release, a damaged one, one of a newer version, or one that says what no model
        could be made of; the message names the field.
    """
    folder = Path(path)
    metadata, where = read_json(folder / CONFIG), f'{folder / CONFIG}'
    if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
        raise ValueError(f'{where}: not of a release that `dist_jax push` made')
    version = metadata.get('format_version')
    if not _is_int(version) or version > FORMAT_VERSION:
        raise ValueError(
            f'{where}: format_version={shown(version)}, this library reads up to {FORMAT_VERSION}; '
            'update dist_jax'
        )
    digests.check_seal(where, metadata, required=True)
    try:
        _check(metadata)
        config = base.restored(_anywhere(metadata['config']))
        base.check(config)
        _check_views(config)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    if step is not None and str(step) != str(metadata['step']):
        raise ValueError(f'{path} is a release of step {metadata["step"]} and has no other: {step}')
    labels = tuple(map(tuple, metadata['class_names']))
    return Release(folder, metadata, config, labels, metadata['step'])


def write(
    folder: str | os.PathLike[str],
    workdir: str,
    step: int | str | None = None,
    *,
    name: str = '',
    license: str = '',
    backbone: str = '',
    with_backbone: bool = False,
) -> dict[str, Any]:
    """Makes a release of a step of a run; it appears whole or not at all.

    Args:
      folder: to make; an earlier release there is replaced.
      workdir: the run.
      step: number of a checkpoint, or 'best'; None for the newest.
      name: under which it will be loaded, for the card.
      license: for the card; '' to leave it open.
      backbone: where the converted one lies, if it has moved.
      with_backbone: put it in, too.

    Returns:
      What `config.json` holds.

    Raises:
      ValueError: no such step, weights that are not finite, or no such backbone.
      FileExistsError: there is something else at `folder`.
    """
    folder = Path(folder)
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (empty or is_release(folder)):
        raise FileExistsError(f'{folder} exists and is no release, so it is not replaced')
    source = checkpoint.find_checkpoint(workdir, step)
    saved = checkpoint.read_metadata(source)
    variables = checkpoint.read_host_variables(source)
    wrong = [path for path, leaf in flatten(variables).items() if not np.isfinite(leaf).all()]
    if wrong:
        raise ValueError(f'{source}: {wrong[0]} is not finite; such a model gives no scores')
    identity, held = _backbone_of(source, saved, backbone, with_backbone)
    with folder_appearing(folder) as partial:
        files = {NETWORK: _write_tree(partial / NETWORK, variables)}
        if held:
            tree = converted.stored_arrays(held, list(flatten(converted.stored_shapes(held))))
            files[BACKBONE] = _write_tree(partial / BACKBONE, tree)
        metadata = digests.seal(
            {
                'format': FORMAT,
                'format_version': FORMAT_VERSION,
                'step': int(source.name),
                'config': _anywhere(saved['config']),
                'class_names': saved['class_names'],
                'preprocessing': saved['preprocessing'],
                'views': saved['views'],
                'train_list_sha256': saved['train_list_sha256'],
                'backbone': identity,
                'params_sha256': tree_sha256(converted.stored_tree(variables)),
                'evaluation': _evaluation(workdir, saved, int(source.name)),
                'files': files,
            }
        )
        write_json(partial / CONFIG, metadata)
        (partial / CARD).write_text(
            model_card.text(metadata, name or folder.name, license), encoding='utf-8'
        )
        read(partial)  # what is written can be read
        shutil.rmtree(folder, ignore_errors=True)
    return metadata


def _write_tree(path: Path, tree: Tree) -> dict[str, Any]:
    leaves = flatten(tree)
    kinds = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in leaves.items()}
    write_tensors(path, kinds, leaves.items(), {'format': FORMAT})
    return {'bytes': path.stat().st_size, 'sha256': file_sha256(path)}


def _backbone_of(
    source: os.PathLike[str], saved: Mapping[str, Any], path: str, wanted: bool
) -> tuple[dict[str, Any] | None, str]:
    """What is said of the backbone of a step, and where it lies if it goes along, else ''.

    Raises:
      ValueError: it goes along and is not there, or is another.
    """
    identity = saved['backbone']
    if identity is None:
        return None, ''
    place = path or identity['path']
    # Made by the run, of a seed or of what comes with the package: nobody else can say where it is.
    wanted = wanted or saved['config']['backbone']['checkpoint'] in MADE
    own = {key: value for key, value in identity.items() if key != 'path'}
    try:
        origin = converted.load_metadata(place)
    except (ValueError, OSError) as error:
        if wanted or path:
            raise ValueError(
                f'{source} was trained on {checkpoint.describe_backbone(identity)}, which is not '
                f'at {place} ({error}); say where it is with --backbone'
            ) from error
        return own, ''
    if origin['params_sha256'] != identity['params_sha256']:
        if wanted or path:
            raise ValueError(
                f'{place} is another backbone than {checkpoint.describe_backbone(identity)}, on '
                f'which {source} was trained; say where that is with --backbone'
            )
        return own, ''
    # The spec of the conversion, whose tables a release holds; that of the run may be of another
    # image size.
    own |= {key: origin[key] for key in ORIGIN if key in origin}
    return own, place if wanted else ''


def _evaluation(workdir: str, saved: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """Figures of a step, of `dist_jax evaluate` or else of the evaluation inside training."""
    folder = converted.absolute_path(workdir)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(Path(folder / 'evaluation.json'))
        if found['step'] == step:
            figures = {name: found[name] for name in list(found)[: list(found).index('step')]}
            return {
                'by': 'dist_jax evaluate',
                'list': os.path.basename(str(found['list']).rstrip('/')),
                'num_views': found['views'],
                'fusion': found['fusion'],
                'figures': _numbers(figures),
            }
    metrics = folder / METRICS_FILE
    rows = read_metrics(metrics) if metrics.exists() else []
    inside = [_numbers(_validation(row)) for row in rows if row['step'] == step]
    if not any(inside):
        return None
    config = saved['config']
    return {
        'by': 'the evaluation inside training',
        'list': os.path.basename(str(config['data']['val_list']).rstrip('/')),
        'num_views': config['eval']['num_clips'] * config['eval']['num_crops'],
        'fusion': config['eval']['fusion'],
        'figures': [figures for figures in inside if figures][-1],
    }


def _validation(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(VALIDATION): value
        for name, value in row.items()
        if name.startswith(VALIDATION)
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _anywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what is of one machine: its paths and its devices."""
    found = {name: dict(v) if isinstance(v, dict) else v for name, v in config.items()}
    for field in PATHS:
        group, _, name = field.rpartition('.')
        place = found.get(group, {}) if group else found
        if name in place:
            place[name] = ''
    return found | {'mesh': base.get_config().mesh.to_dict()}


def _check(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for what is not as `write` writes it."""
    _expect(_is_int(metadata.get('step')), 'step', metadata.get('step'), 'a number')
    config = metadata.get('config')
    _expect(isinstance(config, dict), 'config', config, 'an object')
    _check_config(config)
    names = metadata.get('class_names')
    good = isinstance(names, list) and all(isinstance(head, list) for head in names)
    good = good and sum(map(len, names)) <= MAX_CLASSES
    good = good and all(_is_text(name) and name.strip() for head in names for name in head)
    _expect(good, 'class_names', names, f'lists of at most {MAX_CLASSES} names')
    files = metadata.get('files')
    good = isinstance(files, dict) and NETWORK in files and set(files) <= {NETWORK, BACKBONE}
    good = good and all(map(_is_file, files.values()))
    _expect(good, 'files', files, f'bytes and sha256 of {NETWORK}, maybe of {BACKBONE}')
    _check_backbone(metadata.get('backbone'), config['model']['family'], BACKBONE in files)


def _is_file(value: Any) -> bool:
    good = isinstance(value, dict) and _is_int(value.get('bytes'))
    return good and _is_sha256(value.get('sha256'))


def _check_backbone(own: Any, family: str, held: bool) -> None:
    if not FAMILIES[family].reads_backbone:
        _expect(own is None and not held, 'backbone', own, f'null, for {family} stands on none')
        return
    _expect(isinstance(own, dict), 'backbone', own, 'an object')
    for field, good in (
        ('name', _is_text),
        ('params_sha256', _is_sha256),
        ('spec', lambda value: isinstance(value, dict) and all(map(_is_option, value.values()))),
        ('hub', lambda value: _is_text(value) and _HUB.fullmatch(value)),
    ):
        if field != 'hub' or field in own:
            value = own.get(field)
            _expect(good(value), f'backbone.{field}', value, 'what a converted backbone says')
    lacking = [name for name in converted.REQUIRED if held and name not in own]
    _expect(not lacking, 'backbone', lacking, 'nothing to be lacking')
    if held:
        family = own['family']
        known = isinstance(family, str) and family in BACKBONES
        _expect(known, 'backbone.family', family, f'one of {", ".join(BACKBONES)}')


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that no config has, and for values of another type."""
    own, known = config.get('model'), base.get_config().to_dict()
    _expect(isinstance(own, dict), 'config.model', own, 'an object')
    family = own.get('family')
    good = isinstance(family, str) and family in FAMILIES
    _expect(good, 'config.model.family', family, f'one of {", ".join(FAMILIES)}')
    options = inspect.signature(FAMILIES[family].build).parameters
    for field, value in own.items():
        _expect(_is_option(value), f'config.model.{field}', value, 'a number, a text or a list')
        default = options[field].default if field in options else None
        if default is not None and default is not inspect.Parameter.empty:
            _expect_like(default, f'config.model.{field}', value)
    for group, value in config.items():
        if group == 'model':
            continue
        _expect(group in known, f'config.{group}', value, 'no such field (a newer version?)')
        if not isinstance(known[group], dict):
            _expect_like(known[group], f'config.{group}', value)
            continue
        _expect(isinstance(value, dict), f'config.{group}', value, 'an object')
        for field, inside in value.items():
            name = f'config.{group}.{field}'
            if field in known[group]:
                _expect_like(known[group][field], name, inside)
            else:  # what a task can be told is its own
                _expect(group == 'task', name, inside, 'no such field (a newer version?)')
                _expect(_is_option(inside), name, inside, 'a number, a text or a list')


def _check_views(config: ConfigDict) -> None:
    data, test = config.data, config.eval
    size = test.image_size or data.image_size
    total = 3 * test.num_clips * test.num_crops * data.num_frames * size**2
    if total > MAX_PIXEL_BYTES or test.num_crops < 1 or data.num_frames < 1:
        raise ValueError(
            f'eval.num_clips={test.num_clips}, eval.num_crops={test.num_crops}, data.num_frames='
            f'{data.num_frames} and an image size of {size} make {total} bytes of a video, which '
            f'no evaluation has (at most {MAX_PIXEL_BYTES})'
        )


def _expect(good: Any, field: str, value: Any, expected: str) -> None:
    if not good:
        raise ValueError(f'{field}={shown(value)}, expected {expected}')


def _expect_like(default: Any, field: str, value: Any) -> None:
    """Raises ValueError for a JSON value that is not of the type of a field."""
    kind = type(default)
    if kind is bool:
        good = isinstance(value, bool)
    elif kind is int:
        good = _is_int(value)
    elif kind is float:
        good = _is_number(value)
    elif kind in (tuple, list):
        good = isinstance(value, list) and len(value) <= MAX_ITEMS
        good = good and all(map(_is_scalar, value))
    else:
        good = kind is not str or _is_text(value)
    _expect(good, field, value, f'a value such as {default!r}')


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool) or value is None or _is_number(value) or _is_text(value)


def _is_option(value: Any) -> bool:
    """Whether a network or a backbone may be described by it."""
    values = value if isinstance(value, list) else [value]
    small = all(abs(each) <= MAX_SIZE for each in values if _is_int(each))
    return len(values) <= MAX_ITEMS and all(map(_is_scalar, values)) and small


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
