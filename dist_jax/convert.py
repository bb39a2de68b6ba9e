"""What `dist_jax convert` does: foreign checkpoints in, converted ones out, and the way back.

It knows no family: which names there are, and what becomes of them, `dist_jax.models.NAMINGS` says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dist_jax import backbone_inside, backbones
from dist_jax.checkpoint import (
    backbone_sha256,
    describe_backbone,
    find_checkpoint,
    is_run,
    read_host_variables,
    read_metadata,
)
from dist_jax.convert_arguments import PRECISIONS
from dist_jax.hub import client as hub
from dist_jax.models import NAMINGS, converted
from dist_jax.models.backbone import Backbone
from dist_jax.models.naming import Naming, Options, Plan
from dist_jax.models.params import (
    Outgoing,
    Tree,
    count,
    export_file,
    flatten,
    import_tree,
    non_finite,
    outgoing,
    with_precision,
)
from dist_jax.models.source_files import (
    SourceFiles,
    open_source,
    read_safetensors,
    sources_record,
)
from dist_jax.paths import HUB
from input_pipeline.escape import Console, lines

# What `--kind` says -> naming, in the order in which they are asked.
KINDS = {naming.kind: naming for naming in NAMINGS}


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    kind: str = 'auto',
    options: Options | None = None,
    precision: str = 'float32',
    name: str | None = None,
    backbone: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Converts one checkpoint.

    Args:
      source: file or folder.
      dest: directory to make.
      kind: a key of `KINDS`, or 'auto'.
      options: what the file does not say.
      precision: dtype of the floating parameters; those of norms and logit_scale stay float32.
      name: name in the metadata; None for the published size, where it is one.
      backbone: a converted one, that the frozen one inside the file is compared with.
      overwrite: replace a converted checkpoint at `dest`.
      console: where progress and summary go; None for silence.

    Returns:
      The metadata as stored.

    Raises:
      ValueError: unknown, damaged, unsafe or incomplete source; missing options; a `backbone` of
        another geometry than the one in the file.
      OSError: files that are not there, a destination that exists.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision={precision!r} is not one of {PRECISIONS}')
    converted.check_destination(dest, overwrite=overwrite)
    fetched = hub.fetch_checkpoint(os.fspath(source)) if _is_hub(source) else None
    opened = open_source(fetched.path if fetched else source)
    if kind == 'auto':
        kind = detect(opened)
    plan, params = read_params(opened, kind, options or Options(), precision)
    beside = _look_inside(opened, KINDS[kind], plan, backbone)
    used = {row.source_name for row in plan.rows}
    with _progress(console, sum(leaf.nbytes for leaf in flatten(params).values())) as advance:
        sources, digest = sources_record(opened.files)
        metadata = converted.save_converted(
            dest,
            params,
            {
                'family': KINDS[kind].family,
                'kind': kind,
                'name': name or plan.name,
                'spec': plan.spec,
                'sources': sources,
                'source_sha256': digest,
                'precision': precision,
                'ignored': sorted(plan.tensors.keys() - used),
                'non_finite': non_finite(params, plan.rows),
                **({converted.COLLECTIONS: list(plan.collections)} if plan.collections else {}),
                **({backbone_inside.KEY: beside} if plan.backbone else {}),
                **({converted.HUB: fetched.origin} if fetched else {}),
            },
            overwrite=overwrite,
            on_bytes=advance,
        )
    if console:
        _print_summary(console, params, metadata, dest)
    return metadata


def _is_hub(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).startswith(HUB)


def read_params(
    source: SourceFiles,
    kind: str,
    options: Options,
    precision: str = 'float32',
) -> tuple[Plan, Tree]:
    """The network in an opened checkpoint.

    Args:
      source: of `open_source`.
      kind: a key of `KINDS`.
      options: what the file does not say.
      precision: see `convert`.

    Returns:
      What the file is, and the tree as it is stored, of `PartedArray`s that read the file.

    Raises:
      ValueError: naming the file, if it is incomplete or of no such kind, or options are missing.
    """
    naming = KINDS[kind]
    try:
        plan = naming.plan(source, options)
    except ValueError as error:
        raise ValueError(f'{source.path}: {error}') from error
    context = f'{source.path} does not fit a {naming.family} model of this geometry: {plan.spec}'
    params = import_tree(
        plan.tensors,
        plan.rows,
        with_precision(plan.abstract, precision, keep=plan.collections),
        (*plan.ignore, *backbone_inside.names(naming, plan)),
        parted=True,
        context=context,
    )
    return plan, params


def _look_inside(
    source: SourceFiles, naming: Naming, plan: Plan, path: str | None
) -> dict[str, Any] | None:
    """What the metadata says of the frozen backbone in a file."""
    if path is not None and not plan.backbone:
        raise ValueError(
            f'--backbone: files with {naming.kind} names hold no other network beside them that '
            f'could be compared with {path}'
        )
    try:
        found = backbone_inside.describe(naming, plan)
        if path is not None and found is None:
            raise ValueError(f'--backbone: there is none in it to be compared with {path}')
        if path is not None:
            found['compared'] = backbone_inside.compare(naming, plan, found, backbones.stored(path))
    except ValueError as error:
        raise ValueError(f'{source.path}: {error}') from error
    return found


def detect(source: SourceFiles) -> str:
    """The key of `KINDS` whose names the tensors have; raises ValueError if none."""
    for kind, naming in KINDS.items():
        if naming.matches(source):
            return kind
    names = sorted(source.tensors)
    shown = ', '.join(names[:6]) + (', …' if len(names) > 6 else '')
    raise ValueError(
        f'{source.path}: its tensors ({shown}) have the names of no known kind '
        f'({", ".join(KINDS)}); pass --kind if it is one of them all the same'
    )


@contextlib.contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is called with bytes that were written, of `total`."""
    if console is None:
        yield lambda _: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn('hashing and writing'),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task('convert', total=total)
        yield lambda size: progress.advance(task, size)


def _print_summary(
    console: Console, params: Tree, metadata: dict[str, Any], dest: str | os.PathLike[str]
) -> None:
    table = Table(title=f'{metadata["name"]} ({metadata["family"]}, from {metadata["kind"]} names)')
    for column, justify in (
        ('module', 'left'),
        ('tensors', 'right'),
        ('parameters', 'right'),
        ('MB', 'right'),
        ('dtype', 'left'),
    ):
        table.add_column(column, justify=justify)
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(params).items():
        modules.setdefault('/'.join(path.split('/')[:2]), {})[path] = leaf
    for module, leaves in (*modules.items(), ('total', flatten(params))):
        if module == 'total':
            table.add_section()
        table.add_row(
            module,
            f'{len(leaves):,}',
            f'{count(leaves):,}',
            f'{sum(leaf.nbytes for leaf in leaves.values()) / 1e6:,.2f}',
            ', '.join(sorted({str(leaf.dtype) for leaf in leaves.values()})),
        )
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    for label, value in (
        ('spec', ', '.join(f'{key}={value}' for key, value in metadata['spec'].items())),
        ('activation', metadata['spec'].get('activation', '-')),
        ('source', ', '.join(record['file'] for record in metadata['sources'])),
        *([('from', metadata[converted.HUB])] if converted.HUB in metadata else []),
        ('source sha256', metadata['source_sha256']),
        ('params sha256', metadata['params_sha256']),
        ('ignored', summed_up(metadata['ignored']) or 'nothing'),
        *([('backbone inside', _comparison(metadata))] if backbone_inside.KEY in metadata else []),
        ('written to', os.fspath(dest)),
    ):
        facts.add_row(label, value)
    console.print(facts)
    found = metadata.get(backbone_inside.KEY)
    if found and found['compared'] and found['compared']['differing']:
        console.print(
            'warning: the network was trained on another backbone than the one it was compared '
            'with, or on one that was trained along with it; it belongs to the one in its file.',
            style='bold red',
        )
    if metadata['non_finite']:
        console.print(
            f'warning: NaN or infinite values in {summed_up(metadata["non_finite"])}; a network '
            'with them gives no scores. The file is damaged, or its training had diverged.',
            style='bold red',
        )


def _comparison(metadata: dict[str, Any]) -> str:
    """What is said of the backbone in a file."""
    found = metadata[backbone_inside.KEY]
    if found is None:
        return 'none'
    shown, compared = backbone_inside.shown(found), found['compared']
    if compared is None:
        return (
            f'{shown}: left out, and not compared; --backbone DIR tells whether a converted one '
            'is the same'
        )
    differing, where = compared['differing'], compared['path']
    if not differing:
        return f'{shown}: left out; rounded to float16 it is the same as {where}'
    return (
        f'{shown}: left out; rounded to float16, {len(differing)} tensors differ from those of '
        f'{where}: {summed_up(differing)}'
    )


def summed_up(names: Sequence[str]) -> str:
    """Names of tensors for one line: all of a few, else the modules that they are in."""
    if len(names) <= 8:
        return ', '.join(names)
    modules = collections.Counter(
        f'{first}.…' if dot else first for first, dot, _ in (name.partition('.') for name in names)
    )
    parts = [module if n == 1 else f'{module} ({n})' for module, n in modules.most_common(8)]
    rest = ', …' if len(modules) > 8 else ''
    return f'{len(names)} tensors: {", ".join(parts)}{rest} (all in the metadata)'


def export(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    step: str | None = None,
    *,
    with_backbone: bool = False,
    backbone: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, np.ndarray]:
    """Writes a step of a run or a converted checkpoint under the authors' names.

    The network is in memory as a whole, of a backbone a tensor at a time.

    Args:
      source: folder of the run, or converted checkpoint.
      dest: file to write.
      step: of a run: a number or 'best'; None for the newest.
      with_backbone: also write the frozen backbone, as the authors' files hold it.
      backbone: the converted one; None for the one that the run was trained on.
      overwrite: replace `dest`.
      console: where the summary goes; None for silence.

    Returns:
      The tensors as written, views of the file.

    Raises:
      ValueError: `source` is of a family without such names, or holds parameters without one; the
        backbone is not the one of the run, or none is named.
      OSError: nothing at `source`, or `dest` exists.
    """
    trained_on, dtypes, image_size = None, None, None
    if is_run(source):  # the average of its parameters if it kept one
        folder = find_checkpoint(source, step)
        metadata = read_metadata(folder)
        model = metadata['config']['model']
        naming = _way_back(source, model['family'])
        way = naming.export
        if model.get('head', way.head) != way.head:
            raise ValueError(
                f'{source}: trained with model.head={model["head"]}, but the names of '
                f'{model["family"]} checkpoints have a place for head={way.head} only: the export '
                f'needs head={way.head}'
            )
        trained_on = metadata['backbone']
        sizes = way.run_sizes(model, trained_on and trained_on['spec'])
        image_size = trained_on and trained_on['spec']['image_size']
        tree = converted.stored_tree(read_host_variables(folder))
    else:
        metadata = converted.load_metadata(source)
        naming, sizes = _way_back(source, metadata['family']), metadata['spec']
        way = naming.export
        found = metadata.get(backbone_inside.KEY)
        dtypes = found and found['dtypes']
        tree = converted.load_params(source, as_numpy=True)
    tensors = outgoing(tree, way.rows(sizes), way.prefix)
    if with_backbone:
        frozen = _backbone_of(source, trained_on, backbone)
        tensors += backbone_inside.export(naming, frozen, way.prefix, dtypes, image_size)
        _check_together(naming, tensors, f'{source} does not fit {frozen.path}')
    export_file(tensors, dest, overwrite=overwrite)
    written = read_safetensors(dest)
    if console:
        size = os.path.getsize(dest) / 1e6
        console.print(f'{len(written)} tensors, {size:,.1f} MB written to {os.fspath(dest)}')
    return written


def _way_back(source: str | os.PathLike[str], family: str) -> Naming:
    ways = {
        each: naming
        for naming in KINDS.values()
        if naming.export
        for each in (naming.family, *naming.export.runs)
    }
    if family not in ways:
        raise ValueError(
            f'{source} is of family {family!r}; only {", ".join(ways)} checkpoints are exported'
        )
    return ways[family]


def _check_together(naming: Naming, tensors: Sequence[Outgoing], context: str) -> None:
    """Raises ValueError, with `context`, for a network and a backbone that no file holds both."""
    named = {each.row.source_name: each for each in tensors if each.name}
    try:
        plan = naming.plan(SourceFiles(Path(), (), named), Options())
    except ValueError as error:
        raise ValueError(f'{context}: {error}') from error
    known = {row.source_name for row in plan.rows}.union(backbone_inside.names(naming, plan))
    foreign = [name for name in named if name not in known]
    if foreign:
        raise ValueError(
            f'{context}: it has names that files of this network do not have, such as {foreign[0]}'
        )


def _backbone_of(
    source: str | os.PathLike[str], trained_on: Mapping[str, Any] | None, path: str | None
) -> Backbone:
    """The converted backbone to export with a network.

    Args:
      source: the network.
      trained_on: what a run says of its backbone; None for a converted network.
      path: of a converted one, if one was named.
    """
    if path is None and trained_on is None:
        raise ValueError(
            f'{source} does not say where its backbone is; pass --backbone with a converted one'
        )
    found = backbones.stored(path or trained_on['path'])
    if trained_on and backbone_sha256(trained_on) != found.params_sha256:
        raise ValueError(
            f'{found.path} has {describe_backbone(found.identity())}, but {source} was trained on '
            f'{describe_backbone(trained_on)}; pass the right one with --backbone'
        )
    return found


def run(args: argparse.Namespace) -> int:
    """Does what the arguments say; returns the exit code: 0, or 2 with one message on stderr."""
    console = Console()
    try:
        if args.with_backbone and not args.export:
            raise ValueError('--with_backbone is of --export; --backbone DIR compares')
        if args.export and _is_hub(args.source):
            raise ValueError(f'--export: {args.source} is not here; name a run or a conversion')
        if args.export and args.backbone and not args.with_backbone:
            raise ValueError('--export --backbone DIR: pass --with_backbone too, to write it')
        if args.export:
            export(
                args.source,
                args.dest,
                args.step,
                with_backbone=args.with_backbone,
                backbone=args.backbone,
                overwrite=args.overwrite,
                console=console,
            )
        else:
            convert(
                args.source,
                args.dest,
                kind=args.kind,
                options=Options(args.activation, args.num_heads, args.text_num_heads),
                precision=args.precision,
                name=args.name,
                backbone=args.backbone,
                overwrite=args.overwrite,
                console=console,
            )
    except (ValueError, OSError) as error:
        print(lines(f'error: {error}'), file=sys.stderr)
        return 2
    return 0
