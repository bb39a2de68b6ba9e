"""Files and folders that a command was given, looked for before jax is loaded.

A wrong path is the commonest mistake; importing jax and its friends takes seconds, on a loaded host
many. What cannot be told cheaply (a path in a bucket, a field of a saved run) is left to those who
read it.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from input_pipeline.list_formats import IMAGE_SUFFIXES, VIDEO_SUFFIXES, files_below

CHECKPOINTS = 'checkpoints'  # of a run, in its workdir
# In place of a backbone, for `backbone.checkpoint`: made where a run first needs it.
RANDOM = 'random'
SHIPPED = 'tiny_clip'  # the small CLIP that comes with the package
MADE = (RANDOM, SHIPPED)
# Of a release: what it says of itself, and the trained parameters.
RELEASE = ('config.json', 'network.safetensors')
HUB = 'hf://'  # before what lies on the Hugging Face Hub
TAKE_RELEASES = ('evaluate', 'predict', 'export', 'serve')  # commands
_RUN_FOLDER = 'pass the folder of a run, the --workdir of `dist_jax train`'
_MAKERS = {'backbone.checkpoint': ' (`dist_jax convert` makes one from CLIP)'}


def under(root: str, name: str) -> str:
    """A file that is named as it is, or from the data root.

    Raises:
      ValueError: the name leads to two files.
    """
    name = name.strip()
    if not name or not root or os.path.isabs(name):
        return name
    there = os.path.join(root, name)
    if not os.path.exists(name):
        return there
    if os.path.exists(there) and not os.path.samefile(name, there):
        raise ValueError(
            f'{name} is in {os.getcwd()} and in data.root={root}; write the path of the one you '
            'mean in full'
        )
    return name


def check_run(workdir: str) -> None:
    """Raises ValueError if a local folder is not that of a run."""
    if workdir.startswith(HUB) or is_release(workdir):
        raise ValueError(
            f'{workdir} is a release, which {", ".join(TAKE_RELEASES)} take; here it must be the '
            'run that it was made of'
        )
    if '://' in workdir or _found(os.path.join(workdir, CHECKPOINTS)):
        return
    if not _found(workdir):
        raise ValueError(f'no folder {workdir}; {_RUN_FOLDER}')
    near = runs_near(workdir)
    hint = f'did you mean {near}?' if near else _RUN_FOLDER
    raise ValueError(f'{workdir} is no run, there are no checkpoints in it; {hint}')


def runs_near(folder: str) -> str:
    """At most three runs in a local folder, or the one that it is in, as 'a or b'; '' if none."""
    inside = glob.glob(os.path.join(glob.escape(os.path.expanduser(folder)), '*', CHECKPOINTS))
    near = [os.path.dirname(path) for path in sorted(inside)]
    above = os.path.dirname(os.path.normpath(folder)) or '.'
    near += [above] if os.path.isdir(os.path.join(above, CHECKPOINTS)) else []
    return ' or '.join(near[:3])


def check_model(workdir: str) -> None:
    """Raises ValueError if a local folder is neither that of a run nor a release of one."""
    if not (workdir.startswith(HUB) or is_release(workdir)):
        check_run(workdir)


def cache_folder(name: str) -> str:
    """Where this library keeps what it can make again."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(base, 'dist_jax', name)


def is_release(path: str | os.PathLike[str]) -> bool:
    """Whether a local folder looks like a release of a run."""
    return all(os.path.isfile(os.path.join(path, name)) for name in RELEASE)


def check_backbone(name: str) -> None:
    """Raises ValueError if there is nothing where an option says that a converted backbone is."""
    if name != SHIPPED and not _found(name):
        raise ValueError(f'--backbone: no folder {name}{_MAKERS["backbone.checkpoint"]}')


def check_inputs(fields: Mapping[str, str], splits: Iterable[str], saved_root: str = '') -> None:
    """Looks for the files that config fields name.

    Args:
      fields: 'group.field' -> value; those that are missing are not looked at.
      splits: lists that are read, of train and val.
      saved_root: where list paths start from unless the fields say.

    Raises:
      ValueError: naming every field whose file is not there.
    """
    root = fields.get('data.root') or saved_root
    lists = [(field, fields.get(field, '')) for field in (f'data.{split}_list' for split in splits)]
    lists += [('data.label_map', name) for name in fields.get('data.label_map', '').split(',')]
    wanted = [('data.root', fields.get('data.root', ''))]
    wanted += [(field, under(root, name)) for field, name in lists]
    wanted += [('init_label_map', n.strip()) for n in fields.get('init_label_map', '').split(',')]
    wanted += [(field, fields.get(field, '')) for field in ('backbone.checkpoint', 'init_from')]
    missing = [
        f'{field}: no file or folder {name}{_MAKERS.get(field, "")}'
        for field, name in wanted
        if not _found(name) and not (field == 'backbone.checkpoint' and name in MADE)
    ]
    origin = fields.get('init_from', '')
    if origin.startswith(HUB) or (origin and is_release(origin)):
        missing.append(
            f'init_from: {origin} is a release; a run starts from the run that it was made of, or '
            'from a converted checkpoint'
        )
    if missing:
        raise ValueError('\n'.join(missing))


def check_training_inputs(fields: Mapping[str, Any]) -> None:
    """As `check_inputs`, of a whole config; a data set that makes itself has no files yet."""
    from input_pipeline.datasets import DATASETS  # which brings the decoders

    dataset = DATASETS.get(fields['data.name'])
    lists = fields['data.train_list'] or fields['data.val_list']
    if dataset is not None and dataset.generate is not None and not lists:
        fields = {field: value for field, value in fields.items() if not field.startswith('data.')}
    check_inputs(fields, ('train', 'val'))


def saved_root(workdir: str) -> str:
    """`data.root` of a run in a local folder; '' where it cannot be told."""
    try:
        with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
            return str(json.load(file)['data']['root'])
    except (OSError, ValueError, KeyError, TypeError):
        return ''


def _found(name: str) -> bool:
    return not name or '://' in name or os.path.exists(os.path.expanduser(name))


def find_videos(names: Sequence[str]) -> list[str]:
    """Video files, those of folders included, in order of their paths.

    Args:
      names: of files, taken whatever they are called, and folders, in which files with the suffix
        of a video are taken at any depth, but for hidden ones; of one without, those of a picture.

    Raises:
      ValueError: a path that is not there, or a folder with neither.
    """
    missing = [name for name in names if not os.path.exists(name)]
    if missing:
        raise ValueError('no file or folder ' + ', '.join(missing))
    found: list[str] = []
    for name in names:
        if not os.path.isdir(name):
            found.append(name)
            continue
        files = list(files_below(name))
        for suffixes in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):
            inside = [file for file in files if file.lower().endswith(suffixes)]
            if inside:
                break
        else:
            known = ', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
            raise ValueError(f'{name}: no video and no picture in this folder ({known})')
        found += [os.path.join(name, file) for file in inside]
    return found


def videos_below(folder: str) -> tuple[list[str], dict[str, int]]:
    """Videos of a folder in all depths, by their suffixes; hidden files are left out.

    Args:
      folder: where it is.

    Returns:
      Their names from the folder on, in order; and how many files have other suffixes, by suffix.

    Raises:
      ValueError: no such folder, or no video in it.
    """
    if not os.path.isdir(folder):
        kind = 'is a file, not a folder' if os.path.exists(folder) else 'no such folder'
        raise ValueError(f'{folder}: {kind}')
    names: list[str] = []
    others: Counter[str] = Counter()
    for name in files_below(folder):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in VIDEO_SUFFIXES:
            names.append(name)
        else:
            others[suffix or 'without a suffix'] += 1
    if not names:
        found = f'{others.total()} files of other kinds' if others else 'nothing'
        raise ValueError(
            f'{folder}: no video in this folder, {found} (suffixes of videos: '
            f'{", ".join(VIDEO_SUFFIXES)})'
        )
    return names, dict(others)
