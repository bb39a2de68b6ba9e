"""Writes built-in data sets: whole or not at all, and once."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SPLITS = ('train', 'val')

Progress = Callable[[int, int], None]


def class_of(index: int, class_names: Sequence[str]) -> int:
    """The label of a file: every run of as many files as there are classes has each class once."""
    return index % len(class_names)


def file_names(split: str, count: int, suffix: str) -> list[str]:
    """Names of the files of a split, from the folder of the set on."""
    return [f'{split}/{i:06d}{suffix}' for i in range(count)]


def class_lists(meta: Mapping[str, Any], suffix: str, class_names: Sequence[str]) -> dict[str, str]:
    """Texts of train.txt and val.txt, lines of "path label", and of labels.txt."""
    texts = {'labels.txt': ''.join(f'{name}\n' for name in class_names)}
    for split in SPLITS:
        names = file_names(split, meta[f'num_{split}'], suffix)
        texts[f'{split}.txt'] = ''.join(
            f'{name} {class_of(i, class_names)}\n' for i, name in enumerate(names)
        )
    return texts


def write_set(
    out_dir: str | os.PathLike,
    meta: Mapping[str, Any],
    suffixes: Mapping[str, str],
    write_file: Callable[[Path, str, int], None],
    texts: Mapping[str, str],
    num_threads: int,
    progress: Progress | None = None,
) -> bool:
    """Writes a data set, unless the folder already holds it.

    The folder appears whole or not at all: files are written into a hidden folder beside it, which
    is then renamed. A text that a folder lacks, as of an earlier version, is added.

    Args:
      out_dir: folder to create; gets a folder for each split, the texts and meta.json.
      meta: what the set is, as JSON: `name`, `num_SPLIT` (files) of each split, `seed`, and
        whatever else decides its bytes.
      suffixes: split -> suffix of its files, with the dot; see `file_names`.
      write_file: called as (path, split, index in the split), from several threads.
      texts: what stands beside the files, name -> text.
      num_threads: files written at the same time.
      progress: called with (files done, files in all) after each file.

    Returns:
      True if it wrote the set, False if the set was there.

    Raises:
      ValueError: if a split is empty, a number out of range or the folder holds something else.
    """
    for split in suffixes:
        if meta[f'num_{split}'] < 1:
            raise ValueError(f'num_{split}={meta[f"num_{split}"]} must be at least 1')
    if num_threads < 1:
        raise ValueError(f'num_threads={num_threads} must be at least 1')
    if meta['seed'] < 0:
        raise ValueError(f'seed={meta["seed"]} must be at least 0')
    out_dir = Path(out_dir)
    if _is_complete(out_dir, meta, suffixes):
        _add_texts(out_dir, texts)
        return False
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{out_dir.name}.partial-'
    for stale in out_dir.parent.glob(f'{prefix}*'):  # left behind by a killed run
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=out_dir.parent))
    try:
        _write(partial, meta, suffixes, write_file, texts, num_threads, progress)
        partial.chmod(0o755)
        if out_dir.exists() and not any(out_dir.iterdir()):
            out_dir.rmdir()
        try:
            partial.rename(out_dir)
        except OSError:  # another process finished first
            return not _is_complete(out_dir, meta, suffixes)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _add_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes lists that an older version did not, of the same files."""
    for name, text in texts.items():
        if not (folder / name).exists():
            partial = folder / f'.{name}.{os.getpid()}'
            partial.write_text(text, encoding='utf-8')
            partial.replace(folder / name)


def _is_complete(out_dir: Path, meta: Mapping[str, Any], suffixes: Mapping[str, str]) -> bool:
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
    for split, suffix in suffixes.items():
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
    suffixes: Mapping[str, str],
    write_file: Callable[[Path, str, int], None],
    texts: Mapping[str, str],
    num_threads: int,
    progress: Progress | None,
) -> None:
    files = [
        (folder / name, split, index)
        for split, suffix in suffixes.items()
        for index, name in enumerate(file_names(split, meta[f'num_{split}'], suffix))
    ]
    for split in suffixes:
        (folder / split).mkdir()
    with ThreadPoolExecutor(num_threads) as pool:
        for done, _ in enumerate(pool.map(lambda file: write_file(*file), files), 1):
            if progress is not None:
                progress(done, len(files))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding='utf-8')
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
