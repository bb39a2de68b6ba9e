"""Starting from other weights: a run, or a converted checkpoint, possibly for other classes.

A linear classifier has a column of weights for each class; it is put together by class name, so
neither the order of the classes nor their number has to agree. A text head has no parameters: its
class texts belong to the frozen tree and are always those of the list.
"""

from __future__ import annotations

import difflib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dist_jax import checkpoint, experiment, recipe
from dist_jax.models import converted, heads
from dist_jax.models.api import Tree
from dist_jax.models.params import flatten
from input_pipeline.sources import read_label_map

log = logging.getLogger('dist_jax')

MISSING = ('error', 'fresh')  # values of config.init_missing
MOST_NAMED = 20  # classes in a message


def load_trainable(config: ConfigDict, params: Tree, class_names: recipe.ClassNames) -> Tree:
    """Trainable parameters of `config.init_from`.

    Args:
      config: of the experiment that starts.
      params: leaves with the shapes, dtypes and shardings to read into; arrays, where
        config.init_missing lets classes start with their values.
      class_names: of each label column.

    Raises:
      ValueError: nothing to read there, other shapes, or classes that are not there.
    """
    path, verify = config.init_from, config.checkpoint.verify
    if config.init_missing not in MISSING:
        raise ValueError(f'init_missing={config.init_missing!r} is not one of {MISSING}')
    folder = checkpoint.find_checkpoint(path) if checkpoint.is_run(path) else None
    stored = (
        checkpoint.stored_variables(folder)['params'] if folder else converted.stored_shapes(path)
    )
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    head = wanted.pop('head', None)
    if head is None:
        if stored.pop('head', None) is not None:
            log.info('the classifier of %s is left out: model.head=text has none', path)
        return _read_trainable(path, folder, stored, wanted, verify)

    places = _class_places(config, folder, heads.classes_of(stored), class_names)
    missing = sum(int((place < 0).sum()) for place in places)
    if missing and not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        raise ValueError(f'{path} lacks {missing} classes, and nothing can be tested without them')
    if 'head' in stored:
        wanted['head'] = heads.with_classes(head, heads.classes_of(stored))
    found = _read_trainable(path, folder, stored, wanted, verify)
    if 'head' in stored:
        found['head'] = heads.take_classes(found['head'], places, params['head'])
    else:
        found['head'] = params['head']
    return found


def compare_backbones(path: str, backbone: experiment.Backbone) -> None:
    """Warns if the run to start from was trained on another backbone."""
    if not checkpoint.is_run(path):
        return
    theirs = checkpoint.read_metadata(checkpoint.find_checkpoint(path))['backbone']
    if theirs['params_sha256'] != backbone.params_sha256:
        log.warning(
            'init_from: %s was trained on %s with weights %s, this run uses %s with weights %s; '
            'its parameters belong to the features of the other. Pass the same backbone with '
            '--config.backbone.checkpoint=FOLDER, unless this is meant',
            *(path, theirs['name'], theirs['params_sha256'][:12]),
            *(backbone.name, backbone.params_sha256[:12]),
        )


def _read_trainable(
    path: str, folder: epath.Path | None, stored: Tree, wanted: Tree, verify: bool
) -> Tree:
    if folder is None:
        parts = sorted(stored.keys() | wanted.keys())
        return converted.load_params(path, parts, abstract=wanted, verify=verify)
    converted.check_same(path, flatten(stored), flatten(wanted))
    return checkpoint.read_variables(folder, {'params': wanted}, verify)['params']


def _class_places(
    config: ConfigDict,
    folder: epath.Path | None,
    num_stored: tuple[int, ...],
    class_names: recipe.ClassNames,
) -> list[np.ndarray]:
    """Where the classes of each label column are in the classifier of `config.init_from`.

    Args:
      config: of the experiment that starts.
      folder: of a step, None for a converted checkpoint.
      num_stored: its classes; () if it has no classifier.
      class_names: of each label column.

    Returns:
      int (classes,) a column, -1 for classes that start fresh.
    """
    path = config.init_from
    if not num_stored:
        log.info('%s has no classifier', path)
        origin: recipe.ClassNames = ((),) * len(class_names)
    elif config.init_label_map:
        origin = tuple(
            read_label_map(name.strip()).names for name in config.init_label_map.split(',')
        )
    elif folder is not None:
        names = checkpoint.read_metadata(folder)['class_names']
        origin = tuple(tuple(column) for column in names)
    elif num_stored == tuple(map(len, class_names)):
        log.info('%s does not name its classes: taken to be those of the list, in order', path)
        origin = class_names
    else:
        raise ValueError(
            f'{path} has {num_stored} classes and does not name them, the list has '
            f'{tuple(map(len, class_names))}; pass its names with --config.init_label_map=FILE'
        )
    if num_stored and tuple(map(len, origin)) != num_stored:
        raise ValueError(
            f'init_label_map names {tuple(map(len, origin))} classes, {path} has {num_stored}'
        )
    if len(origin) != len(class_names):
        raise ValueError(f'{path} has {len(origin)} label columns, the list has {len(class_names)}')
    key = recipe.dataset_info(config).class_key
    places = []
    for column, (names, own) in enumerate(zip(class_names, origin)):
        place = match_classes(own, names, key, path)
        lacking = [name for name, k in zip(names, place) if k < 0]
        if lacking and config.init_missing == 'error':
            raise ValueError(_lacking_text(path, column, names, lacking, own))
        moved = sum(k >= 0 and own[k] != name for name, k in zip(names, place))
        log.info(
            'classifier of label column %d: %d of %d classes taken from %s by name (%d of them '
            'under another name), %d start fresh',
            *(column, len(names) - len(lacking), len(names), path, moved, len(lacking)),
        )
        places.append(place)
    return places


def match_classes(
    origin: Sequence[str], names: Sequence[str], key: Callable[[str], str], where: str
) -> np.ndarray:
    """For each name the place of its class in `origin`, int (names,); -1 where there is none.

    An equal name comes first, then one with the same key.

    Raises:
      ValueError: names are bare numbers, or a key fits two classes of `origin`.
    """
    if tuple(origin) == tuple(names):
        return np.arange(len(names))
    if not origin:
        return np.full(len(names), -1)
    for what, each, cure in (
        (where, origin, 'init_label_map'),
        ('the list', names, 'data.label_map'),
    ):
        if all(name.isdigit() for name in each):
            raise ValueError(
                f'the classes of {what} have numbers for names, which say nothing in another '
                f'list; pass --config.{cure}=FILE'
            )
    place = {name: k for k, name in enumerate(origin)}
    same = defaultdict(list)
    for name in origin:
        same[key(name)].append(name)
    found = []
    for name in names:
        candidates = [name] if name in place else same[key(name)]
        if len(candidates) > 1:
            raise ValueError(f'{where}: class {name!r} may be {" or ".join(map(repr, candidates))}')
        found.append(place[candidates[0]] if candidates else -1)
    return np.asarray(found)


def _lacking_text(
    path: str, column: int, names: Sequence[str], lacking: Sequence[str], origin: Sequence[str]
) -> str:
    lines = [
        f'{path} has no weights for {len(lacking)} of the {len(names)} classes of label column '
        f'{column}:'
    ]
    for name in lacking[:MOST_NAMED]:
        close = difflib.get_close_matches(name, origin, 1, 0.6)
        lines.append(f'  {name!r}' + (f' (it has {close[0]!r})' if close else ''))
    if len(lacking) > MOST_NAMED:
        lines.append(f'  and {len(lacking) - MOST_NAMED} more')
    lines.append(
        'Correct the names in data.label_map, or pass --config.init_missing=fresh to start these '
        'classes anew.'
    )
    return '\n'.join(lines)
