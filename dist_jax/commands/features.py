"""Arrays of what a model makes of videos."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax import paths, times
from dist_jax.commands.arguments import make_parser, split, start_jax, wrong_usage
from dist_jax.config_arguments import named_fields, read_config

SUMMARY = 'embeddings and tokens of videos as arrays, by a run or a backbone'
HELP = """\
examples:
  dist_jax features --workdir=runs/b16 videos/ --out features
      a vector for each video: what the classifier of the run reads
  dist_jax features --backbone=clip_b16 videos/ --out features --outputs clip,frames \\
      --window 16 --stride 8 --fps 8
      a converted CLIP as it is, on windows of 16 frames at 8 a second, every second
  dist_jax features --backbone=clip_b16 --list train.txt --root /data/k400 --out features \\
      --outputs tokens:-1 --window 2s --dtype float16
      the tokens behind the last block
  dist_jax features --workdir=runs/b16 --list built/k400 --subset validation --out features \\
      --format parquet

Writes OUT/manifest.json (model with hashes, preprocessing, what each output is), OUT/videos.jsonl
(a line for each video: class, windows, or why it cannot be read) and the arrays, OUT/clip/VIDEO.npy
and so on; times of windows are OUT/spans/VIDEO.npy. Stopped at any moment, the same command goes on
to the same bytes. Every host of a pod runs the same command, and embeds its share. Exit code 1:
none could be read.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('features', 'Embed videos, into files of arrays.', HELP)
    add = found.add_argument
    add('videos', nargs='*', metavar='VIDEO', help='video files, and folders of them')
    add('--list', default='', metavar='PATH', help='list, class folders or built data set instead')
    add('--root', default='', help='folder that its paths start from')
    add('--list_format', default='auto', help='of the list, if it is not recognised')
    add('--subset', default='', help='split of a list or data set that holds several')
    add('--label_map', default=[], nargs='+', metavar='FILE', help='class names, one file a head')
    add('--out', required=True, metavar='DIR', help='folder to make')
    add('--workdir', default='', help='folder of the run')
    add('--step', help="its checkpoint: a number or 'best'; the newest by default")
    add(
        '--backbone',
        default='',
        metavar='FOLDER',
        help='converted backbone, or tiny_clip, in place of a run',
    )
    add(
        '--outputs',
        default='clip',
        metavar='NAMES',
        help='some of clip, frames and tokens:BLOCK, with commas (%(default)s)',
    )
    add(
        '--window',
        help='seconds, as 2s; with --fps a number of frames; all of a video by default',
    )
    add(
        '--stride',
        help='likewise, from start to start; half a window by default',
    )
    add('--fps', type=float, help='frames a second that --window and --stride count')
    add('--format', default='npy', choices=FORMATS, help='of the files (%(default)s)')
    add('--dtype', default='float32', choices=DTYPES, help='that is stored (%(default)s)')
    add('--batch_size', type=int, default=8, help='windows of a step, of a host (%(default)s)')
    add('--config', metavar='', help='--config.FIELD=VALUE sets a field of the run or the backbone')
    return found


FORMATS = ('npy', 'parquet', 'array_record')
DTYPES = ('float32', 'float16')


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    workdir = arguments.workdir
    with wrong_usage():
        if bool(workdir) == bool(arguments.backbone):
            raise ValueError('pass --workdir=RUN, or --backbone=FOLDER for a converted backbone')
        if bool(arguments.videos) == bool(arguments.list):
            raise ValueError('name videos and folders, or a --list')
        if arguments.step and not workdir:
            raise ValueError('--step goes with --workdir')
        if arguments.batch_size < 1:
            raise ValueError(f'--batch_size={arguments.batch_size} must be at least 1')
        if workdir:
            paths.check_run(workdir)
        paths.check_inputs(named_fields(config_arguments), ())
        paths.check_backbone(arguments.backbone)
        names = paths.find_videos(arguments.videos) and arguments.videos
        window, stride = _windows(arguments.window, arguments.stride, arguments.fps)
    from dist_jax import trained
    from dist_jax.features import model as feature_model
    from dist_jax.features import run as features
    from input_pipeline.sources import open_source

    start_jax()
    with wrong_usage():
        outputs, blocks = feature_model.parse_outputs(arguments.outputs)
        if workdir:
            saved = trained.saved_config(workdir, arguments.step)
            config = read_config(config_arguments, saved)
            model = feature_model.of_run(config, workdir, arguments.step)
        else:
            saved = trained.backbone_config(arguments.backbone)
            model = feature_model.FeatureModel(read_config(config_arguments, saved))
        reader = features.make_reader(model.views, outputs, blocks, window, stride)
        if names:
            items, labels, class_names = features.items_of_files(names), (), ()
            source = {'videos': list(names)}
        else:
            listed = open_source(
                arguments.list,
                arguments.list_format,
                arguments.root,
                arguments.label_map,
                subset=arguments.subset,
            )
            items = features.items_of_list(listed, arguments.root or _folder(arguments.list))
            labels, class_names = features.labels_of_list(listed)
            source = {'list': arguments.list, 'root': arguments.root, 'subset': arguments.subset}
    request = features.Request(
        items,
        labels,
        class_names,
        source,
        arguments.out,
        outputs,
        blocks,
        reader,
        arguments.batch_size,
        arguments.format,
        arguments.dtype,
    )
    return features.run(request, model)


def _folder(path: str) -> str:
    return path if os.path.isdir(path) else os.path.dirname(path)


def _windows(window: str | None, stride: str | None, fps: float | None) -> tuple[float, float]:
    """(window, stride) in seconds; 0 for all of a video.

    Raises:
      ValueError: no numbers, or frames without a rate.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise ValueError(f'--fps={fps} must be above 0 and at most 1000')
    if window is None:
        if stride is not None or fps is not None:
            raise ValueError('--stride and --fps go with --window')
        return 0.0, 0.0
    length = _seconds('window', window, fps)
    return length, length / 2 if stride is None else _seconds('stride', stride, fps)


def _seconds(name: str, text: str, fps: float | None) -> float:
    """A length of time; a bare number counts frames where there is a rate."""
    try:
        value = times.seconds(text)
    except ValueError as error:
        raise ValueError(f'--{name}: {error}') from None
    if not value:
        raise ValueError(f'--{name}={text} must be more than 0')
    return value / fps if fps and not text.strip()[-1].isalpha() else value
