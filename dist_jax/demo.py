"""The demo: DiST and a frame-only baseline on clips whose classes differ only in motion.

Their frozen backbone, the small CLIP that comes with the package, is asked by words alone, too: for
what is seen in clips of the world that it was trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dist_jax import drawing, evaluate, filmstrips, recipe
from dist_jax.configs import base, dist, frame_mean, zero_shot
from dist_jax.scalars import BASELINE, VALIDATION, ZERO_SHOT, percent
from dist_jax.tasks.api import Picture, Table
from dist_jax.train import train
from dist_jax.trained import Trained

FILMSTRIPS = 'filmstrips.png'
# In the run's folder, for a person.
FILES = {
    FILMSTRIPS: 'six clips: what DiST says, what is true, where it looked',
    'report.html': 'the same, curves, tables, config',
}

# What all models stand on, and where the classes of motion and of looks are.
MOTION = {**base.TINY_CLIP, 'data.name': 'motion_clips'}
# Over MOTION: two of three blocks, for the time; higher rates learn late or never.
DIST = {
    'model.head': 'text',
    'model.selected_layers': (1, 2),
    'optimizer.peak_lr': 1e-3,
    'optimizer.b2': 0.999,
    'optimizer.schedule': 'linear',
    'optimizer.warmup_epochs': 1.0,
}
LOOKS = {**base.TINY_CLIP, 'data.name': 'motion_world_looks'}
# Of the benchmark, only validation clips are looked at.
LOOKS_FILES = {
    'num_train': 1,
    'num_val': 320,
    'num_test': 1,
    'num_new_looks': 1,
    'num_new_motions': 1,
}


def run_demo(workdir: str, num_steps: int = 0) -> dict[str, Any]:
    """Trains two models on the same clips, frozen backbone and number of steps.

    Args:
      workdir: of DiST's run, with its clips in `data`, the baseline's run in `frame_only` and the
        evaluation of the backbone in `zero_shot`; it gets FILMSTRIPS, too. Started again, runs
        continue where they were.
      num_steps: of each; 0 for what the configs say.

    Returns:
      DiST's summary with `frame_only_top1`, `frame_only_seconds` and `chance`, and of the backbone
      alone `zero_shot_top1` and `zero_shot_chance`: those of the classes of looks.
    """
    clips = os.path.join(workdir, 'data')
    baseline = _config(frame_mean, MOTION, clips)
    config = _config(dist, MOTION | DIST, clips)
    for each in (baseline, config):
        each.num_steps = num_steps or each.num_steps
    frame_only = train(baseline, os.path.join(workdir, 'frame_only'))
    if frame_only['interrupted']:
        return frame_only
    zero_shot_folder = os.path.join(workdir, 'zero_shot')
    looks = _config(zero_shot, LOOKS, os.path.join(zero_shot_folder, 'data'))
    recipe.make_builtin(looks.data.name, looks.data.root, **LOOKS_FILES)
    by_words, judged = evaluate.run(looks, '', None, zero_shot_folder)
    figures = {
        'frame_only_top1': frame_only['val_top1'],
        'frame_only_seconds': frame_only['seconds'],
        'chance': 1 / frame_only['num_classes'][0],
        'zero_shot_top1': by_words['top1'],
        'zero_shot_chance': 1 / judged.num_classes[0],
    }
    return train(config, workdir, figures, lambda trained: _show(trained, config, workdir))


def comparison(summary: Mapping[str, Any]) -> Table:
    """What the models are worth, from the summary of `run_demo`."""

    def row(name: str, start: str, start_of_chance: str = '') -> tuple[str, ...]:
        names = (f'{start}top1', f'{start_of_chance}chance')
        return name, *(percent(summary.get(each)) for each in names)

    rows = (
        row('frame-only baseline, motion', BASELINE),
        row('frozen backbone, zero-shot, looks', ZERO_SHOT, ZERO_SHOT),
        row('DiST, motion', VALIDATION),
    )
    return Table('', ('model, what it tells', 'top-1', 'chance'), rows)


def _config(family: Any, fields: Mapping[str, Any], root: str) -> ConfigDict:
    """The demo of a family with these fields, on the clips in a folder."""
    config = family.get_config('demo')
    config.update_from_flattened_dict(fields)
    config.data.root = root
    return config


def _show(trained: Trained, config: ConfigDict, workdir: str) -> Sequence[Picture]:
    """Draws what DiST says of a few clips: a file, and a picture for the report."""
    if jax.process_count() > 1:
        return ()  # single videos are predicted on a single host
    config = ConfigDict(config)
    recipe.prepare_builtin_data(config, workdir)
    clips = filmstrips.tell(trained, config, recipe.open_split(config, 'val'))
    picture = drawing.png(lambda: filmstrips.draw(clips))
    (epath.Path(workdir) / FILMSTRIPS).write_bytes(picture)
    return (
        Picture(
            'What DiST says of six clips',
            lambda: filmstrips.draw(clips),
            text='; '.join(f'{clip.verdict} ({clip.sure}), {clip.true}' for clip in clips),
        ),
    )
