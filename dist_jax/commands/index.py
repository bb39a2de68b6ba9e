"""Embeds the videos of a folder, to search them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import length, make_parser, split, start_jax, wrong_usage
from dist_jax.config_arguments import named_fields, read_config

SUMMARY = 'embed the videos of a folder, to search them'
HELP = """\
examples:
  dist_jax index videos/ --out videos.index --backbone=clip_b16
      with CLIP as it is, after `dist_jax convert ViT-B-16.pt clip_b16`
  dist_jax index videos/ --out videos.index --workdir=runs/msrvtt --step=best
      with a trained retrieval run
  dist_jax index films/ --out films.index --backbone=clip_b16 --window=4 --stride=2
  dist_jax index clips/ --out clips.index --backbone=clip_b16 --window=0
      short clips: each as one window

Then: dist_jax search videos.index 'a red square moves left'

Takes the videos of all depths (hidden files are left out). Stopped at any moment, the same command
goes on where it was, to the same file; started again later, it embeds what is new or changed (by
size and time of change), forgets what is gone and tries again what it could not read. Such videos
are listed at the end and in the index. Exit code 1: none could be read. docs/guides/search.md
describes the file.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('index', 'Embed the videos of a folder, to search them.', HELP)
    found.add_argument('folder', metavar='FOLDER', help='its videos, in all depths')
    found.add_argument('--out', required=True, metavar='FILE', help='the index')
    found.add_argument('--workdir', default='', help='folder of a retrieval run')
    found.add_argument('--step', help="its checkpoint: a number or 'best'; the newest by default")
    found.add_argument(
        '--backbone',
        default='',
        metavar='FOLDER',
        help='converted CLIP, or tiny_clip, in place of a run',
    )
    found.add_argument(
        '--window', type=length, default=8.0, help='seconds, as 8 or 8s; 0: a video is one (8)'
    )
    found.add_argument(
        '--stride', type=length, help='seconds from one start to the next; half a window by default'
    )
    found.add_argument(
        '--num_frames', type=int, help='of a window, for --backbone (8); a run has its own'
    )
    found.add_argument(
        '--dtype', help='computes with float32 or bfloat16, for --backbone (float32)'
    )
    found.add_argument('--batch_size', type=int, default=8, help='windows of a step (%(default)s)')
    found.add_argument(
        '--config',
        metavar='',
        help='--config.FIELD=VALUE sets a field of the run, where things lie',
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    workdir = arguments.workdir
    with wrong_usage():
        if bool(workdir) == bool(arguments.backbone):
            raise ValueError(
                'pass --workdir=RUN for a retrieval run, or --backbone=FOLDER for CLIP as it is, '
                'which `dist_jax convert` makes'
            )
        if workdir:
            paths.check_run(workdir)
            if arguments.num_frames is not None or arguments.dtype:
                raise ValueError('--num_frames and --dtype go with --backbone; a run has its own')
        elif config_arguments or arguments.step:
            raise ValueError('--step and --config go with --workdir')
        if arguments.batch_size < 1:
            raise ValueError(f'--batch_size={arguments.batch_size} must be at least 1')
        paths.check_inputs(named_fields(config_arguments), ())
        paths.check_backbone(arguments.backbone)
        names, others = paths.videos_below(arguments.folder)
    from dist_jax import trained
    from dist_jax.search import index, index_model
    from input_pipeline.windows import WindowReader

    start_jax()
    if workdir:
        saved = trained.saved_config(workdir, arguments.step)
        config = read_config(config_arguments, saved)
        model = index_model.of_run(config, workdir, arguments.step)
    else:
        num_frames = 8 if arguments.num_frames is None else arguments.num_frames
        with wrong_usage():
            model = index_model.of_backbone(
                arguments.backbone, num_frames, arguments.dtype or 'float32'
            )
    stride = arguments.window / 2 if arguments.stride is None else arguments.stride
    with wrong_usage():
        reader = WindowReader(model.views, arguments.window, stride)
    request = index.Request(
        arguments.folder, names, others, arguments.out, reader, arguments.batch_size
    )
    return index.run(request, model)
