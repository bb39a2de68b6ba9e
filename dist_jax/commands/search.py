"""Finds moments of the videos of an index."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, start_jax, wrong_usage

SUMMARY = 'find moments of the videos of an index by words, or by a video'
HELP = """\
examples:
  dist_jax search videos.index 'a red square moves left'
  dist_jax search videos.index 'a dog jumps into water' --top=20 --json=hits.json
  dist_jax search videos.index 'two people shake hands' --all_windows
      several moments of one video, too
  dist_jax search videos.index --video=query.mp4
      what looks like another video
  dist_jax search /mnt/videos.index 'a goal' --folder=/mnt/videos --backbone=/mnt/clip_b16
      the videos and the model have moved

Finds the run or the backbone that made the index where it was; it must have the same weights.
Writes a picture of the hits, with times. A sentence loads only the text side of the model.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('search', 'Find moments of videos by words, or by a video.', HELP)
    found.add_argument('index', metavar='INDEX', help='a file of `dist_jax index`')
    found.add_argument('sentence', nargs='?', default='', help='what is to be seen')
    found.add_argument('--video', default='', metavar='FILE', help='in place of a sentence')
    found.add_argument('--top', type=int, default=5, help='hits (%(default)s)')
    found.add_argument(
        '--all_windows', action='store_true', help='several of one video, not the best of each'
    )
    found.add_argument(
        '--output', default='', metavar='FILE.png', help='the picture; INDEX.png by default'
    )
    found.add_argument('--dark', action='store_true', help='the picture on dark paper')
    found.add_argument('--json', default='', metavar='FILE', help='write the hits as JSON')
    found.add_argument('--folder', default='', help='of the videos, if they have moved')
    found.add_argument('--workdir', default='', metavar='FOLDER', help='the run, if it has moved')
    found.add_argument('--backbone', default='', metavar='FOLDER', help='if it has moved')
    return found


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)  # options may stand before the sentence
    with wrong_usage():
        if bool(arguments.sentence.strip()) == bool(arguments.video):
            raise ValueError('say what to look for: a sentence in quotes, or --video=FILE')
        if arguments.top < 1:
            raise ValueError(f'--top={arguments.top} must be at least 1')
        for name in (arguments.index, arguments.video, arguments.folder):
            if name and not os.path.exists(name):
                raise ValueError(f'no file or folder {name}')
        for name in filter(None, (arguments.output, arguments.json)):
            for read in filter(None, (arguments.index, arguments.video)):
                if os.path.exists(name) and os.path.samefile(name, read):
                    raise ValueError(f'{name} is what is searched: write to another file')
        if arguments.workdir:
            paths.check_run(arguments.workdir)
        paths.check_backbone(arguments.backbone)
    from dist_jax.search import index_file

    found = index_file.read(arguments.index)
    start_jax()
    from dist_jax.search import index_model
    from dist_jax.search import query as search

    request = search.Request(
        arguments.sentence,
        arguments.video,
        arguments.top,
        arguments.all_windows,
        arguments.folder,
        arguments.output or f'{arguments.index}.png',
        arguments.dark,
        arguments.json,
    )
    model = index_model.of_index(found, arguments.workdir, arguments.backbone)
    return search.run(found, model, request)
