"""The data of a study: built-in sets, each written once, and shares of their training lists."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from input_pipeline.datasets import DATASETS
from tools.studying.rows import Data, Row, World

DATA, LISTS = 'data', 'lists'  # folders of a study


def prepare(
    out: Path, world: World, rows: Iterable[Row], say: Callable[[str], None] = print
) -> None:
    """Writes what the rows and their tests read, unless it is there.

    Args:
      out: folder of the study.
      world: its data sets.
      rows: to be run.
      say: is told what takes long.

    Raises:
      ValueError: a set is there that another version made, or a part of one.
    """
    folders = {data.folder: data.name for data in world.data.values() if data.train}
    wanted = {world.data[name].folder for row in rows for name in row.data}
    for folder in sorted(wanted):
        target = out / DATA / folder
        if not target.exists():
            say(f'making {folder} in {target}')
        # Looks at what is there, and makes it only if that is nothing.
        DATASETS[folders[folder]].generate(target)
    for row in rows:
        if row.share == 100:
            continue
        for name in row.data:
            data = world.data[name]
            whole = (out / DATA / data.folder / data.train).read_text(encoding='utf-8')
            target = share_of(out, data, row.share)
            text = cut(whole, row.share)
            if not target.exists() or target.read_text(encoding='utf-8') != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f'.{target.name}.{os.getpid()}')
                partial.write_text(text, encoding='utf-8')
                partial.rename(target)


def share_of(out: Path, data: Data, percent: int) -> Path:
    """The list that `prepare` writes for a share."""
    return out / LISTS / f'{Path(data.train).stem}_{percent}.txt'


def cut(text: str, percent: int) -> str:
    """The first videos of each class of a list, in the order of the list.

    A smaller share is part of a larger one, and no random number has a say.

    Args:
      text: of a list, 'path label' a line.
      percent: of each class that stays, rounded up.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    labels = [line.split()[-1] for line in lines]
    left = {
        label: math.ceil(count * percent / 100)
        for label, count in collections.Counter(labels).items()
    }
    kept = []
    for line, label in zip(lines, labels):
        if left[label]:
            left[label] -= 1
            kept.append(line)
    return ''.join(f'{line}\n' for line in kept)
