"""The demo: DiST and a frame-only baseline on clips whose classes differ only in motion."""

from __future__ import annotations

import os
from typing import Any

from configs import dist, frame_mean
from dist_jax.train import train


def run_demo(workdir: str, num_steps: int = 0) -> dict[str, Any]:
    """Trains both models on the same clips, frozen backbone and number of steps.

    Args:
      workdir: of DiST's run, with the clips in `data` and the baseline's run in `frame_only`.
        Started again, both continue where they were.
      num_steps: of each; 0 for what the configs say.

    Returns:
      DiST's summary with `frame_only_top1`, `frame_only_seconds` and `chance`.
    """
    baseline = frame_mean.get_config('demo')
    config = dist.get_config('demo')
    for each in (baseline, config):
        # Both read the same clips; each makes the same random backbone.
        each.data.root = os.path.join(workdir, 'data')
        each.num_steps = num_steps or each.num_steps
    frame_only = train(baseline, os.path.join(workdir, 'frame_only'))
    if frame_only['interrupted']:
        return frame_only
    figures = {
        'frame_only_top1': frame_only['val_top1'],
        'frame_only_seconds': frame_only['seconds'],
        'chance': 1 / frame_only['num_classes'][0],
    }
    return train(config, workdir, figures)
