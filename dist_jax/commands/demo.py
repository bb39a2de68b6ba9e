"""Trains on built-in clips and compares."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax import pod
from dist_jax.commands.arguments import make_parser, start_jax

SUMMARY = 'make clips, train DiST and a frame-only baseline, compare'
HELP = """\
examples:
  dist_jax demo
  dist_jax demo --workdir=/tmp/demo --num_steps=50

Makes H.264 clips whose classes differ only in motion; a classifier on the mean of frozen frames
stays at chance on them, DiST does not. The frozen backbone is asked by words alone, too, for what
is seen. Ends with filmstrips.png: what DiST says of six clips. Started again, it continues.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('demo', 'Train DiST and a frame-only baseline on built-in clips.', HELP)
    found.add_argument('--workdir', default='runs/demo', help='folder of both runs (%(default)s)')
    found.add_argument('--num_steps', type=int, default=0, help="of each; the configs' by default")
    return found


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    start_jax()
    from dist_jax import demo
    from dist_jax.reports import console

    summary = demo.run_demo(arguments.workdir, arguments.num_steps)
    console.print_comparison(arguments.workdir, summary, demo.comparison(summary), demo.FILES)
    return pod.AGAIN if summary.get('interrupted') else 0
