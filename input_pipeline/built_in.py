"""Writes built-in data sets: whole or not at all, and once."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SPLITS = ('train', 'val')

Progress = Callable[[int, int], None]


def write_set(
    out_dir: str | os.PathLike,
    meta: Mapping[str, Any],
    suffix: str,
    write_file: Callable[[Path, str, int, int], None],
    num_threads: int,
    progress: Progress | None = None,
) -> bool:
    """Writes a data set, unless the folder already holds it.

    The folder appears whole or not at all: files are written into a hidden folder beside it, which
    is then renamed.

    Args:
      out_dir: folder to create; gets train/, val/, train.txt, val.txt ("path label" lines with
        paths relative to the folder), labels.txt and meta.json.
      meta: what the set is, as JSON: `name`, `num_train` and `num_val` (files), `class_names`,
        `seed`, and whatever else decides its bytes.
      suffix: of the files, with its dot.
      write_file: called as (path, split, index in the split, label), from several threads. Classes
        are balanced to within one file.
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
        _write(partial, meta, suffix, write_file, num_threads, progress)
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
    write_file: Callable[[Path, str, int, int], None],
    num_threads: int,
    progress: Progress | None,
) -> None:
    class_names = meta['class_names']
    files = [(split, i) for split in SPLITS for i in range(meta[f'num_{split}'])]

    def write(file: tuple[str, int]) -> str:
        split, index = file
        # Balanced: every run of as many files as there are classes holds each class once.
        label = index % len(class_names)
        name = f'{split}/{index:06d}{suffix}'
        write_file(folder / name, split, index, label)
        return f'{name} {label}'

    for split in SPLITS:
        (folder / split).mkdir()
    lines = []
    with ThreadPoolExecutor(num_threads) as pool:
        for line in pool.map(write, files):
            lines.append(line)
            if progress is not None:
                progress(len(lines), len(files))
    for split in SPLITS:
        text = ''.join(f'{line}\n' for line in lines if line.startswith(f'{split}/'))
        (folder / f'{split}.txt').write_text(text, encoding='utf-8')
    (folder / 'labels.txt').write_text('\n'.join(class_names) + '\n', encoding='utf-8')
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
