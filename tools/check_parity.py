"""Compares our models with recorded runs of the reference systems, tensor by tensor.

FILE is a golden safetensors file, or a folder with a checkpoint and `expected.safetensors`; its
metadata decide family and sizes. Everything recorded has to be reproduced in float32: forward
values within --forward_bound, gradients within --gradient_bound, both relative to the largest
recorded value of the tensor. A recorded tensor that nothing was compared with is a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from input_pipeline.escape import Console, lines, styled
from tools.parity import clip, dist, evl, side4video
from tools.parity.golden import Golden, is_gradient, read_golden

FORWARD_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
ZERO_GRADIENT_BOUND = 1e-6  # absolute

EXAMPLES = """\
examples:
  python -m tools.check_parity tests/golden/dist_small.safetensors
  python -m tools.check_parity tests/golden/clip/hf --json rows.json
  python -m tools.check_parity tests/golden/clip/* --forward_bound 2e-6

exit code: 0 all within bounds, 1 something is not, 2 a file that cannot be checked
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family: how to recognise its files, and golden -> {recorded name: our array}."""

    matches: Callable[[Golden], bool]
    run: Callable[[Golden], dict[str, np.ndarray]]


FAMILIES: dict[str, Family] = {
    'clip': Family(clip.matches, clip.run),
    'dist': Family(dist.matches, dist.run),
    'evl': Family(evl.matches, evl.run),
    'side4video': Family(side4video.matches, side4video.run),
}


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """Comparison of one recorded tensor.

    Attributes:
      file: what was checked.
      family: key of `FAMILIES`.
      name: recorded tensor.
      kind: 'forward' or 'gradient'.
      shape: recorded shape.
      max_abs: largest recorded magnitude.
      error: largest deviation over `max_abs`; absolute where that is 0 or the gradient is zero on
        paper; None if nothing comparable came out.
      bound: what `error` may be.
      ok: within the bound.
      note: why there is no error, or what it is relative to.
    """

    file: str
    family: str
    name: str
    kind: str
    shape: tuple[int, ...]
    max_abs: float
    error: float | None
    bound: float
    ok: bool
    note: str = ''


def compare(
    name: str,
    recorded: np.ndarray,
    ours: np.ndarray | None,
    *,
    file: str = '',
    family: str = '',
    forward_bound: float = FORWARD_BOUND,
    gradient_bound: float = GRADIENT_BOUND,
    zero_on_paper: bool = False,
) -> ParityRow:
    """One recorded tensor against ours; None where the model gave nothing of that name."""
    kind = 'gradient' if is_gradient(name) else 'forward'
    bound = gradient_bound if kind == 'gradient' else forward_bound
    recorded = np.asarray(recorded, np.float64)
    max_abs = float(np.abs(recorded).max(initial=0.0))
    error, note = None, ''
    if ours is None:
        note = 'not compared'
    elif np.shape(ours) != recorded.shape:
        note = f'our shape is {np.shape(ours)}'
    else:
        deviation = float(np.abs(np.asarray(ours, np.float64) - recorded).max(initial=0.0))
        if not math.isfinite(deviation):
            note = 'not finite'
        elif zero_on_paper:
            error, bound, note = deviation, ZERO_GRADIENT_BOUND, 'zero on paper: absolute'
        elif max_abs == 0:
            error, note = deviation, 'all zero: absolute'
        else:
            error = deviation / max_abs
    ok = error is not None and error <= bound
    return ParityRow(file, family, name, kind, recorded.shape, max_abs, error, bound, ok, note)


def check(
    path: str | os.PathLike[str],
    *,
    forward_bound: float = FORWARD_BOUND,
    gradient_bound: float = GRADIENT_BOUND,
) -> list[ParityRow]:
    """Runs our model on a golden file or folder and compares everything recorded.

    Returns:
      One row a recorded tensor, worst first.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no golden file, or of no known family.
    """
    golden = read_golden(path)
    family = next((name for name, row in FAMILIES.items() if row.matches(golden)), None)
    if family is None:
        raise ValueError(
            f'{path}: config {sorted(golden.config)} belongs to none of the families '
            f'{list(FAMILIES)}'
        )
    recorded = golden.recorded
    if not recorded:
        raise ValueError(f'{path}: nothing is recorded in it, only inputs and parameters')
    with jax.default_matmul_precision('highest'):
        ours = FAMILIES[family].run(golden)
    for name, stride in golden.metadata.get('grad_stride', {}).items():
        if name in ours:
            ours[name] = np.asarray(ours[name]).reshape(-1)[::stride]
    rows = [
        compare(
            name,
            value,
            ours.get(name),
            file=os.fspath(path),
            family=family,
            forward_bound=forward_bound,
            gradient_bound=gradient_bound,
            zero_on_paper=name in golden.zero_gradients,
        )
        for name, value in recorded.items()
    ]
    return sorted(rows, key=_badness, reverse=True)


def _badness(row: ParityRow) -> float:
    return math.inf if row.error is None else row.error / row.bound


def worst(rows: Iterable[ParityRow], kind: str) -> ParityRow | None:
    """The row of a kind that is nearest to, or farthest over, its bound."""
    return max((row for row in rows if row.kind == kind), key=_badness, default=None)


def print_rows(console: Console, path: str, rows: Sequence[ParityRow]) -> None:
    """Table, worst first, and a line on the worst forward and gradient tensors."""
    table = Table(title=f'{path} ({rows[0].family})')
    for column, justify in (
        ('tensor', 'left'),
        ('shape', 'left'),
        ('max |ref|', 'right'),
        ('error', 'right'),
        ('bound', 'right'),
        ('ok', 'left'),
    ):
        table.add_column(column, justify=justify, overflow='fold')
    for row in rows:
        error = row.note if row.error is None else f'{row.error:.1e}'
        if row.error is not None and row.note:
            error += ' abs'
        table.add_row(
            row.name,
            'x'.join(map(str, row.shape)) or 'scalar',
            f'{row.max_abs:.2e}',
            error,
            f'{row.bound:.0e}',
            'yes' if row.ok else styled(('NO', 'bold red')),
        )
    console.print(table)
    for kind in ('forward', 'gradient'):
        row = worst(rows, kind)
        if row:
            error = row.note if row.error is None else f'{row.error:.2e}'
            console.print(f'worst {kind}: {error} (bound {row.bound:.0e}) in {row.name}')
    failed = sum(not row.ok for row in rows)
    verdict = (f'{failed} outside their bounds', 'bold red') if failed else 'all within bounds'
    console.print(styled(f'{len(rows)} tensors compared, ', verdict))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0 (all within bounds), 1 (not), 2 (a file that cannot be checked)."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.check_parity',
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('paths', nargs='+', metavar='FILE', help='golden file or folder')
    parser.add_argument('--json', metavar='FILE', help='write the rows of all files as a JSON list')
    parser.add_argument('--forward_bound', type=float, default=FORWARD_BOUND)
    parser.add_argument('--gradient_bound', type=float, default=GRADIENT_BOUND)
    args = parser.parse_args(argv)
    console = Console()
    rows: list[ParityRow] = []
    broken = False
    for path in args.paths:
        try:
            found = check(
                path, forward_bound=args.forward_bound, gradient_bound=args.gradient_bound
            )
        except (ValueError, OSError) as error:
            print(lines(f'error: {error}'), file=sys.stderr)
            broken = True
            continue
        print_rows(console, path, found)
        rows += found
    if args.json:
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        Path(args.json).write_text(text + '\n')
    return 2 if broken else 0 if all(row.ok for row in rows) else 1


if __name__ == '__main__':
    raise SystemExit(main())
