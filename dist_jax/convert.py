"""What `dist_jax convert` does: foreign checkpoints in, converted ones out, and the way back.

It knows no family: which names there are, and what becomes of them, `dist_jax.models.NAMINGS` says.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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

from dist_jax.checkpoint import find_checkpoint, is_run, read_host_variables, read_metadata
from dist_jax.convert_arguments import PRECISIONS
from dist_jax.models import NAMINGS, converted
from dist_jax.models.naming import Export, Options, Plan
from dist_jax.models.params import (
    Tree,
    count,
    export_file,
    flatten,
    import_tree,
    non_finite,
    with_precision,
)
from dist_jax.models.source_files import SourceFiles, open_source, sources_record
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
      overwrite: replace a converted checkpoint at `dest`.
      console: where progress and summary go; None for silence.

    Returns:
      The metadata as stored.

    Raises:
      ValueError: unknown, damaged, unsafe or incomplete source; missing options.
      OSError: files that are not there, a destination that exists.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision={precision!r} is not one of {PRECISIONS}')
    converted.check_destination(dest, overwrite=overwrite)
    opened = open_source(source)
    if kind == 'auto':
        kind = detect(opened)
    plan, params = read_params(opened, kind, options or Options(), precision)
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
            },
            overwrite=overwrite,
            on_bytes=advance,
        )
    if console:
        _print_summary(console, params, metadata, dest)
    return metadata


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
        plan.ignore,
        parted=True,
        context=context,
    )
    return plan, params


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
        ('source sha256', metadata['source_sha256']),
        ('params sha256', metadata['params_sha256']),
        ('ignored', summed_up(metadata['ignored']) or 'nothing'),
        ('written to', os.fspath(dest)),
    ):
        facts.add_row(label, value)
    console.print(facts)
    if metadata['non_finite']:
        console.print(
            f'warning: NaN or infinite values in {summed_up(metadata["non_finite"])}; a network '
            'with them gives no scores. The file is damaged, or its training had diverged.',
            style='bold red',
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
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, np.ndarray]:
    """Writes a step of a run or a converted checkpoint under the authors' names.

    Args:
      source: folder of the run, or converted checkpoint.
      dest: file to write.
      step: of a run: a number or 'best'; None for the newest.
      overwrite: replace `dest`.
      console: where the summary goes; None for silence.

    Returns:
      The tensors as written.

    Raises:
      ValueError: `source` is of a family without such names, or holds parameters without one.
      OSError: nothing at `source`, or `dest` exists.
    """
    if is_run(source):  # the average of its parameters if it kept one
        folder = find_checkpoint(source, step)
        metadata = read_metadata(folder)
        model = metadata['config']['model']
        way = _way_back(source, model['family'])
        if model.get('head', way.head) != way.head:
            raise ValueError(
                f'{source}: trained with model.head={model["head"]}, but the names of '
                f'{model["family"]} checkpoints have a place for head={way.head} only: the export '
                f'needs head={way.head}'
            )
        backbone = metadata['backbone']
        sizes = way.run_sizes(model, backbone and backbone['spec'])
        tree = converted.stored_tree(read_host_variables(folder))
    else:
        metadata = converted.load_metadata(source)
        way, sizes = _way_back(source, metadata['family']), metadata['spec']
        tree = converted.load_params(source, as_numpy=True)
    tensors = export_file(tree, way.rows(sizes), way.prefix, dest, overwrite=overwrite)
    if console:
        size = os.path.getsize(dest) / 1e6
        console.print(f'{len(tensors)} tensors, {size:,.1f} MB written to {os.fspath(dest)}')
    return tensors


def _way_back(source: str | os.PathLike[str], family: str) -> Export:
    ways = {naming.family: naming.export for naming in KINDS.values() if naming.export}
    if family not in ways:
        raise ValueError(
            f'{source} is of family {family!r}; only {", ".join(ways)} checkpoints are exported'
        )
    return ways[family]


def run(args: argparse.Namespace) -> int:
    """Does what the arguments say; returns the exit code: 0, or 2 with one message on stderr."""
    console = Console()
    try:
        if args.export:
            export(args.source, args.dest, args.step, overwrite=args.overwrite, console=console)
        else:
            convert(
                args.source,
                args.dest,
                kind=args.kind,
                options=Options(args.activation, args.num_heads, args.text_num_heads),
                precision=args.precision,
                name=args.name,
                overwrite=args.overwrite,
                console=console,
            )
    except (ValueError, OSError) as error:
        print(lines(f'error: {error}'), file=sys.stderr)
        return 2
    return 0
