"""The demo: DiST and a frame-only baseline on clips whose classes differ only in motion."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import dist, frame_mean
from dist_jax.train import train, write_json


def run_demo(workdir: str, num_steps: int = 0) -> dict[str, Any]:
    """Trains both models on the same clips, frozen backbone and number of steps.

    Args:
      workdir: of DiST's run; the baseline's lies in its folder `frame_only`. Started again, both
        continue where they were.
      num_steps: of each; 0 for what the configs say.

    Returns:
      DiST's summary with `frame_only_top1`, `chance` and the `seconds` of both together; also
      written to `WORKDIR/summary.json`.
    """
    started = time.monotonic()
    config = dist.get_config('demo')
    baseline = frame_mean.get_config('demo')
    if num_steps:
        for each in (config, baseline):
            each.num_steps = num_steps
    summary = train(config, workdir)
    if summary['interrupted']:
        return summary
    share(baseline, workdir)
    frame_only = train(baseline, os.path.join(workdir, 'frame_only'))
    if frame_only['interrupted']:
        return frame_only
    summary |= {
        'frame_only_top1': frame_only['val_top1'],
        'chance': 1 / frame_only['num_classes'][0],
        'seconds': round(time.monotonic() - started, 2),
    }
    write_json(Path(workdir) / 'summary.json', summary)
    return summary


def share(baseline: ConfigDict, workdir: str) -> None:
    """Points the baseline to the clips and the backbone of DiST's run."""
    baseline.data.root = os.path.join(workdir, 'data')
    baseline.backbone.checkpoint = os.path.join(workdir, 'backbone')
