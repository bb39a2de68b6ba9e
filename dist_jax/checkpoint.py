"""Checkpoints of a run: what is saved, and how a run finds its way back.

    WORKDIR/checkpoints/STEP/state      trainable parameters, optimizer, averages; not the backbone
    WORKDIR/checkpoints/STEP/metadata   JSON: config, class names, preprocessing, backbone's hash,
                                        and digests of all this, which are checked when it is read
    WORKDIR/checkpoints/STEP/score      JSON: figures of the evaluation, if there was one

A save is written beside its place and renamed, so a killed save leaves no step behind. The position
in the data follows from the step and needs no file. A step is saved before it is evaluated, and its
score is added: a run that ends in between has a step without a score, and evaluates it when it
goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from dist_jax.configs import base
from dist_jax.models import converted, digests
from dist_jax.models.api import Tree
from dist_jax.models.converted import (
    absolute_path,
    check_same,
    read_json,
    read_tree,
    stored_leaves,
    together,
)
from dist_jax.models.digests import DamagedError
from dist_jax.models.params import unflatten
from dist_jax.paths import CHECKPOINTS
from dist_jax.step import TrainState

log = logging.getLogger('dist_jax')

FORMAT_VERSION = 2  # since 2 with digests and a score of its own
FOLDER = CHECKPOINTS
SCORE = 'score'
COLLECTIONS = 'collections'  # field of a state, beside its parameters
BEST = 'best'  # in place of a step
MOST_NAMED = 20  # arrays in a message

# Fields that may change when a run is resumed: where things lie (contents are compared by hash)
# and what leaves the parameters alone (another mesh rounds sums differently, no more).
FREE_FIELDS = (
    'mesh.',
    'backbone.checkpoint',
    'data.root',
    'data.train_list',
    'data.label_map',
    'data.val_list',
    'data.val_subset',
    'data.num_threads',
    'data.num_workers',
    'data.record_timeout',
    'data.buffer_size',
    'data.max_bad_share',
    'eval.',
    'checkpoint.',
    'log.',
    'pod.',
)


class NewerFormatError(ValueError):
    """A checkpoint that a newer version of this library wrote."""


class _BestScored(ocp.checkpoint_managers.preservation_policy.PreservationPolicy):
    """Keeps the step with the best score."""

    def __init__(self, scores: Mapping[int, float]):
        self._scores = scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        best = _best(self._scores)
        return [info.step == best for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run.

    Keeps the newest `keep` and the one with the best validation score. Saves run in the background;
    call `wait` before the process ends.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 1, verify: bool = True):
        """Prepares; nothing is read.

        Args:
          workdir: of the run.
          keep: newest checkpoints kept.
          verify: compare what is restored with its digests.
        """
        self._folder = _folder(workdir)
        self._keep = keep
        self._verify = verify
        self._manager: ocp.CheckpointManager | None = None
        self._scores: dict[int, float] = {}

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._scores = read_scores(self._folder)
            policy = ocp.checkpoint_managers.preservation_policy
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy.AnyPreservationPolicy(
                        [policy.LatestN(self._keep), _BestScored(self._scores)]
                    ),
                    # Times and metrics of steps are not used, and damaged ones would stop it here.
                    lightweight_initialize=True,
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(),
                    'metadata': ocp.JsonCheckpointHandler(),
                },
            )
        return self._manager

    def _steps(self) -> list[int]:
        """Saved steps, the newest first."""
        return _of_first_host(sorted(self._open().all_steps(), reverse=True))

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts saving the state of this step; returns once the arrays are copied.

        Args:
          state: what to save; its buffers may be donated right after.
          metadata: JSON values.
        """
        step = int(state.step)
        manager = self._open()
        if step in manager.all_steps():
            return
        metadata = digests.seal({**metadata, digests.DIGESTS: digests.digests(state)})
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
            ),
        )

    def add_score(self, step: int, name: str, score: float) -> None:
        """Records the evaluation of a saved step.

        Args:
          step: is saved, or being saved.
          name: of the figure that decides which step is the best.
          score: its value; the higher, the better.
        """
        self.wait()
        if jax.process_index() == 0:
            text = json.dumps(digests.seal({'select_by': name, name: score}))
            (self._folder / str(step) / SCORE).write_bytes(text.encode())
        self._scores[step] = score

    def has_score(self, step: int) -> bool:
        """Whether a step was evaluated."""
        self._open()
        return bool(_of_first_host([step] if step in self._scores else []))

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that is whole, or None where there is no checkpoint.

        A damaged step is moved to `checkpoints-broken/` once the one before it is found to be
        whole, so that nothing is lost and the step can be saved again. Nothing else is moved.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          ValueError: the state has other arrays than the newest checkpoint.
          RuntimeError: there are checkpoints, or were, and none is whole.
          ending.AgainError: they cannot be read now.
        """
        failures: dict[int, str] = {}
        for step in self._steps():
            try:
                found = self._restore(self._folder / str(step), abstract)
            except DamagedError as error:
                failures[step] = str(error)
                log.error('checkpoint %s/%d cannot be read: %s', self._folder, step, error)
                continue
            self._set_aside(failures)
            return found
        self._set_aside(failures)
        if _of_first_host([int(path.name) for path in _step_folders(self._broken())]):
            reasons = f' ({"; ".join(failures.values())})' if failures else ''
            raise RuntimeError(
                f'no checkpoint in {self._folder} can be read{reasons}; they were moved to '
                f'{self._broken()}. Start again with an empty --workdir, or put a good copy back.'
            )
        return None

    def _restore(
        self, folder: epath.Path, abstract: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        metadata = together(folder, lambda: read_metadata(folder))
        stored = metadata.get(digests.DIGESTS)
        if stored is None:
            log.info(
                '%s has no digests, so damage would not show: an earlier version wrote it. The '
                'next save has them',
                folder,
            )
        state = folder / 'state'
        _check_same_state(folder, together(state, lambda: stored_leaves(state, stored)), abstract)
        return read_tree(state, abstract, stored if self._verify else None), metadata

    def latest_metadata(self) -> dict[str, Any] | None:
        """Metadata of the newest readable step, or None."""
        for step in self._steps():
            try:
                folder = self._folder / str(step)
                return together(folder, lambda folder=folder: read_metadata(folder))
            except DamagedError:
                continue  # `restore_latest` will set it aside
        return None

    def best(self) -> tuple[int, float] | None:
        """The step with the best validation score, and that."""
        scores = read_scores(self._folder)
        step = _best(scores)
        return None if step is None else (step, scores[step])

    def wait(self) -> None:
        """Blocks until running saves are on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _broken(self) -> epath.Path:
        return self._folder.parent / f'{FOLDER}-broken'

    def _set_aside(self, steps: Mapping[int, str]) -> None:
        """Moves damaged steps to where they do no harm and are not lost."""
        if not steps:
            return
        self.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self._broken() / str(step)
                target.parent.mkdir(parents=True, exist_ok=True)
                if '://' in os.fspath(target):  # there, a folder is only what holds something
                    text = b'Checkpoints that could not be read.\n'
                    (target.parent / 'README').write_bytes(text)
                if target.exists():
                    target.rmtree()
                (self._folder / str(step)).rename(target)
        _sync('checkpoints set aside')


def _sync(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _of_first_host(steps: list[int]) -> list[int]:
    """What the first host sees: file systems may tell hosts of new files at different times."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    if not count:
        return []
    padded = np.resize(np.asarray([*steps, -1], np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def _step_folders(folder: epath.Path) -> list[epath.Path]:
    """Folders named like a step, the newest last."""
    if not folder.exists():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def _folder(workdir: str | os.PathLike[str]) -> epath.Path:
    return absolute_path(workdir) / FOLDER


def find_checkpoint(workdir: str | os.PathLike[str], step: int | str | None = None) -> epath.Path:
    """Folder of a step of a run, the newest unless a step is named.

    Args:
      workdir: of the run.
      step: number of a step, as text too, or `BEST` for that with the best validation score.

    Raises:
      ValueError: no run, or no such step.
    """
    folder = _folder(workdir)
    steps = [int(p.name) for p in _step_folders(folder) if (p / 'metadata').exists()]
    if not steps:
        raise ValueError(
            f'{workdir} holds no checkpoint that was written to its end; pass the --workdir of a '
            'run that has saved one'
        )
    if step == BEST:
        step = _best(read_scores(folder))
        if step is None:
            raise ValueError(
                f'no checkpoint of {workdir} has a validation score; name a step of {steps}'
            )
    if step is None:
        step = steps[-1]
    if str(step) not in map(str, steps):
        raise ValueError(f'{workdir} has no checkpoint of step {step}; it has {steps}')
    return folder / str(step)


def read_scores(folder: epath.Path) -> dict[int, float]:
    """Validation scores of the steps in `WORKDIR/checkpoints` that have one."""
    found = {int(path.name): _read_score(path) for path in _step_folders(folder)}
    return {step: score for step, score in found.items() if score is not None}


def _read_score(folder: epath.Path) -> float | None:
    """Of a step; None where it has none that is readable, which is no reason to do without it."""
    try:
        if (folder / SCORE).exists():
            figures = json.loads((folder / SCORE).read_bytes())
            digests.check_seal(folder / SCORE, figures, required=True)
            return float(figures[figures.get('select_by', 'top1')])  # once it was always that
        if (folder / 'metrics' / 'metrics').exists():  # of format 1: -1 for none
            figures = json.loads((folder / 'metrics' / 'metrics').read_bytes())
            return float(figures['val_top1']) if figures['val_top1'] >= 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning('%s: its validation score is not readable (%s)', folder, error)
    return None


def _best(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score, the newest of several."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Metadata of one step; the fields of its config have the names of today.

    Raises:
      DamagedError: no checkpoint of this library, or a damaged one.
      NewerFormatError: of a newer format.
      ending.AgainError: it cannot be read now.
    """
    metadata = read_json(folder / 'metadata')
    try:
        version = metadata['format_version']
        digests.check_seal(folder, metadata, required=version != 1)
        newer = version > FORMAT_VERSION
    except (KeyError, TypeError) as error:
        raise DamagedError(f'{folder} is not a checkpoint of a dist_jax run ({error})') from error
    if newer:
        raise NewerFormatError(
            f'{folder} has format_version={version}, this library reads up to {FORMAT_VERSION}; '
            'update dist_jax'
        )
    if 'config' in metadata:
        fields = flatten_dict(metadata['config'], keep_empty_nodes=True, sep='.')
        fields = {base.RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}
        metadata['config'] = unflatten_dict(fields, sep='.')
    return metadata


def _is_averaged(folder: epath.Path) -> bool:
    """Whether a step keeps averages, `TrainState.ema`, which are used then."""
    return read_metadata(folder)['config']['optimizer']['ema_decay'] > 0


def read_variables(
    folder: epath.Path, abstract: Tree, verify: bool = True, as_numpy: bool = False
) -> Tree:
    """What evaluation applies: parameters and collections, their averages if there are any.

    Args:
      folder: of one step.
      abstract: {'params': ..., **collections} with shapes, dtypes and shardings.
      verify: compare what is read with its digests. With several processes all must call this.
      as_numpy: read into host memory; then shapes and dtypes are enough.

    Raises:
      ValueError: other arrays than these, or damaged ones.
      ending.AgainError: it cannot be read now.
    """
    collections = dict(abstract)
    params = collections.pop('params')
    if _is_averaged(folder):
        wanted = {'ema': converted.stored_tree(abstract)}
    else:
        wanted = {'params': params} | ({COLLECTIONS: collections} if collections else {})
    return _trained(_read_part(folder, wanted, verify, as_numpy), collections)


def _trained(state: Tree, collections: Iterable[str]) -> Tree:
    """What evaluation applies of a part of a state; it holds averages only if they are used."""
    if 'ema' in state:
        return converted.variables(state['ema'], {converted.COLLECTIONS: collections})
    return {'params': state['params'], **state.get(COLLECTIONS, {})}


def _read_part(folder: epath.Path, wanted: Tree, verify: bool, as_numpy: bool) -> Tree:
    stored = read_metadata(folder).get(digests.DIGESTS)
    if stored is None:
        log.info('%s has no digests, so damage would not show: an earlier version wrote it', folder)
    else:
        names = digests.tree_paths(wanted)
        known = stored_leaves(folder / 'state', stored)
        check_same(folder, {name: known[name] for name in names if name in known}, names)
    return read_tree(folder / 'state', wanted, stored if verify else None, as_numpy=as_numpy)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the checkpoints of a run."""
    return _folder(path).exists()


def stored_variables(folder: epath.Path) -> Tree:
    """What `read_variables` finds in a step, as `jax.ShapeDtypeStruct` leaves; nothing is read."""
    stored = read_metadata(folder).get(digests.DIGESTS)
    state = unflatten(stored_leaves(folder / 'state', stored))
    return _trained(state, state.get(COLLECTIONS, {}))


def variables_sha256(folder: epath.Path) -> str:
    """Identity of what `read_variables` finds in a step, of its digests; no array is read.

    Raises:
      ValueError: an earlier version wrote it, without digests.
    """
    stored = read_metadata(folder).get(digests.DIGESTS)
    if stored is None:
        raise ValueError(f'{folder} has no digests that would say which weights these are')
    groups = ('ema/',) if _is_averaged(folder) else ('params/', f'{COLLECTIONS}/')
    used = {path: row for path, row in stored.items() if path.startswith(groups)}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def read_host_variables(folder: epath.Path) -> Tree:
    """What `read_variables` finds in a step, in host memory."""
    return read_variables(folder, stored_variables(folder), as_numpy=True)


def _check_same_state(
    folder: epath.Path, stored: Mapping[str, jax.ShapeDtypeStruct], abstract: TrainState
) -> None:
    """Raises ValueError if a state has other arrays than what is stored; the message lists them."""

    def kind(leaf: Any) -> str:
        return 'absent' if leaf is None else f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'

    wanted = digests.tree_paths(abstract)
    lines = [
        f'  {path}: saved {kind(stored.get(path))}, now {kind(wanted.get(path))}'
        for path in sorted(stored.keys() | wanted.keys())
        if kind(stored.get(path)) != kind(wanted.get(path))
    ]
    if lines:
        more = len(lines) - MOST_NAMED
        raise ValueError(
            f'{folder} holds {len(lines)} arrays that are not those of this run:\n'
            + '\n'.join(lines[:MOST_NAMED])
            + (f'\n  and {more} more' if more > 0 else '')
            + '\nNothing was changed. Continue it with the version of dist_jax, jax and optax that '
            'wrote it, or choose another --workdir (--config.init_from takes its parameters).'
        )


def check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to continue a run under other settings.

    Args:
      saved: metadata of the checkpoint.
      current: metadata of this process.

    Raises:
      ValueError: listing every field that differs.
    """
    before = base.before_fields(saved['config']) | base.flat(saved['config'])
    now = base.flat(current['config'])
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(FREE_FIELDS)
    ]
    differences = [
        f'  {name}: saved {before.get(name, "absent")!r}, now {now.get(name, "absent")!r}'
        for name in changed
    ]
    for name in ('class_names', 'train_list_sha256'):
        if saved[name] != current[name]:
            differences.append(f'  {name}: the data set is not the one the run was started with')
    theirs, own = saved['backbone'], current['backbone']
    if backbone_sha256(theirs) != backbone_sha256(own):
        differences.append(
            f'  backbone.checkpoint: {describe_backbone(theirs)}, now {describe_backbone(own)}'
        )
    if differences:
        restored = ' '.join(
            shlex.quote(f'--config.{name}={_argument(before[name])}')
            for name in changed
            if name in before and name in now
        )
        fields = f'these fields ({restored})' if restored else 'these fields'
        way_out = f'Restore {fields}, or choose another --workdir.'
        if any(line.startswith(('  num_steps:', '  num_epochs:')) for line in differences):
            way_out += (
                ' The learning rate falls over the whole run, so its length is part of it: to train'
                ' longer, start another run from its parameters, with --config.init_from=RUN '
                '(this workdir) and a --workdir of its own.'
            )
        raise ValueError(
            'this workdir holds a run with other settings:\n'
            + '\n'.join(differences)
            + f'\n{way_out}'
        )


def backbone_sha256(identity: Mapping[str, Any] | None) -> str:
    """Of the weights of a backbone, see `Backbone.identity`; '' where there is none."""
    return (identity or {}).get('params_sha256', '')


def describe_backbone(identity: Mapping[str, Any] | None) -> str:
    """A backbone, see `Backbone.identity`, in a message."""
    if not identity:
        return 'no backbone'
    return f'weights {identity["params_sha256"][:12]} of {identity["name"]}'


def _argument(value: Any) -> str:
    """A field of a saved config as the command line takes it."""
    return f'({",".join(map(str, value))},)' if isinstance(value, list) and value else str(value)
