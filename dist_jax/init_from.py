"""Starting from other weights: a run, or a converted checkpoint, possibly for other classes.

A linear classifier has a column of weights for each class; it is put together by class name, so
neither the order of the classes nor their number has to agree. A text head has no parameters: its
class texts belong to the frozen tree and are always those of the list.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from dist_jax import checkpoint
from dist_jax.models import converted, heads
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.frozen import load_parts
from dist_jax.models.params import flatten, unflatten
from dist_jax.sharding import replicated
from dist_jax.tasks.api import Labels
from input_pipeline.sources import read_label_map

log = logging.getLogger('dist_jax')

ALL_FRESH = 'all_fresh'
MISSING = ('error', 'fresh', ALL_FRESH)  # values of config.init_missing
MOST_NAMED = 20  # classes in a message


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where variables start.

    Attributes:
      path: a run's folder or a converted checkpoint.
      label_map: files of its class names, where it does not hold them; '' where it does.
      missing: what becomes of classes that are not there, of MISSING; with ALL_FRESH, training
        takes none to be there.
      class_key: names of classes with the same key are the same class.
      verify: compare what is read with its digests.
    """

    path: str
    label_map: str = ''
    missing: str = 'error'
    class_key: Callable[[str], str] = str
    verify: bool = True

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise ValueError(f'init_missing={self.missing!r} is not one of {MISSING}')


def load_variables(origin: Origin, model: Model, variables: Tree, labels: Labels) -> Tree:
    """Parameters and collections to start from.

    Args:
      origin: where they are.
      model: whose they are.
      variables: {'params': ..., **collections}, leaves with the shapes, dtypes and shardings to
        read into; arrays where training starts: classes may start with their values, and what
        `Model.left_behind` names may be left behind.
      labels: class names of each head.

    Raises:
      ValueError: nothing to read there, other shapes, or classes that are not there.
    """
    path, verify = origin.path, origin.verify
    folder = checkpoint.find_checkpoint(path) if checkpoint.is_run(path) else None
    stored = checkpoint.stored_variables(folder) if folder else converted.stored_variables(path)
    trains = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    if trains:
        stored = _without_left_behind(path, stored, variables, model)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables
    )
    head = wanted['params'].pop('head', None)
    if head is None:
        if stored['params'].pop('head', None) is not None:
            log.info('the classifier of %s is left out: this model has none', path)
        return _read_variables(path, folder, stored, wanted, model, verify)

    if 'head' not in stored['params']:
        log.info('%s has no classifier', path)
    elif origin.missing == ALL_FRESH and trains:
        log.info('the classifier of %s is left out, init_missing=%s', path, origin.missing)
        del stored['params']['head']
    places = _class_places(origin, folder, heads.classes_of(stored['params']), labels)
    missing = sum(int((place < 0).sum()) for place in places)
    if missing and not trains:
        raise ValueError(f'{path} lacks {missing} classes, and nothing can be tested without them')
    fresh = variables['params']['head']
    if 'head' not in stored['params']:
        found = _read_variables(path, folder, stored, wanted, model, verify)
        found['params']['head'] = fresh
        return found
    wanted['params']['head'] = heads.with_classes(head, heads.classes_of(stored['params']))
    found = _read_variables(path, folder, stored, wanted, model, verify)
    found['params']['head'] = heads.take_classes(found['params']['head'], places, fresh)
    return found


def load_from_backbone(
    from_backbone: Mapping[str, str], backbone: Backbone, params: Tree, verify: bool
) -> Tree:
    """Parameters of which some are taken from a backbone.

    Args:
      from_backbone: which, see `Model.from_backbone`.
      backbone: converted.
      params: fresh ones, arrays; or shapes with shardings, where all are taken.
      verify: compare what is read with its digests.

    Raises:
      ValueError: there are no such parameters, or the backbone has not what they start as, or in
        other shapes.
    """
    known = flatten(params)
    wanted = {}
    for ours, theirs in from_backbone.items():
        inside = [path for path in known if path == ours or path.startswith(f'{ours}/')]
        if not inside:
            raise ValueError(f'from_backbone: the network has no parameters under {ours!r}')
        wanted |= {theirs + path.removeprefix(ours): path for path in inside}
    asked = {theirs: known[path] for theirs, path in wanted.items()}
    found = load_parts(backbone, asked, verify)
    return unflatten(known | {wanted[theirs]: leaf for theirs, leaf in found.items()})


def compare_backbones(path: str, backbone: Backbone | None) -> None:
    """Warns if the run to start from was trained on another backbone."""
    if backbone is None or not checkpoint.is_run(path):
        return
    theirs = checkpoint.read_metadata(checkpoint.find_checkpoint(path))['backbone']
    own = backbone.identity()
    if checkpoint.backbone_sha256(theirs) != backbone.params_sha256:
        log.warning(
            'init_from: %s was trained on %s, this run uses %s; its parameters belong to the '
            'features of the other. Pass the same backbone with '
            '--config.backbone.checkpoint=FOLDER, unless this is meant',
            *(path, checkpoint.describe_backbone(theirs), checkpoint.describe_backbone(own)),
        )


def _read_variables(
    path: str,
    folder: epath.Path | None,
    stored: Tree,
    wanted: Tree,
    model: Model,
    verify: bool,
) -> Tree:
    known, asked = flatten(stored), flatten(wanted)
    # Read as they are stored, and then made to fit. What cannot be is listed with all that differs.
    unlike = {
        name: leaf
        for name, leaf in asked.items()
        if name in known and known[name].shape != leaf.shape and _fits(model, name, known, leaf)
    }
    for name, leaf in unlike.items():
        whole = replicated(leaf.sharding.mesh)
        asked[name] = jax.ShapeDtypeStruct(known[name].shape, leaf.dtype, sharding=whole)
    converted.check_same(path, known, asked)
    target = unflatten(asked)
    if folder is None:
        found = converted.load_variables(path, target, verify=verify)
    else:
        found = checkpoint.read_variables(folder, target, verify)
    leaves = flatten(found)
    for name, leaf in unlike.items():
        fit = jax.jit(model.fit, static_argnums=(0, 2), out_shardings=leaf.sharding)
        leaves[name] = fit(_without_collection(name), leaves[name], leaf.shape)
    return unflatten(leaves)


def _without_left_behind(path: str, stored: Tree, variables: Tree, model: Model) -> Tree:
    known, asked = flatten(stored), flatten(variables)
    left = [
        name
        for name in known
        if name not in asked
        and any(re.search(pattern, _without_collection(name)) for pattern in model.left_behind)
    ]
    if left:
        log.info('%s has what this model has no place for, left behind: %s', path, ', '.join(left))
    return unflatten({name: leaf for name, leaf in known.items() if name not in left})


def _fits(
    model: Model,
    name: str,
    known: Mapping[str, jax.ShapeDtypeStruct],
    leaf: jax.ShapeDtypeStruct,
) -> bool:
    """Whether `Model.fit` takes what is stored under this name."""
    if model.fit is None:
        return False
    own = _without_collection(name)
    try:
        fitted = jax.eval_shape(lambda x: model.fit(own, x, leaf.shape), known[name])
    except ValueError:
        return False
    return fitted.shape == leaf.shape


def _without_collection(name: str) -> str:
    return name.partition('/')[2]


def _class_places(
    origin: Origin,
    folder: epath.Path | None,
    num_stored: tuple[int, ...],
    labels: Labels,
) -> list[np.ndarray]:
    """Where the classes of each head are in the classifier to start from.

    Args:
      origin: where it is.
      folder: of a step, None for a converted checkpoint.
      num_stored: its classes; () if it has no classifier.
      labels: of each head.

    Returns:
      int (classes,) a head, -1 for classes that start fresh.
    """
    path = origin.path
    if not num_stored:
        known: Labels = ((),) * len(labels)
    elif origin.label_map:
        known = tuple(read_label_map(name.strip()).names for name in origin.label_map.split(','))
    elif folder is not None:
        names = checkpoint.read_metadata(folder)['class_names']
        known = tuple(map(tuple, names))
    elif num_stored == tuple(map(len, labels)):
        log.info('%s does not name its classes: taken to be those of the list, in order', path)
        known = labels
    else:
        raise ValueError(
            f'{path} has {num_stored} classes and does not name them, the list has '
            f'{tuple(map(len, labels))}; pass its names with --config.init_label_map=FILE, or '
            f'--config.init_missing={ALL_FRESH} to start all classes anew'
        )
    if num_stored and tuple(map(len, known)) != num_stored:
        raise ValueError(
            f'init_label_map names {tuple(map(len, known))} classes, {path} has {num_stored}'
        )
    if len(known) != len(labels):
        raise ValueError(f'{path} has {len(known)} heads, the list has {len(labels)}')
    places = []
    for head, (names, own) in enumerate(zip(labels, known)):
        place = match_classes(own, names, origin.class_key, path)
        lacking = [name for name, k in zip(names, place) if k < 0]
        if lacking and origin.missing == 'error':
            raise ValueError(_lacking_text(path, head, names, lacking, own))
        moved = sum(k >= 0 and own[k] != name for name, k in zip(names, place))
        if num_stored:
            log.info(
                'classifier of head %d: %d of %d classes taken from %s by name (%d of them '
                'under another name), %d start fresh',
                *(head, len(names) - len(lacking), len(names), path, moved, len(lacking)),
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
    path: str, head: int, names: Sequence[str], lacking: Sequence[str], origin: Sequence[str]
) -> str:
    lines = [
        f'{path} has no weights for {len(lacking)} of the {len(names)} classes of head {head}:'
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
