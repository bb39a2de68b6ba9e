"""Checkpoints of a run: what is saved, and how a run finds its way back.

    WORKDIR/checkpoints/STEP/state      trainable parameters, optimizer, averages; not the backbone
    WORKDIR/checkpoints/STEP/metadata   JSON: config, class names, preprocessing, backbone's hash

A save is written beside its place and renamed, so a killed save leaves no step behind. The position
in the data follows from the step and needs no file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dist_jax.models.api import Tree
from dist_jax.models.converted import absolute_path, read_tree
from dist_jax.paths import CHECKPOINTS
from dist_jax.step import TrainState

log = logging.getLogger('dist_jax')

FORMAT_VERSION = 1
FOLDER = CHECKPOINTS

# Fields that came after the first runs and changed what a run does, as it was before them.
BEFORE_FIELDS = {'data.split_names': False}

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
)


class NewerFormatError(ValueError):
    """A checkpoint that a newer version of this library wrote."""


def _metric(metrics: dict[str, float]) -> float:
    return metrics['val_top1']


class Checkpoints:
    """The checkpoints of one run.

    Keeps the newest `keep` and the one with the best validation top-1. Saves run in the background;
    call `wait` before the process ends.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 1):
        self._folder = _folder(workdir)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            if jax.process_index() == 0:
                self._set_damaged_aside()
            _sync('damaged checkpoints')
            policy = ocp.checkpoint_managers.preservation_policy
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    best_fn=_metric,
                    preservation_policy=policy.AnyPreservationPolicy(
                        [
                            policy.LatestN(self._keep),
                            policy.BestN(get_metric_fn=_metric, n=1, reverse=False),
                        ]
                    ),
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(),
                    'metadata': ocp.JsonCheckpointHandler(),
                },
            )
        return self._manager

    def save(self, state: TrainState, metadata: dict[str, Any], val_top1: float | None) -> None:
        """Starts saving the state of this step; returns once the arrays are copied.

        Args:
          state: what to save; its buffers may be donated right after.
          metadata: JSON values.
          val_top1: accuracy in [0, 1] at this very step, if it was measured.
        """
        step = int(state.step)
        manager = self._open()
        if step in manager.all_steps():
            return
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
            ),
            metrics={'val_top1': -1.0 if val_top1 is None else val_top1},
        )

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that can be read, or None where there is no checkpoint.

        A step that cannot be read is moved to `checkpoints-broken/` and the one before it is
        tried, so that nothing is lost and the step can be saved again.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          RuntimeError: there are checkpoints and none can be read.
        """
        failures = []
        for step in _of_first_host(sorted(self._open().all_steps(), reverse=True)):
            restored, reason = None, ''
            try:
                restored = self._open().restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract),
                        metadata=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:  # orbax raises bare Exceptions for damaged arrays
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if _all_hosts(not reason):
                return restored['state'], restored['metadata']
            reason = reason or 'another host cannot read it'
            failures.append(f'step {step}: {reason}')
            log.error('checkpoint %s/%d cannot be read: %s', self._folder, step, reason)
            self.close()
            if jax.process_index() == 0:
                self._set_aside(step)
            _sync('a checkpoint set aside')
        if failures:
            raise RuntimeError(
                f'no checkpoint in {self._folder} can be read ({"; ".join(failures)}); they were '
                f'moved to {self._broken()}. Start again with an empty --workdir, or put a good '
                'copy back.'
            )
        return None

    def latest_metadata(self) -> dict[str, Any] | None:
        """Metadata of the newest readable step, or None."""
        for step in _of_first_host(sorted(self._open().all_steps(), reverse=True)):
            try:
                return read_metadata(self._folder / str(step))
            except NewerFormatError:
                raise
            except ValueError:
                continue  # `restore_latest` will set it aside
        return None

    def best_step(self) -> int | None:
        """The step with the best validation top-1."""
        return self._open().best_step()

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

    def _set_damaged_aside(self) -> None:
        """Bare folders, and steps with damaged metrics: with these the manager would not open."""
        for step in _step_folders(self._folder):
            try:
                json.loads((step / 'metrics' / 'metrics').read_text())
            except (ValueError, OSError) as error:
                log.error('checkpoint %s is damaged: %s', step, str(error).splitlines()[0])
                self._set_aside(int(step.name))

    def _set_aside(self, step: int) -> None:
        target = self._broken() / str(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        if '://' in os.fspath(target):  # there, a folder is only what holds something
            (target.parent / 'README').write_bytes(b'Checkpoints that could not be read.\n')
        if target.exists():
            target.rmtree()
        (self._folder / str(step)).rename(target)


def _sync(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _all_hosts(fine: bool) -> bool:
    """Whether it is true on every host."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(np.bool_(fine)).all())


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


def find_checkpoint(workdir: str | os.PathLike[str], step: int | None = None) -> epath.Path:
    """Folder of a step of a run, the newest unless a step is named.

    Raises:
      ValueError: no run, or no such step.
    """
    folder = _folder(workdir)
    steps = [int(p.name) for p in _step_folders(folder) if (p / 'metadata').exists()]
    if not steps:
        raise ValueError(f'{workdir} holds no checkpoints; pass the --workdir of a run')
    if step is not None and step not in steps:
        raise ValueError(f'{workdir} has no checkpoint of step {step}; it has {steps}')
    return folder / str(steps[-1] if step is None else step)


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Metadata of one step.

    Raises:
      ValueError: not a checkpoint of this library, or of a newer format.
    """
    try:
        metadata = ocp.JsonCheckpointHandler().restore(folder / 'metadata')
        version = metadata['format_version']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{folder} is not a checkpoint of a dist_jax run ({error})') from error
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f'{folder} has format_version={version}, this library reads up to {FORMAT_VERSION}; '
            'update dist_jax'
        )
    return metadata


def _trained_name(folder: epath.Path) -> str:
    """Where a step keeps the parameters that are used: their average if the run kept one."""
    averaged = read_metadata(folder)['config']['optimizer']['ema_decay'] > 0
    return 'ema' if averaged else 'params'


def read_variables(folder: epath.Path, abstract: Tree) -> Tree:
    """What evaluation applies: parameters (their average if there is one) and collections.

    Args:
      folder: of one step.
      abstract: {'params': ..., **collections} with shapes, dtypes and shardings.
    """
    name = _trained_name(folder)
    extra = dict(abstract)
    wanted = {name: extra.pop('params')}
    if extra:
        wanted['extra'] = extra
    found = read_tree(folder / 'state', wanted)
    return {'params': found[name], **found.get('extra', {})}


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds the checkpoints of a run."""
    return _folder(path).exists()


def stored_shapes(folder: epath.Path) -> Tree:
    """Trainable parameters of one step as `jax.ShapeDtypeStruct` leaves; nothing is read."""
    stored = ocp.PyTreeCheckpointHandler().metadata(folder / 'state').tree
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored[_trained_name(folder)]
    )


def read_host_params(folder: epath.Path) -> Tree:
    """Trainable parameters of one step in host memory: their average if the run kept one."""
    name = _trained_name(folder)
    return read_tree(folder / 'state', {name: stored_shapes(folder)}, as_numpy=True)[name]


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values: tuples become lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value

    return convert(config.to_dict())


def check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to continue a run under other settings.

    Args:
      saved: metadata of the checkpoint.
      current: metadata of this process.

    Raises:
      ValueError: listing every field that differs.
    """
    before, now = BEFORE_FIELDS | flat(saved['config']), flat(current['config'])
    differences = [
        f'  {name}: saved {before.get(name, "absent")!r}, now {now.get(name, "absent")!r}'
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(FREE_FIELDS)
    ]
    for name in ('class_names', 'train_list_sha256'):
        if saved[name] != current[name]:
            differences.append(f'  {name}: the data set is not the one the run was started with')
    if saved['backbone']['params_sha256'] != current['backbone']['params_sha256']:
        differences.append(
            f'  backbone.checkpoint: weights {saved["backbone"]["params_sha256"][:12]} of '
            f'{saved["backbone"]["name"]}, now {current["backbone"]["params_sha256"][:12]} of '
            f'{current["backbone"]["name"]}'
        )
    if differences:
        way_out = 'Restore these fields, or choose another --workdir.'
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


def flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """A nested config as 'group.field' names."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f'{prefix}{key}.')
        else:
            found[f'{prefix}{key}'] = value
    return found
