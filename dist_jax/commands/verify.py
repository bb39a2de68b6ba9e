"""Whether a bundle gives the scores of the model that was exported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax.commands.arguments import make_parser
from dist_jax.config_arguments import UsageError

SUMMARY = 'check a bundle of `export`: its files, its program, its scores'
HELP = """\
examples:
  dist_jax verify b16_bundle
  JAX_PLATFORMS=cpu dist_jax verify b16_bundle

The same as `python b16_bundle/verify.py`, but with the code of this package, not of the bundle.
Exit code 0: the scores of the golden clip are those that the model gave. 1: they are not, or the
bundle is damaged; the message names what differs.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('verify', 'Run the golden clip of a bundle and compare.', HELP)
    found.add_argument('bundle', metavar='BUNDLE', help='folder of `dist_jax export`')
    return found


def run(argv: Sequence[str]) -> int:
    folder = parser().parse_args(argv).bundle
    if not os.path.isdir(folder):
        raise UsageError(f'no folder {folder}')
    from dist_jax.bundles import verify

    try:
        return verify.check(folder)
    except ImportError as error:
        raise UsageError(str(error)) from error
