"""Builds, merges, makes and looks at data sets: several commands in one."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Sequence

from dist_jax.config_arguments import UsageError

SUMMARY = 'build, inspect, merge, make data sets'
# Word -> (module of dist_jax.dataset, what it does).
PARTS = {
    'build': ('build', 'annotation files and videos become shards that training reads'),
    'inspect': ('inspect', 'statistics and pictures of a built set, and a check of every record'),
    'merge-kinetics': ('merge_kinetics', 'Kinetics-400, -600 and -700 become Kinetics-710'),
    'make': ('make', 'a built-in data set: motion clips, pictures, captions, a small world'),
    'augmentations': ('augmentations', 'a sheet of what a recipe does to a video'),
}
EXAMPLES = """\
examples:
  dist_jax dataset build kinetics400 --annotations k400/annotations --videos /data/k400 \\
      --out built/k400 --short_side 256
  dist_jax dataset inspect built/k400
  dist_jax dataset make --world --out data/motion_world

`dist_jax dataset PART --help` explains a part.
"""


def parser(part: str = '') -> argparse.ArgumentParser:
    """Of all parts, or of one."""
    if part:
        return importlib.import_module(f'dist_jax.dataset.{PARTS[part][0]}').parser()
    width = max(map(len, PARTS))
    parts = '\n'.join(f'  {name:{width}}  {text}' for name, (_, text) in PARTS.items())
    found = argparse.ArgumentParser(
        prog='dist_jax dataset',
        description=f'Data sets.\n\nparts:\n{parts}',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument('part', metavar='PART', help='one of the above, then its own arguments')
    return found


def run(argv: Sequence[str]) -> int:
    if not argv:
        parser().print_help()
        return 2
    if argv[0].startswith('-'):
        parser().parse_args(argv)
    part = argv[0]
    if part not in PARTS:
        close = difflib.get_close_matches(part, PARTS, 1)
        hint = f'did you mean {close[0]!r}?' if close else f'there are {", ".join(PARTS)}'
        raise UsageError(f'no part {part!r}; {hint}')
    return importlib.import_module(f'dist_jax.dataset.{PARTS[part][0]}').main(argv[1:])
