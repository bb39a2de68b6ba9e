"""Training: the list of set-up calls, then the loop.

A run is a pure function of its config, data and backbone: started again in its workdir after any
interruption, it ends with the same parameters, bit for bit, on the same mesh.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dist_jax import checkpoint, ending, experiment, init_from, optim, pod, recipe, step
from dist_jax.configs import base
from dist_jax.evaluate import BadVideosError, Evaluation, evaluate
from dist_jax.json_file import write_json
from dist_jax.metric_writer import MetricWriter
from dist_jax.metrics import NonFiniteScoresError
from dist_jax.mixup import Mixing
from dist_jax.models import converted
from dist_jax.models.api import Model, Tree
from dist_jax.models.backbone import Backbone
from dist_jax.models.params import tree_sha256
from dist_jax.progress import Bar, duration
from dist_jax.reports import page
from dist_jax.scalars import VALIDATION
from dist_jax.sharding import (
    feed,
    make_mesh,
    shardings,
    to_global,
    to_host,
)
from dist_jax.tasks.api import Labels, Picture, Table, Task, labels_of
from dist_jax.trained import Trained
from dist_jax.views import Views
from dist_jax.watching import profiling, sinks, stall
from dist_jax.workdir_lock import locked
from input_pipeline import pipeline
from input_pipeline.bad_videos import BadVideoLog
from input_pipeline.batches import Batches
from input_pipeline.video_list import LabelledSource
from input_pipeline.workers import Skipped

log = logging.getLogger('dist_jax')

# Steps that may be on the device while the host goes on; their losses are checked when they end.
# The batch of the next is sent before the oldest is waited for.
STEPS_IN_FLIGHT = 2
BATCHES_ON_DEVICE = STEPS_IN_FLIGHT + 1
# Steps after which hosts count their unreadable videos together, in a run that logs no figures.
COUNTED_EVERY = 100
FEWEST_LINES = 3  # of figures, as many as make a curve
SHORT_LINES = 10  # of a run that would have fewer
SILENCE = 60.0  # seconds without a line of figures after which one says how far the run is
LONG_WARMUP = 0.5  # share of a run beyond which its warm-up is worth a warning


class NonFiniteError(FloatingPointError):
    """Loss or gradients became infinite or NaN; the message names the step and the clips."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Lengths of a run, in optimizer steps."""

    total_steps: int
    eval_every: float  # infinite: only after the last step
    steps_per_epoch: float

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation follows after this many steps; one follows the last."""
        return self._passes(self.eval_every, done)

    def ends_epoch(self, done: int) -> bool:
        """Whether an epoch ended with the newest of this many steps, or the run."""
        return self._passes(self.steps_per_epoch, done)

    def _passes(self, every: float, done: int) -> bool:
        passed = math.floor(done / every) > math.floor((done - 1) / every)
        return passed or done == self.total_steps


def make_plan(config: ConfigDict, num_videos: int) -> Plan:
    """Steps of a run over a list of this length.

    Each video gives data.repeats clips; they make an epoch longer, or take the place of other
    videos in it (data.repeats_extend_epoch).

    Raises:
      ValueError: the run would have no step.
    """
    repeats = config.data.repeats if config.data.repeats_extend_epoch else 1
    per_epoch = num_videos * repeats / config.batch_size
    total = config.num_steps or math.floor(config.num_epochs * per_epoch)
    if total < 1:
        raise ValueError(
            f'{num_videos} videos, num_epochs={config.num_epochs} and batch_size='
            f'{config.batch_size} make no step; set num_steps, num_epochs or batch_size'
        )
    every = config.eval.every_epochs
    return Plan(total, max(1.0, every * per_epoch) if every else math.inf, per_epoch)


def optimizer_settings(config: ConfigDict, plan: Plan) -> optim.OptimizerSettings:
    """The recipe's optimizer at the length of this run."""
    o = config.optimizer
    per_epoch = config.num_steps / config.num_epochs if config.num_steps else plan.steps_per_epoch
    return optim.OptimizerSettings(
        peak_lr=o.peak_lr,
        warmup_start_lr=o.warmup_start_lr,
        warmup_steps=o.warmup_epochs * per_epoch,
        total_steps=plan.total_steps,
        end_lr=o.end_lr,
        warmup=o.warmup,
        weight_decay=o.weight_decay,
        decay_all=o.decay_all,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        clip_norm=o.clip_norm,
        clip_tensor_norm=o.clip_tensor_norm,
        name=o.name,
        schedule=o.schedule,
        after_warmup=o.after_warmup,
        refresh_steps=o.refresh_steps,
        steps_per_epoch=per_epoch,
        momentum=o.momentum,
        nesterov=o.nesterov,
    )


def log_schedule(config: ConfigDict, settings: optim.OptimizerSettings) -> None:
    """Says what the learning rate will do, and warns of a run that is mostly warm-up."""
    log.info('learning rate: %s', optim.describe_schedule(settings))
    if settings.warmup_steps > LONG_WARMUP * settings.total_steps:
        top = float(optim.make_schedule(settings)(settings.warmup_steps))
        log.warning(
            'the warm-up takes %.0f %% of the run (optimizer.warmup_epochs=%s of num_epochs=%s) '
            'and ends at a learning rate of %.3g, where optimizer.peak_lr=%.3g',
            100 * settings.warmup_steps / settings.total_steps,
            *(config.optimizer.warmup_epochs, config.num_epochs, top, settings.peak_lr),
        )


def step_settings(config: ConfigDict) -> step.StepSettings:
    """The part of the recipe that is compiled into the step."""
    return step.StepSettings(
        mixing=Mixing(**config.mixing.to_dict()),
        accumulation=config.accumulation,
        ema_decay=config.optimizer.ema_decay,
        seed=config.seed,
    )


def state_initialiser(
    config: ConfigDict,
    model: Model,
    task: Task,
    train_shape: tuple[int, ...],
    settings: optim.OptimizerSettings,
) -> Any:
    """frozen tree -> fresh state."""
    return functools.partial(
        step.init_state,
        model,
        task,
        video_shape=(1, *train_shape),
        seed=config.seed,
        make_optimizer=lambda p: optim.of_model(model, p, settings),
        ema=config.optimizer.ema_decay > 0,
    )


def train(
    config: ConfigDict,
    workdir: str,
    also: Mapping[str, Any] | None = None,
    show: Callable[[Trained], Sequence[Table | Picture]] = lambda trained: (),
) -> dict[str, Any]:
    """Trains to the end of the config, or continues a run that was interrupted.

    Args:
      config: of one experiment; see `configs/base.py`.
      workdir: folder of the run, or a bucket URL; all hosts must see the same. It gets
        `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `config.json`, `parameters.txt`,
        `bad_videos.jsonl` if there are any (one a host), and at the end `summary.json` and
        `report.html`.
      also: figures from elsewhere that belong into the summary and the report.
      show: what the report shows first, made of the trained model; called on the first host, once
        the run is at its end.

    Returns:
      The summary: step, figures of the last evaluation after `val_`, params_sha256, seconds and
      more; with `interrupted` true after SIGTERM or Ctrl-C, and with `val_error` if the last
      evaluation gave no figures.
      `seconds` is the time in this function, of all starts together; what a killed start did after
      its newest checkpoint is done and counted again.

    Raises:
      ValueError: a field, a file or an earlier run in the workdir does not fit; the message says
        what to change.
      NonFiniteError: the loss stopped being a number.
      TooManyBadVideos: more unreadable videos than data.max_bad_share allows.
      InUseError: another process trains in the workdir.
    """
    started = time.monotonic()
    config = ConfigDict(config)
    mesh = make_mesh(**config.mesh)
    experiment.check(config, mesh)  # before anything is written
    experiment.check_trains(config)
    with locked(workdir), sinks.watched(config, workdir) as watchers:
        return _train(config, workdir, mesh, started, watchers, also, show)


def _train(
    config: ConfigDict,
    workdir: str,
    mesh: Mesh,
    started: float,
    watchers: sinks.Sinks,
    also: Mapping[str, Any] | None,
    show: Callable[[Trained], Sequence[Table | Picture]],
) -> dict[str, Any]:
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    with config.unlocked():
        recipe.prepare_builtin_data(config, workdir)
        recipe.resolve_paths(config)
    train_source = recipe.open_split(config, 'train')
    val_source = recipe.open_split(config, 'val') if config.data.val_list else None
    labels = labels_of(train_source)
    needs_classes = recipe.task_kind(config).needs_classes
    if needs_classes and val_source is not None and labels_of(val_source) != labels:
        raise ValueError(
            f'{config.data.train_list} and {config.data.val_list} have different classes; '
            'name one file of class names for both in data.label_map'
        )
    verify = config.checkpoint.verify
    parts = experiment.assemble(config, labels, experiment.find_backbone(config, workdir))
    task, model = parts.task, parts.model
    task.check_list(train_source, 'data.train_list')
    if val_source is not None:
        task.check_list(val_source, 'data.val_list')
    train_source = task.samples(train_source)
    train_reader = recipe.train_reader(config, model.pixels, labels, task.annotate)
    frozen = parts.load_frozen(mesh, verify=verify)

    plan = make_plan(config, len(train_source))
    optimizer = optimizer_settings(config, plan)
    if jax.process_index() == 0:
        log_schedule(config, optimizer)
    initialise = state_initialiser(config, model, task, parts.train_shape, optimizer)
    abstract = step.place_state(model, jax.eval_shape(initialise, frozen), mesh)
    train_step = step.make_train_step(
        model,
        task,
        optim.of_model(model, abstract.params, optimizer),
        optim.make_schedule(optimizer),
        step_settings(config),
        mesh,
        abstract,
        frozen,
    )
    metadata = run_metadata(config, parts, train_source)

    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep, verify)
    saved = checkpoints.latest_metadata()
    if saved is not None:
        earlier = saved | {'config': recipe.with_full_origin(saved['config'])}
        checkpoint.check_same_run(earlier, metadata)
    restored = checkpoints.restore_latest(abstract)
    if restored is not None:
        state = restored[0]
        log.info('continuing from step %d', int(state.step))
    else:
        state = jax.jit(initialise, out_shardings=shardings(abstract))(frozen)
        if origin := experiment.origin(config):
            init_from.compare_backbones(origin.path, parts.backbone)
            state = start_from(state, origin, model, task.labels)
        elif model.from_backbone:
            state = start_from_backbone(state, model, parts.backbone, verify)
    start = int(state.step)
    before = restored[1].get('seconds', 0.0) if restored is not None else 0.0

    def seconds() -> float:
        return round(before + time.monotonic() - started, 2)

    test_frozen = parts.load_test_frozen(mesh, verify=verify, trained=frozen)
    watchers.open(base.plain(config))
    writer = MetricWriter(
        workdir,
        start,
        config.log.tensorboard,
        evaluated=checkpoints.has_score(start),
        also=watchers.scalars,
    )
    _write_overview(workdir, writer, config, state, frozen)
    tested = (parts.test_model, task, mesh, abstract.eval_variables, test_frozen)
    run = _Loop(
        config=config,
        workdir=workdir,
        mesh=mesh,
        plan=plan,
        train_source=train_source,
        train_reader=train_reader,
        val_source=val_source,
        task=task,
        frozen=frozen,
        test_frozen=test_frozen,
        train_step=train_step,
        eval_step=step.make_eval_step(*tested),
        query_step=step.make_query_step(*tested),
        statistics_step=step.make_statistics_step(
            model, task, step_settings(config), mesh, abstract.params, frozen
        ),
        checkpoints=checkpoints,
        metadata=metadata,
        writer=writer,
        seconds=seconds,
        watch=stall.Watch(workdir, config.pod.stall_timeout),
        profile=profiling.Profile(workdir, config.log.profile, start, plan.total_steps),
    )
    try:
        state, result, interrupted = run(state)
    except BaseException as error:
        pod.suspect(error)
        raise
    finally:
        checkpoints.close()
        writer.close()
    best_step, best_score = checkpoints.best() or (None, None)
    figures = result.figures if result else None
    summary = {
        'step': int(state.step),
        'total_steps': plan.total_steps,
        'interrupted': interrupted,
        **{
            f'{VALIDATION}{name}': value
            for name, value in (figures.scalars if figures else {task.select_by: None}).items()
        },
        **({'val_error': run.val_error} if run.val_error else {}),
        'best_step': best_step,
        f'best_{VALIDATION}{task.select_by}': best_score,
        'num_bad_videos': run.num_bad_videos,
        'params_sha256': tree_sha256(to_host(converted.stored_tree(state.variables))),
        **({'num_classes': list(map(len, task.labels))} if task.labels else {}),
        'trainable_parameters': sum(x.size for x in jax.tree.leaves(state.params)),
        'devices': mesh.size,
        'seconds': (_finished_seconds(workdir) if start == plan.total_steps else None) or seconds(),
        **(also or {}),
    }
    if jax.process_index() == 0 and not interrupted:
        write_json(epath.Path(workdir) / 'summary.json', summary)
        variables = state.eval_variables
        shown = show(Trained(task, parts.test_model, test_frozen, variables, int(state.step)))
        page.write_report(workdir, summary, figures, shown)
        watchers.report(summary)
    if interrupted:
        watchers.stopped()
    return summary


def run_metadata(
    config: ConfigDict, parts: experiment.Experiment, source: LabelledSource
) -> dict[str, Any]:
    """What a checkpoint says of itself, for those who use it without the training data."""
    reader = recipe.eval_reader(config)
    return {
        'format_version': checkpoint.FORMAT_VERSION,
        'config': base.plain(config),
        'class_names': [list(names) for names in parts.task.labels],
        'train_list_sha256': recipe.list_sha256(source),
        'backbone': parts.backbone.identity() if parts.backbone else None,
        'preprocessing': {
            'pixels': 'uint8 RGB / 255, minus mean, over std',
            'mean': list(parts.model.pixels.mean),
            'std': list(parts.model.pixels.std),
        },
        'views': {
            key: value
            for key, value in dataclasses.asdict(reader).items()
            if key not in ('max_pixels', 'annotate')
        },
    }


def start_from(
    state: step.TrainState, origin: init_from.Origin, model: Model, labels: Labels
) -> step.TrainState:
    """A fresh state with the parameters and collections of another network."""
    variables = init_from.load_variables(origin, model, state.variables, labels)
    if model.begin is not None:
        variables = jax.jit(model.begin, out_shardings=shardings(variables))(variables)
    return _with_variables(state, variables)


def start_from_backbone(
    state: step.TrainState, model: Model, backbone: Backbone, verify: bool
) -> step.TrainState:
    """A fresh state with what the model takes from its backbone to train it."""
    taken = model.from_backbone
    params = init_from.load_from_backbone(taken, backbone, state.params, verify)
    return _with_variables(state, state.variables | {'params': params})


def _with_variables(state: step.TrainState, variables: Tree) -> step.TrainState:
    collections = dict(variables)
    params = collections.pop('params')
    ema = None if state.ema is None else step.fresh_average(variables)
    return state.replace(params=params, collections=collections, ema=ema)


def _finished_seconds(workdir: str) -> float | None:
    """The duration that the summary of a finished run holds; None without one."""
    path = epath.Path(workdir) / 'summary.json'
    try:
        return json.loads(path.read_text())['seconds']
    except (OSError, ValueError, KeyError, TypeError):
        return None  # killed before it was written


def _write_overview(
    workdir: str, writer: MetricWriter, config: ConfigDict, state: step.TrainState, frozen: Tree
) -> None:
    if jax.process_index() != 0:
        return
    write_json(epath.Path(workdir) / 'config.json', base.plain(config))
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    frozen_size = sum(x.size for x in jax.tree.leaves(frozen))
    overview += f'\nfrozen, beside these: {frozen_size:,}\n'
    (epath.Path(workdir) / 'parameters.txt').write_bytes(overview.encode())
    writer.write_texts(int(state.step), {'config': str(config), 'parameters': overview})


class _StopSignal:
    """Whether somebody asked this run to stop (SIGTERM, Ctrl-C), agreed between hosts.

    Before the first place to stop there is nothing to save, and the command ends at once.
    """

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self._places = 0
        self._own = ending.listen(continues=True, exits=False)

    def reached(self) -> bool:
        """Whether to stop here; every host must ask at the same places."""
        self._places += 1
        ending.hold(self._finish)
        stops = pod.stops_at(self._places)
        if stops:
            ending.stopping()
        return stops

    def restore(self) -> None:
        ending.release()
        if self._own:
            ending.stop_listening()


@dataclasses.dataclass
class _Loop:
    config: ConfigDict
    workdir: str
    mesh: Mesh
    plan: Plan
    train_source: LabelledSource
    train_reader: pipeline.TrainReader
    val_source: LabelledSource | None
    task: Task
    frozen: Tree
    test_frozen: Tree
    train_step: Any
    eval_step: Any
    query_step: Any
    statistics_step: Any
    checkpoints: checkpoint.Checkpoints
    metadata: dict[str, Any]
    writer: MetricWriter
    seconds: Callable[[], float]  # of the run so far, over all starts
    watch: stall.Watch
    profile: profiling.Profile
    num_bad_videos: int = 0
    val_error: str = ''  # why the last evaluation gave no accuracy
    evaluated: bool = False  # whether the evaluation step is compiled
    known_bad: set[str] = dataclasses.field(default_factory=set)  # validation videos named so far
    val_skipped: Skipped = dataclasses.field(default_factory=Skipped)

    def __call__(self, state: step.TrainState) -> tuple[step.TrainState, Evaluation | None, bool]:
        """Runs to the end or to a stop signal: state, last evaluation, whether it was stopped."""
        config, plan = self.config, self.plan
        start = int(state.step)
        bad_videos = open_bad_videos(self.workdir, config, len(self.train_source))
        batches = self._batches(start, plan.total_steps, bad_videos)
        pending: collections.deque[tuple[int, dict[str, np.ndarray], Any]] = collections.deque()
        meter = _Meter(config.batch_size)
        result: Evaluation | None = None
        stop = _StopSignal(self.checkpoints.wait)
        stopped = False
        try:
            with self.watch, Bar('train', plan.total_steps, start, SILENCE) as bar:
                if start and self._evaluates_after(start):
                    # A signal has nothing to save here, and ends the command at once.
                    if not self.checkpoints.has_score(start):  # ended between save and score
                        result = self._validate(state, meter, bar)
                    elif start == plan.total_steps:
                        with self.watch.spared():
                            result = self._evaluate(state)
                for number in range(start, plan.total_steps):
                    if self.profile.starts_before(number):
                        self._settle(pending, 0)
                        self.profile.start()
                    pod.note(doing='reading')
                    with meter.waiting():
                        batch = next(batches)
                    pod.note(doing='computing')
                    bad_videos.add(batch)
                    device_batch = to_global({k: batch[k] for k in self._keys}, self.mesh)
                    if number == start:
                        bar.line('compiling the step')
                    # The call returns once the step is compiled, and does not wait for its result.
                    with self._compiling(meter) if number == start else self.profile.step(number):
                        state, metrics = self.train_step(state, self.frozen, device_batch)
                    names = {k: batch[k] for k in ('index', 'path')}
                    pending.append((number, names, metrics))
                    self._settle(pending, STEPS_IN_FLIGHT)
                    if self.profile.ends_after(number):
                        self._settle(pending, 0)
                        self.profile.stop()
                    meter.steps += 1
                    done = number + 1
                    self.watch.progress()
                    bar.update(done)
                    pod.note(step=done)

                    last = done == plan.total_steps
                    if last or _due(done, log_every(config, plan.total_steps)):
                        # The figures of this step: the loop waits here for the device.
                        scalars = self._settle(pending, 0) | meter.read()
                        scalars['epoch'] = done / plan.steps_per_epoch
                        pod.note(data_wait_seconds=scalars['data_wait_seconds'])
                        self.writer.write_scalars(done, scalars)
                        bar.update(done, f'{scalars["clips_per_second"]:.1f} clips/s')
                        bar.line(_line(scalars, plan.total_steps - done))
                    if last or _due(done, config.log.every_steps or COUNTED_EVERY):
                        share_bad_videos(bad_videos)
                    if config.batch_norm.precise_batches and plan.ends_epoch(done):
                        self._settle(pending, 0)
                        with self.watch.spared():
                            state = self._with_precise_statistics(state, meter, bar, bad_videos)
                    evaluating = self._evaluates_after(done)
                    stopped = stop.reached() and not last
                    due = _due(done, config.checkpoint.every_steps)
                    if evaluating or due or stopped or last:
                        self._settle(pending, 0)  # nothing that is not a number is saved
                        pod.note(doing='saving')
                        with self.watch.spared():
                            self.writer.flush()
                            self.checkpoints.save(
                                state, self.metadata | {'seconds': self.seconds()}
                            )
                    if evaluating and not stopped:  # after the save: nothing is lost if it fails
                        try:
                            result = self._validate(state, meter, bar, stop)
                        except ending.StoppedError:
                            stopped = True
                    if stopped:
                        bar.line(f'{ending.asked()}: saved step {done}; the same command continues')
                        break
            pod.note(doing='saving')
            self.checkpoints.wait()
        finally:
            self.profile.stop()
            stop.restore()
            batches.close()
            self.num_bad_videos = len(bad_videos)
        return state, result, stopped

    @contextlib.contextmanager
    def _compiling(self, meter: _Meter) -> Iterator[None]:
        with meter.pause(), self.watch.spared():
            yield

    @property
    def _keys(self) -> tuple[str, ...]:
        """What of a batch goes to the devices."""
        return ('video', 'mask', *self.task.element_spec)

    def _batches(self, start: int, end: int, bad_videos: BadVideoLog) -> Batches:
        """Those of steps `start` to `end` - 1 of the training stream."""
        return pipeline.train_batches(
            self.train_source,
            self.train_reader,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start,
            num_steps=end,
            host=feed(self.mesh),
            readers=recipe.readers(self.config),
            skipped=bad_videos.skipped,
        )

    def _with_precise_statistics(
        self, state: step.TrainState, meter: _Meter, bar: Bar, bad_videos: BadVideoLog
    ) -> step.TrainState:
        """The state with statistics that evaluation applies averaged over the next batches.

        They are those that the training stream goes on with, or would after the last step, so a run
        that is started again averages over the same. A stop waits for the end of it: what is saved
        of a step always has its own statistics.
        """
        pod.note(doing='averaging')
        config, done = self.config, int(state.step)
        bar.line(f'statistics of {config.batch_norm.precise_batches} batches')
        variables = state.eval_variables
        params = variables.pop('params')
        found = step.Statistics(variables, np.float32(0))
        batches = self._batches(done, done + config.batch_norm.precise_batches, bad_videos)
        waiting = collections.deque()
        with meter.pause(), contextlib.closing(batches):
            for number, batch in enumerate(batches, done):
                bad_videos.add(batch)
                device_batch = to_global({k: batch[k] for k in self._keys}, self.mesh)
                found = self.statistics_step(
                    params, self.frozen, device_batch, np.int32(number), found
                )
                waiting.append(found.parts)
                if len(waiting) > STEPS_IN_FLIGHT:
                    waiting.popleft().block_until_ready()
            jax.block_until_ready(found)
        return state.with_eval_collections(found.mean)

    def _evaluates_after(self, done: int) -> bool:
        return self.val_source is not None and self.plan.evaluates_after(done)

    def _validate(
        self, state: step.TrainState, meter: _Meter, bar: Bar, stop: _StopSignal | None = None
    ) -> Evaluation | None:
        """Evaluates a saved step, and records and logs its score if it has one."""
        pod.note(doing='evaluating')
        done = int(state.step)
        with meter.pause(), self.watch.spared():
            result = self._evaluate(state, stop)
            # The score comes last: without it all of this is done again.
            self.writer.write_scalars(done, _eval_figures(result))
            self.writer.flush()
            if result is not None:
                select_by = self.task.select_by
                self.checkpoints.add_score(done, select_by, result.figures.scalars[select_by])
        bar.line(_eval_line(result))
        return result

    def _settle(
        self, pending: collections.deque[tuple[int, dict[str, np.ndarray], Any]], keep: int
    ) -> dict[str, float]:
        """Waits for all but the newest `keep` steps; the figures of the last one waited for."""
        scalars: dict[str, float] = {}
        while len(pending) > keep:
            number, names, metrics = pending.popleft()
            scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not scalars.pop('finite'):
                clips = [f'{i} {path}' for i, path in zip(names['index'], names['path'])]
                advice = (
                    'The first step of a run has not learned anything: the likely cause is damaged '
                    'weights, of the backbone or of init_from, or numbers that bfloat16 cannot '
                    'hold (model.dtype=float32).'
                    if number == 0
                    else 'The newest checkpoint is from before. Lower optimizer.peak_lr, set '
                    'optimizer.clip_norm, or look at these videos.'
                )
                raise NonFiniteError(
                    f'step {number}: loss {scalars["loss"]}, gradient norm {scalars["grad_norm"]}. '
                    f'The run stopped. {advice} Records of this batch on this host: {clips}'
                )
        return scalars

    def _evaluate(
        self, state: step.TrainState, stop: _StopSignal | None = None
    ) -> Evaluation | None:
        """Accuracy on the validation list; None, after an error in the log, if there is none.

        What is wrong with the evaluation does no harm to the state: the run goes on.
        """
        config = self.config
        total = math.ceil(len(self.val_source) / config.eval.batch_size)
        self.val_error = ''
        with Bar('evaluate', total) as bar:
            first = '' if self.evaluated else ', compiling the step'
            bar.line(f'{len(self.val_source)} videos{first}')
            try:
                views = Views(
                    self.eval_step,
                    state.eval_variables,
                    self.test_frozen,
                    self.val_source,
                    recipe.eval_protocol(
                        config, self.task.eval_annotate, config.data.max_bad_share
                    ),
                    self.mesh,
                    input_keys=self.task.eval_input_keys,
                    skipped=self.val_skipped,
                    on_batch=bar.update,
                    should_stop=stop.reached if stop is not None else lambda: False,
                )
                result = evaluate(views, self.task, self.query_step)
            except (BadVideosError, NonFiniteScoresError) as error:  # the same on all hosts
                self.val_error = str(error).splitlines()[0]
                if jax.process_index() == 0:
                    log.error('the evaluation failed: %s', error)
                return None
        self.evaluated = True
        self._name_bad(result)
        return result

    def _name_bad(self, result: Evaluation) -> None:
        """Names the validation videos that could not be read, once each."""
        for path, reason in result.bad_videos:
            if path not in self.known_bad and jax.process_index() == 0:
                log.warning('cannot read validation video %s: %s', path, reason)
            self.known_bad.add(path)


class _Meter:
    """Splits time into waiting for data and the rest."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self._waited = self._paused = 0.0
        self._since = time.monotonic()

    def waiting(self) -> _Timer:
        return _Timer(self, '_waited')

    def pause(self) -> _Timer:
        return _Timer(self, '_paused')

    def read(self) -> dict[str, float]:
        """Figures since the last reading: clips a second, seconds a step by kind."""
        spent = time.monotonic() - self._since - self._paused
        steps = max(self.steps, 1)
        figures = {
            'clips_per_second': self._batch_size * steps / spent,
            'step_seconds': spent / steps,
            'data_wait_seconds': self._waited / steps,
            'compute_seconds': (spent - self._waited) / steps,
        }
        self._reset()
        return figures


class _Timer:
    def __init__(self, meter: _Meter, field: str):
        self._meter, self._field = meter, field

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        spent = time.monotonic() - self._start
        setattr(self._meter, self._field, getattr(self._meter, self._field) + spent)


def open_bad_videos(workdir: str, config: ConfigDict, total: int) -> BadVideoLog:
    """The report of this host, which knows what every host has reported so far."""
    own = 'bad_videos.jsonl'
    if jax.process_count() > 1:
        own = f'bad_videos_{jax.process_index()}.jsonl'
    folder = epath.Path(workdir)
    files = folder.iterdir() if folder.exists() else ()
    others = [p for p in files if p.match('bad_videos*.jsonl') and p.name != own]
    alone = jax.process_count() == 1
    return BadVideoLog(folder / own, config.data.max_bad_share, total, others, alone)


def share_bad_videos(log: BadVideoLog) -> None:
    """Lets every host count the unreadable videos of all; every host must call it.

    Raises:
      TooManyBadVideos: on all hosts, if all together have too many.
    """
    if jax.process_count() == 1:
        return
    counts = multihost_utils.process_allgather(np.int32(len(log.found)))
    if counts.sum() > log.num_shared:  # rare: once for a video
        log.num_shared = int(counts.sum())
        size = 1 << int(counts.max() - 1).bit_length()
        own = np.full(size, -1, np.int32)
        own[: len(log.found)] = log.found
        log.learn(i for i in multihost_utils.process_allgather(own).ravel().tolist() if i >= 0)
    log.check()


def log_every(config: ConfigDict, total_steps: int) -> int:
    """Steps between lines of figures, 0 for none: as configured, unless a run is short for that."""
    every = config.log.every_steps
    short = every * FEWEST_LINES > total_steps
    return min(every, max(1, total_steps // SHORT_LINES)) if short else every


def _due(done: int, every: int) -> bool:
    """Whether something follows after so many steps; 0 means never."""
    return every > 0 and done % every == 0


def _line(scalars: dict[str, float], steps_left: int) -> str:
    slowest = ''
    if member := pod.current():
        found = member.slowest('data_wait_seconds')
        if found and found[0] > max(
            2 * scalars['data_wait_seconds'], 0.1 * scalars['step_seconds']
        ):
            slowest = f'  {found[1]} waits {found[0]:.3f} s for data'
    return (
        f'epoch {scalars["epoch"]:.2f}  loss {scalars["loss"]:.4f}  '
        f'lr {scalars["learning_rate"]:.2e}  {scalars["clips_per_second"]:.1f} clips/s  '
        f'step {scalars["step_seconds"]:.3f} s (data {scalars["data_wait_seconds"]:.3f})  '
        f'ETA {duration(scalars["step_seconds"] * steps_left)}{slowest}'
    )


def _eval_figures(result: Evaluation | None) -> dict[str, float]:
    """What the log holds of an evaluation, failed if there is no result."""
    if result is None:
        return {f'{VALIDATION}failed': 1}
    return {f'{VALIDATION}{name}': value for name, value in result.figures.scalars.items()}


def _eval_line(result: Evaluation | None) -> str:
    if result is None:
        return 'validation: failed, see above'
    bad = f', {len(result.bad_videos)} unreadable' if result.bad_videos else ''
    return (
        f'validation: {result.figures.line}  '
        f'({result.num_videos} videos{bad}, {result.seconds:.1f} s)'
    )
