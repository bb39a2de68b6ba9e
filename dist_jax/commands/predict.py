"""Top-5 of single videos, or of windows over long ones."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from dist_jax import paths, times
from dist_jax.commands.arguments import make_parser, model_folder, split, start_jax, wrong_usage
from dist_jax.config_arguments import UsageError, named_fields, read_config

SUMMARY = 'top-5 of single videos, with a picture; what is said of long ones over time'
HELP = """\
examples:
  dist_jax predict --workdir=runs/b16 video.mp4
  dist_jax predict --workdir=runs/b16 --output=pictures --json=top5.json videos/
      every video in a folder
  dist_jax predict --workdir=runs/b16 --labels=my_classes.txt --config.eval.fusion=0.5 video.mp4
      choose among other class names, one a line, averaged with the frozen CLIP (text head only)
  dist_jax predict --workdir=runs/b16 --attention video.mp4
      where the model's query looked, as a sheet of frames and as an animation
  dist_jax predict --workdir=hf://owner/name video.mp4
      a model that `dist_jax push` put on the Hub
  dist_jax predict --workdir=runs/b16 --window=2s --stride=1s long.mp4
      what is said of a long video over time: table, JSON, CSV, subtitles, a picture
  dist_jax predict --workdir=runs/b16 --window=2s --smooth=5 --threshold=0.5 --annotate long.mp4
      averaged over 5 windows, nothing below 50 %, and the video with the classes drawn on it

Needs the run and its backbone, not the training data; if the backbone has moved, pass
--config.backbone.checkpoint=FOLDER. Exit code 1: a video could not be read.
"""

WINDOW_OPTIONS = ('window', 'stride', 'smooth', 'threshold', 'annotate', 'batch_size')


def parser() -> argparse.ArgumentParser:
    found = make_parser('predict', 'Top-5 of single videos, with a picture of each.', HELP)
    found.add_argument(
        'videos', nargs='+', metavar='VIDEO', help='videos or pictures, and folders of them'
    )
    found.add_argument(
        '--workdir', required=True, help='folder of the run, or a release of one: hf://owner/name'
    )
    found.add_argument(
        '--step', help="checkpoint to use: a number or 'best'; the newest by default"
    )
    found.add_argument(
        '--output',
        default='',
        help='folder of the pictures; WORKDIR/predictions by default, of hf:// predictions',
    )
    found.add_argument(
        '--labels', default='', metavar='FILE', help='other class names; text head only'
    )
    found.add_argument('--json', default='', metavar='FILE', help='write the top-5 as JSON')
    found.add_argument(
        '--attention', action='store_true', help="also draw where the model's query looked"
    )
    group = found.add_argument_group('long videos')
    group.add_argument(
        '--window', metavar='TIME', help='predict from window to window: 2s, 500ms, 1m'
    )
    group.add_argument(
        '--stride', metavar='TIME', help='from one start to the next; half a window by default'
    )
    group.add_argument(
        '--smooth', type=int, metavar='N', help='average scores over N windows, an odd number'
    )
    group.add_argument(
        '--threshold', type=float, metavar='P', help='no class where none is as probable, 0 to 1'
    )
    group.add_argument(
        '--annotate',
        action='store_const',
        const=True,
        help='also write the video with the classes on it',
    )
    group.add_argument('--batch_size', type=int, metavar='N', help='windows of a step (8)')
    return found


def _window_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of long videos that were given, by the names of `predict_windows.Options`.

    Raises:
      ValueError: they are no values, or do not go together.
    """
    values = {name: getattr(arguments, name) for name in WINDOW_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if 'window' not in given:
        if given:
            named = ', '.join(f'--{name}' for name in given)
            raise ValueError(f'{named} goes with --window=TIME, which is not there')
        return {}
    for name in ('attention', 'json'):
        if getattr(arguments, name):
            raise ValueError(
                f'--{name} does not go with --window'
                + ', which writes JSON of each video to --output' * (name == 'json')
            )
    for name in ('window', 'stride'):
        if name in given:
            try:
                given[name] = times.seconds(given[name])
            except ValueError as error:
                raise ValueError(f'--{name}: {error}') from error
            if not given[name]:
                raise ValueError(f'--{name}={getattr(arguments, name)} must be more than 0')
    if not 0 <= given.get('threshold', 0) <= 1:
        raise ValueError(f'--threshold={given["threshold"]:g} must be 0 to 1')
    return given


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    with wrong_usage():
        paths.check_model(arguments.workdir)
        paths.check_inputs(named_fields(config_arguments), ())
        options = _window_options(arguments)
        videos = paths.find_videos(arguments.videos)
    if arguments.labels and not os.path.exists(arguments.labels):
        raise UsageError(f'--labels: no file {arguments.labels}')
    if os.path.isdir(arguments.json):
        raise UsageError(f'--json: {arguments.json} is a folder; name a file')
    if os.path.isfile(arguments.output):
        raise UsageError(f'--output: {arguments.output} is a file; name a folder')
    from dist_jax import predict, trained
    from dist_jax.long_videos import predict as predict_windows

    workdir = model_folder(arguments.workdir, config_arguments)
    output = arguments.output or ('predictions' if workdir != arguments.workdir else '')
    config = read_config(config_arguments, trained.saved_config(workdir, arguments.step))
    start_jax()
    if options:
        return predict_windows.run(
            config,
            workdir,
            arguments.step,
            videos,
            predict_windows.Options(**options),
            output,
            arguments.labels,
        )
    return predict.run(
        config,
        workdir,
        arguments.step,
        videos,
        output,
        arguments.labels,
        arguments.json,
        arguments.attention,
    )
