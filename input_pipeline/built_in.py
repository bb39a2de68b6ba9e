"""Writes built-in data sets: whole or not at all, and once."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ('train', 'val')

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Lists:
    """What is written beside the files.

    Attributes:
      suffix: of train and val, the lists, with its dot.
      line: (name of a file, from the folder on; its split; its index there) -> its line.
      others: further files, name -> text.
    """

    suffix: str
    line: Callable[[str, str, int], str]
    others: Mapping[str, str] = field(default_factory=dict)


def class_of(index: int, class_names: Sequence[str]) -> int:
    """The label of a file: every run of as many files as there are classes has each class once."""
    return index % len(class_names)


def class_lists(class_names: Sequence[str]) -> Lists:
    """train.txt and val.txt, lines of "path label", and labels.txt."""
    return Lists(
        '.txt',
        lambda name, split, index: f'{name} {class_of(index, class_names)}',
        {'labels.txt': '\n'.join(class_names) + '\n'},
    )


def write_set(
    out_dir: str | os.PathLike,
    meta: Mapping[str, Any],
    suffix: str,
    write_file: Callable[[Path, str, int], None],
    lists: Lists,
    num_threads: int,
    progress: Progress | None = None,
) -> bool:
    """Writes a data set, unless the folder already holds it.

    The folder appears whole or not at all: files are written into a hidden folder beside it, which
    is then renamed.

    Args:
      out_dir: folder to create; gets train/, val/, a list of each with paths relative to the
        folder, and meta.json.
      meta: what the set is, as JSON: `name`, `num_train` and `num_val` (files), `seed`, and
        whatever else decides its bytes.
      suffix: of the files, with its dot.
      write_file: called as (path, split, index in the split), from several threads.
      lists: what stands beside the files.
      num_threads: files written at the same time.
      progress: called with (files done, files in all) after each file.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if a split is empty, a number out of range or the folder holds something else.
    """
    num_train, num_val = meta['num_train'], meta['num_val']
    if num_train < 1 or num_val < 1:
        raise ValueError(f'num_train={num_train} and num_val={num_val} must be at least 1')
    if num_threads < 1:
        raise ValueError(f'num_threads={num_threads} must be at least 1')
    if meta['seed'] < 0:
        raise ValueError(f'seed={meta["seed"]} must be at least 0')
    out_dir = Path(out_dir)
    if _is_complete(out_dir, meta, suffix):
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{out_dir.name}.partial-'
    for stale in out_dir.parent.glob(f'{prefix}*'):  # left behind by a killed run
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=out_dir.parent))
    try:
        _write(partial, meta, suffix, write_file, lists, num_threads, progress)
        partial.chmod(0o755)
        if out_dir.exists() and not any(out_dir.iterdir()):
            out_dir.rmdir()
        try:
            partial.rename(out_dir)
        except OSError:  # another process finished first
            return not _is_complete(out_dir, meta, suffix)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _is_complete(out_dir: Path, meta: Mapping[str, Any], suffix: str) -> bool:
    """Whether the folder already holds this very set.

    Raises:
      ValueError: if the folder holds something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    advice = 'choose another folder or delete this one'
    try:
        found = dict(json.loads((out_dir / 'meta.json').read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{out_dir} is not empty and no built-in set; {advice}') from error
    if found != meta:
        fields = {k: (found.get(k), v) for k, v in meta.items() if found.get(k) != v}
        raise ValueError(f'{out_dir} holds another set, (found, wanted) = {fields}; {advice}')
    for split in SPLITS:
        count = sum(1 for _ in (out_dir / split).glob(f'*{suffix}'))
        if count != meta[f'num_{split}']:
            raise ValueError(
                f'{out_dir}/{split} has {count} of {meta[f"num_{split}"]} files; delete {out_dir} '
                'and generate it again'
            )
    return True


def _write(
    folder: Path,
    meta: Mapping[str, Any],
    suffix: str,
    write_file: Callable[[Path, str, int], None],
    lists: Lists,
    num_threads: int,
    progress: Progress | None,
) -> None:
    files = [(split, i) for split in SPLITS for i in range(meta[f'num_{split}'])]

    def write(file: tuple[str, int]) -> str:
        split, index = file
        name = f'{split}/{index:06d}{suffix}'
        write_file(folder / name, split, index)
        return lists.line(name, split, index)

    for split in SPLITS:
        (folder / split).mkdir()
    texts = dict.fromkeys(SPLITS, '')
    with ThreadPoolExecutor(num_threads) as pool:
        for done, ((split, _), line) in enumerate(zip(files, pool.map(write, files)), 1):
            texts[split] += f'{line}\n'
            if progress is not None:
                progress(done, len(files))
    contents = {f'{split}{lists.suffix}': text for split, text in texts.items()} | lists.others
    for name, text in contents.items():
        (folder / name).write_text(text, encoding='utf-8')
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
