"""Flips bits of a run's checkpoints and of its backbone, and shows that none goes unnoticed.

    python -m tools.flip_bits --workdir RUN --flips 200

Works on a copy. One bit is flipped at a time; then everything is read: state, metadata and score
of the checkpoint, or weights and metadata of the backbone. Half of the flips choose a file first,
so that small files have their turn, half choose among all bytes.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from rich.table import Table

from dist_jax import checkpoint
from dist_jax.models import converted, digests
from dist_jax.models.params import tree_sha256
from input_pipeline.escape import Console

DETECTED, EQUAL, OTHER = 'detected', 'loaded with equal values', 'loaded with OTHER values'


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment; 0 if nothing was loaded with other values, 1 if something was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, help='of a run')
    parser.add_argument('--flips', type=int, default=200, help='half of them in the backbone')
    parser.add_argument('--seed', type=int, default=0, help='of their places')
    arguments = parser.parse_args(argv)
    folder = checkpoint.find_checkpoint(arguments.workdir).parent
    backbone = checkpoint.read_metadata(checkpoint.find_checkpoint(arguments.workdir))['backbone']
    rng = random.Random(arguments.seed)
    table = Table('', *(DETECTED, EQUAL, OTHER))
    wrong = 0
    steps = [p for p in folder.iterdir() if p.name.isdigit()]
    tree = ocp.PyTreeCheckpointHandler().metadata(steps[0] / 'state').tree
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    # Of the reader: it would wait for a file system to come back.
    converted.RETRY_SECONDS = ()
    for name, sources, read in (
        ('checkpoints', steps, functools.partial(read_checkpoint, item)),
        ('backbone', [converted.absolute_path(backbone['path'])], read_backbone),
    ):
        share = math.ceil(arguments.flips / 2 / len(sources))
        counts: collections.Counter[str] = collections.Counter()
        for source in sources:
            counts += flip_many(Path(source), read, share, rng)
        table.add_row(name, *(str(counts[outcome]) for outcome in (DETECTED, EQUAL, OTHER)))
        wrong += counts[OTHER]
    Console().print(table)
    return int(wrong > 0)


def flip_many(
    source: Path, read: Callable[[Any], str], flips: int, rng: random.Random
) -> collections.Counter[str]:
    """Flips bits of the files of a folder, one at a time, and counts the outcomes.

    Args:
      source: folder; a copy of it is used.
      read: folder -> identity of all that is in it.
      flips: how many.
      rng: of their places.
    """
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        copy = converted.absolute_path(temporary) / source.name
        shutil.copytree(source, copy)
        files = [p for p in Path(copy).rglob('*') if p.is_file() and p.stat().st_size]
        files.sort(key=lambda p: (p.stat().st_size, p))  # orbax draws some of the names
        sizes = [file.stat().st_size for file in files]
        expected = read(copy)
        for number in range(flips):
            (file,) = rng.choices(files, sizes if number % 2 else None)
            before = file.read_bytes()
            place = rng.randrange(8 * len(before))
            after = bytearray(before)
            after[place // 8] ^= 1 << place % 8
            file.write_bytes(after)
            try:
                outcome = EQUAL if read(copy) == expected else OTHER
            except Exception:
                outcome = DETECTED
            file.write_bytes(before)
            if outcome == OTHER:
                print(f'{file.relative_to(copy)}: bit {place}', file=sys.stderr)
            counts[outcome] += 1
    return counts


def read_checkpoint(item: Any, folder: Any) -> str:
    """Identity of a step: its state, metadata and score.

    Args:
      item: shapes and dtypes of the state, which a run knows.
      folder: of the step.

    Raises:
      ValueError: it is damaged.
    """
    metadata = checkpoint.read_metadata(folder)
    score = checkpoint.read_scores(folder.parent).get(int(folder.name))
    if (folder / checkpoint.SCORE).exists() and score is None:
        raise digests.DamagedError(f'{folder}: damaged score')
    state = converted.read_tree(folder / 'state', item, metadata[digests.DIGESTS], as_numpy=True)
    return f'{tree_sha256(state)} {metadata} {score}'


def read_backbone(folder: Any) -> str:
    """Identity of a converted checkpoint: its weights and metadata.

    Raises:
      ValueError: it is damaged.
    """
    metadata = converted.load_metadata(folder)
    return f'{tree_sha256(converted.load_params(folder, as_numpy=True))} {metadata}'


if __name__ == '__main__':
    sys.exit(main())
