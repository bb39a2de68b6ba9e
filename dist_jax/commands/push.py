"""Makes a release of a run and uploads it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, wrong_usage

SUMMARY = 'release a run: a folder with a card, on the Hugging Face Hub'
HELP = """\
examples:
  dist_jax push runs/b16 owner/name --step=best --license=mit
  dist_jax push runs/b16 owner/name --dry_run
      write runs/b16/release and show it; nothing is uploaded
  dist_jax push runs/b16/release owner/name
      upload that folder, with a card that you have changed
  dist_jax push runs/b16 owner/name --private --with_backbone

Then, anywhere: dist_jax.load('hf://owner/name', backbone='clip_b16')

Written are the trained parameters as evaluation applies them (safetensors), and what the run says
of itself (JSON): config without paths, class names, protocol, hashes, figures. The frozen backbone
stays where it is, and the card says which one it is, unless --with_backbone, or unless the run had
made it itself. Logs in with `hf auth login` or HF_TOKEN; needs pip install 'dist_jax[hub]'.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('push', 'Upload a trained model to the Hugging Face Hub.', HELP)
    found.add_argument('source', metavar='RUN', help='folder of a run, or a release of one')
    found.add_argument('repository', metavar='OWNER/NAME', help='made if it is not there')
    found.add_argument('--step', help="checkpoint: a number or 'best'; the newest by default")
    found.add_argument('--private', action='store_true', help='of a repository that is made')
    found.add_argument('--revision', metavar='BRANCH', help='made if it is not there')
    found.add_argument('--license', default='', metavar='ID', help='for the card, such as mit')
    found.add_argument(
        '--with_backbone', action='store_true', help='upload the frozen backbone, too'
    )
    found.add_argument(
        '--backbone', default='', metavar='FOLDER', help='the converted one, if it has moved'
    )
    found.add_argument('--message', default='', metavar='TEXT', help='of the commit')
    found.add_argument(
        '--dry_run', action='store_true', help='write the folder and show it; upload nothing'
    )
    found.add_argument(
        '--output', default='', metavar='FOLDER', help='where it is written; RUN/release by default'
    )
    return found


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    with wrong_usage():
        paths.check_backbone(arguments.backbone)
        made = not paths.is_release(arguments.source)
        if made:
            paths.check_run(arguments.source)
            if '://' in arguments.source and not arguments.output:
                raise ValueError(f'{arguments.source} is a bucket: pass --output, a local folder')
        elif any((arguments.step, arguments.license, arguments.with_backbone, arguments.output)):
            raise ValueError(
                f'{arguments.source} is a release as it is: --step, --license, --with_backbone and '
                '--output are of the run that it is made of'
            )
    from dist_jax.hub import client as hub
    from dist_jax.hub import release
    from dist_jax.reports import console

    repository = hub.check_repository(arguments.repository)
    folder = arguments.source
    if made:
        folder = arguments.output or os.path.join(arguments.source, 'release')
        release.write(
            folder,
            arguments.source,
            arguments.step,
            name=repository,
            license=arguments.license,
            backbone=arguments.backbone,
            with_backbone=arguments.with_backbone,
        )
    console.print_release(folder, release.read(folder).metadata)
    if arguments.dry_run:
        console.print_steps([(f'dist_jax push {folder} {repository}', 'upload it as it is')])
        return 0
    address = hub.push(
        folder,
        repository,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
    )
    at = f'@{arguments.revision}' if arguments.revision else ''
    console.print_steps(
        [(address, 'what was uploaded'), (f"dist_jax.load('hf://{repository}{at}')", 'use it')]
    )
    return 0
