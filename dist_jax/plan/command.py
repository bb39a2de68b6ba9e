"""`dist_jax plan`, once its arguments are read."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax.configs import base
from dist_jax.json_file import write_json
from dist_jax.plan import cache, compiling, figures, search, tables
from dist_jax.plan.topology import Topology, devices, versions
from dist_jax.sharding import batch_parts, make_mesh

log = logging.getLogger('dist_jax')

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """One config to plan.

    Attributes:
      label: how it is called in tables.
      config: of the experiment.
      gradients: where gradients flow; see `gradients`.
    """

    label: str
    config: ConfigDict
    gradients: str = 'frozen'


@dataclasses.dataclass(frozen=True)
class Options:
    """How to plan.

    Attributes:
      evaluate: also the eval step.
      search_batch: also the largest batch that fits.
      cache: folder of compiled programs; '' for none.
    """

    evaluate: bool = True
    search_batch: bool = False
    cache: str = ''


def run(
    requests: Sequence[Request],
    topology: Topology,
    options: Options,
    json_file: str = '',
    picture: str = '',
) -> int:
    """Plans, prints, writes; returns the exit code."""
    planner = Planner(topology, options.cache)
    plans = [planner.plan(request, options) for request in requests]
    if len(plans) == 1:
        tables.print_plan(plans[0])
    else:
        tables.print_comparison(plans)
    if json_file:
        written = plans[0] if len(plans) == 1 else planner.context() | {'plans': plans}
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(json_file), written)
    if picture:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        tables.draw(plans, picture)
    return 0


class Planner:
    """Compiles for one topology."""

    def __init__(self, topology: Topology, cache_folder: str = ''):
        self.topology = topology
        self._cache = cache_folder
        self._devices = devices(topology)
        self._versions = versions(self._devices)
        self._calibration: dict[str, Any] = {}

    def context(self) -> dict[str, Any]:
        """What all plans share: topology, chip, versions, calibration."""
        return {
            'format_version': FORMAT_VERSION,
            'topology': str(self.topology),
            'chips': self.topology.num_chips,
            'num_slices': self.topology.num_slices,
            'chip': dataclasses.asdict(self.topology.chip),
            'versions': self._versions,
            'calibration': self.calibration(),
        }

    def calibration(self) -> dict[str, Any]:
        """What the estimate says of a plain product, where one knows what to expect."""
        if not self._calibration:
            chip = self.topology.chip
            compiled = self._compile('calibration', compiling.calibration_step(self._devices))
            found = figures.cycles(figures.hlo.read_program(compiled.text), chip)
            seconds = found['estimated_cycles'] / chip.clock
            self._calibration = {
                'size': compiling.CALIBRATION_SIZE,
                'cycles': found['estimated_cycles'],
                'seconds': seconds,
                'share_of_peak': 2 * compiling.CALIBRATION_SIZE**3 / seconds / chip.peak_flops,
            }
        return self._calibration

    def plan(self, request: Request, options: Options) -> dict[str, Any]:
        """The figures of one config; see `dist_jax plan --help`.

        Raises:
          ValueError: a field of the config does not fit the model or the topology.
        """
        config = request.config
        found = self.context() | {
            'label': request.label,
            'gradients': request.gradients,
            'config': base.plain(config),
            'step': 'train',
        }
        mesh = make_mesh(self._devices, **config.mesh)
        found['mesh'] = dict(mesh.shape)
        one = compiling.train_step(config, mesh, request.gradients)
        found |= self._figures(f'{request.label}, train step', one)
        found['model_flops_parts'] = dataclasses.asdict(one.model_flops)
        found['eval'] = self._evaluation(request, mesh, found) if options.evaluate else None
        found['search'] = self._search(request, mesh, found) if options.search_batch else None
        return found

    def _evaluation(self, request: Request, mesh: Mesh, trained: dict[str, Any]) -> dict[str, Any]:
        try:
            one = compiling.eval_step(request.config, mesh)
        except ValueError as error:  # the train step is a plan all the same
            return {'error': str(error)}
        found = self._figures(f'{request.label}, eval step', one)
        found['model_flops_parts'] = dataclasses.asdict(one.model_flops)
        # While a run evaluates, what only training needs stays where it is, the last batch too.
        memory = trained['hbm_bytes_per_chip']
        state = ('trainable', 'optimizer', 'average', 'other_state', 'batch')
        held = sum(memory.get(kind, 0) for kind in state)
        held -= found['hbm_bytes_per_chip']['trainable']
        found['hbm_bytes_per_chip']['held_for_training'] = held
        if found['hbm_bytes_needed'] is not None:
            found['hbm_bytes_needed'] += held
            found['fits'] = found['fits'] and found['hbm_bytes_needed'] <= found['hbm_bytes_limit']
        return found

    def _search(self, request: Request, mesh: Mesh, found: dict[str, Any]) -> dict[str, Any]:
        # Sizes are clips of one part of the batch, of which several chips may share one.
        parts, groups = batch_parts(mesh), request.config.batch_norm.groups
        granule = request.config.accumulation * groups // math.gcd(parts, groups)
        first = request.config.batch_size // parts
        known = {first: (found['fits'], found['hbm_bytes_needed'])}

        def attempt(size: int) -> search.Trial:
            if size not in known:
                config = copy.deepcopy(request.config)
                config.batch_size = size * parts
                one = compiling.train_step(config, mesh, request.gradients)
                figure = self._figures(f'{request.label}, {config.batch_size} clips', one)
                known[size] = (figure['fits'], figure['hbm_bytes_needed'])
            return search.Trial(size, *known[size])

        def per_chip(size: int | None) -> float | None:
            return None if size is None else size * parts / self.topology.num_chips

        trials = search.largest_fitting(attempt, first, found['hbm_bytes_limit'], granule=granule)
        failing = min((trial.size for trial in trials if not trial.fits), default=None)
        return {
            'largest_clips_per_chip': per_chip(search.best(trials)),
            'smallest_that_does_not_fit': per_chip(failing),
            'trials': [
                {
                    'clips_per_chip': per_chip(trial.size),
                    'fits': trial.fits,
                    'hbm_bytes_needed': trial.needed,
                }
                for trial in trials
            ],
        }

    def _figures(self, what: str, one: compiling.Step) -> dict[str, Any]:
        return figures.step_figures(one, self._compile(what, one), self.topology)

    def _compile(self, what: str, one: compiling.Step) -> compiling.Compiled:
        lowered = one.function.lower(*one.arguments.values())
        name = cache.key(lowered.as_text(debug_info=True), str(self.topology), self._versions)
        found = cache.read(self._cache, name)
        if found is None:
            started = time.monotonic()
            log.info('compiling for %s: %s', self.topology, what)
            found = compiling.compile_lowered(lowered)
            log.info('compiled in %.0f s', time.monotonic() - started)
            cache.write(self._cache, name, found)
        return found
