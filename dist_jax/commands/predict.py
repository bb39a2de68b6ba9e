"""Top-5 of single videos."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, split, start_jax, wrong_usage
from dist_jax.config_arguments import UsageError, named_fields, read_config

SUMMARY = 'top-5 of single videos, with a picture of each'
HELP = """\
examples:
  dist_jax predict --workdir=runs/b16 video.mp4
  dist_jax predict --workdir=runs/b16 --output=pictures --json=top5.json videos/
      every video in a folder
  dist_jax predict --workdir=runs/b16 --labels=my_classes.txt --config.eval.fusion=0.5 video.mp4
      choose among other class names, one a line, averaged with the frozen CLIP (text head only)
  dist_jax predict --workdir=runs/b16 --attention video.mp4
      where the model's query looked, as a sheet of frames and as an animation

Needs the run and its backbone, not the training data; if the backbone has moved, pass
--config.backbone.checkpoint=FOLDER. Exit code 1: a video could not be read.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('predict', 'Top-5 of single videos, with a picture of each.', HELP)
    found.add_argument(
        'videos', nargs='+', metavar='VIDEO', help='videos or pictures, and folders of them'
    )
    found.add_argument('--workdir', required=True, help='folder of the run')
    found.add_argument(
        '--step', help="checkpoint to use: a number or 'best'; the newest by default"
    )
    found.add_argument(
        '--output', default='', help='folder of the pictures; WORKDIR/predictions by default'
    )
    found.add_argument(
        '--labels', default='', metavar='FILE', help='other class names; text head only'
    )
    found.add_argument('--json', default='', metavar='FILE', help='write the top-5 as JSON')
    found.add_argument(
        '--attention', action='store_true', help="also draw where the model's query looked"
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    with wrong_usage():
        paths.check_run(arguments.workdir)
        paths.check_inputs(named_fields(config_arguments), ())
        videos = paths.find_videos(arguments.videos)
    if arguments.labels and not os.path.exists(arguments.labels):
        raise UsageError(f'--labels: no file {arguments.labels}')
    from dist_jax import predict, trained

    config = read_config(config_arguments, trained.saved_config(arguments.workdir, arguments.step))
    start_jax()
    return predict.run(
        config,
        arguments.workdir,
        arguments.step,
        videos,
        arguments.output,
        arguments.labels,
        arguments.json,
        arguments.attention,
    )
