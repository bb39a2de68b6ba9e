"""Compares our models with recorded runs of the reference systems, tensor by tensor.

FILE is a golden safetensors file, or a folder with a checkpoint and `expected.safetensors`; its
metadata decide family and sizes. Everything recorded has to be reproduced in float32: forward
values within --forward_bound, gradients within --gradient_bound, both relative to the largest
recorded value of the tensor. A recorded tensor that nothing was compared with is a failure.

Gradients that are zero on paper are rounding noise in a recording. Ours have to be small beside
the largest recorded gradient of their section, whatever the scale of the loss.

Convolutional networks with batch statistics magnify rounding: those of STS have bounds of their own
in float32, and with --float64 they run in float64, as they were recorded, within 1e-6 and 1e-5.

A recording is rounded too. Where a bound is missed and the family has a reading in float64, ours
has to be at least as near to it as the recording, whose own distance has to be one that rounding
explains. The bound is then twice that distance: no two runs that are as near differ by more.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from input_pipeline.escape import Console, lines, styled
from tools.parity import clip, dist, evl, side4video, side4video_exact, side4video_retrieval, sts
from tools.parity.golden import Golden, gradient_section, is_gradient, read_golden

FORWARD_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
# Of the largest recorded gradient of the section. Such a gradient is a sum of terms of that size
# that cancel, each rounded at 6e-8: up to 2e-7 of it is seen, and a term too many is as large as
# the others.
ZERO_GRADIENT_BOUND = 1e-5
# How far from float64 a float32 recording may be for rounding to be the reason: ten times the
# bounds. The largest distances seen are 2.9e-5 and 3.8e-5. A mistake that both readings of ours
# share is not excused: GELU by tanh moves values by 1.9e-3 and gradients by 3.7e-3. A wrong epsilon
# of a norm would be: it moves them by 5.5e-5.
ROUNDING = {'forward': 1e-4, 'gradient': 1e-3}

# Of a convolutional network in float64, (forward, gradient).
FLOAT64_BOUNDS = (1e-6, 1e-5)
ZERO = 'zero on paper: over the largest gradient beside it'

EXAMPLES = """\
examples:
  python -m tools.check_parity tests/golden/dist_small.safetensors
  python -m tools.check_parity tests/golden/clip/hf --json rows.json
  python -m tools.check_parity tests/golden/clip/* --forward_bound 2e-6
  python -m tools.check_parity tests/golden/sts_*.safetensors --float64

exit code: 0 all within bounds, 1 something is not, 2 a file that cannot be checked
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      matches: recognises its files.
      run: golden -> {recorded name: our array}.
      exact: golden -> {recorded name: float64}, by other means than ours; None where there is none.
      run64: golden -> {recorded name: our array}, all in float64; None where there is no such way.
      error: (golden, name, recorded, ours) -> how far a tensor is off, where its family has a
        measure of its own for it, else None.
      bounds: of `run`, (forward, gradient), of a file.
      given: names of what a file holds beside the usual sections that is not to be reproduced.
      zero: names of gradients that are zero on paper, beside those that a file lists.
    """

    matches: Callable[[Golden], bool]
    run: Callable[[Golden], dict[str, np.ndarray]]
    exact: Callable[[Golden], dict[str, np.ndarray]] | None = None
    run64: Callable[[Golden], dict[str, np.ndarray]] | None = None
    error: Callable[[Golden, str, np.ndarray, np.ndarray], float | None] | None = None
    bounds: Callable[[Golden], tuple[float, float]] = lambda golden: (
        FORWARD_BOUND,
        GRADIENT_BOUND,
    )
    given: Callable[[Golden], frozenset[str]] = lambda golden: frozenset()
    zero: Callable[[Golden], frozenset[str]] = lambda golden: frozenset()


FAMILIES: dict[str, Family] = {
    'clip': Family(clip.matches, clip.run),
    'dist': Family(dist.matches, dist.run),
    'evl': Family(evl.matches, evl.run),
    'side4video': Family(side4video.matches, side4video.run, side4video_exact.run),
    'side4video_retrieval': Family(
        side4video_retrieval.matches,
        side4video_retrieval.run,
        bounds=lambda golden: (
            side4video_retrieval.EVA_BOUNDS
            if side4video_retrieval.is_eva(golden)
            else (FORWARD_BOUND, GRADIENT_BOUND)
        ),
        given=side4video_retrieval.given,
        zero=side4video_retrieval.zero,
    ),
    'sts': Family(
        sts.matches,
        sts.run,
        run64=functools.partial(sts.run, dtype=jnp.float64),
        error=sts.error,
        bounds=lambda golden: (
            sts.FLOAT32_BOUNDS if sts.is_network(golden) else (FORWARD_BOUND, GRADIENT_BOUND)
        ),
    ),
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
      error: largest deviation over `max_abs`; absolute where that is 0. Of a gradient that is zero
        on paper ours over the largest one beside it. None if nothing comparable came out.
      bound: what `error` may be.
      ok: within the bound.
      note: why there is no error, what it is relative to, or how far the exact value is.
      ours_to_exact: largest deviation of ours from the exact value over `max_abs`; None where the
        recording was enough.
      recorded_to_exact: likewise of the recording.
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
    ours_to_exact: float | None = None
    recorded_to_exact: float | None = None


def compare(
    name: str,
    recorded: np.ndarray,
    ours: np.ndarray | None,
    *,
    file: str = '',
    family: str = '',
    forward_bound: float = FORWARD_BOUND,
    gradient_bound: float = GRADIENT_BOUND,
    zero_beside: float | None = None,
    measured: Callable[[np.ndarray, np.ndarray], float | None] = lambda recorded, ours: None,
) -> ParityRow:
    """One recorded tensor against ours; None where the model gave nothing of that name.

    `measured` (recorded, ours) may say how far a tensor is off; where it does not, the largest
    deviation over the largest value counts. Of a gradient that is zero on paper, `zero_beside` is
    the largest recorded one of its section.
    """
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
        elif zero_beside is not None:
            error, bound, note = float(np.abs(ours).max(initial=0.0)), ZERO_GRADIENT_BOUND, ZERO
            error /= zero_beside or 1.0
        elif (own := measured(recorded, np.asarray(ours, np.float64))) is not None:
            error = own
        elif max_abs == 0:
            error, note = deviation, 'all zero: absolute'
        else:
            error = deviation / max_abs
    ok = error is not None and error <= bound
    return ParityRow(file, family, name, kind, recorded.shape, max_abs, error, bound, ok, note)


def judge(row: ParityRow, recorded: np.ndarray, ours: np.ndarray, exact: np.ndarray) -> ParityRow:
    """A row that misses its bound, against the exact value: see the module for the rule."""

    def distance(x: np.ndarray) -> float:
        return float(np.abs(np.asarray(x, np.float64) - exact).max(initial=0.0)) / row.max_abs

    of_ours, of_recorded = distance(ours), distance(recorded)
    excused = of_ours <= of_recorded <= ROUNDING[row.kind]
    return dataclasses.replace(
        row,
        ok=excused,
        bound=2 * of_recorded if excused else row.bound,
        note=f'from the exact value: ours {of_ours:.1e}, the recording {of_recorded:.1e}',
        ours_to_exact=of_ours,
        recorded_to_exact=of_recorded,
    )


def check(
    path: str | os.PathLike[str],
    *,
    forward_bound: float | None = None,
    gradient_bound: float | None = None,
    float64: bool = False,
) -> list[ParityRow]:
    """Runs our model on a golden file or folder and compares everything recorded.

    Args:
      path: of it.
      forward_bound: None for that of the family.
      gradient_bound: likewise.
      float64: run our model in float64.

    Returns:
      One row a recorded tensor, worst first.

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no golden file, of no known family, or of one that has no float64.
    """
    golden = read_golden(path)
    family = next((name for name, row in FAMILIES.items() if row.matches(golden)), None)
    if family is None:
        raise ValueError(
            f'{path}: config {sorted(golden.config)} belongs to none of the families '
            f'{list(FAMILIES)}'
        )
    given = FAMILIES[family].given(golden)
    recorded = {name: value for name, value in golden.recorded.items() if name not in given}
    if not recorded:
        raise ValueError(f'{path}: nothing is recorded in it, only inputs and parameters')
    strides = golden.metadata.get('grad_stride', {})

    def in_layout(name: str, value: np.ndarray) -> np.ndarray:
        return np.asarray(value).reshape(-1)[:: strides[name]] if name in strides else value

    run, bounds = FAMILIES[family].run, FAMILIES[family].bounds(golden)
    if float64:
        run, bounds = FAMILIES[family].run64, FLOAT64_BOUNDS
        if run is None:
            raise ValueError(f'{path}: {family} computes in float32 at most; leave --float64 out')
    forward_bound = bounds[0] if forward_bound is None else forward_bound
    gradient_bound = bounds[1] if gradient_bound is None else gradient_bound
    measure = FAMILIES[family].error

    def measured(name: str, recorded: np.ndarray, ours: np.ndarray) -> float | None:
        return None if measure is None else measure(golden, name, recorded, ours)

    with jax.default_matmul_precision('highest'), jax.enable_x64(float64):
        ours = run(golden)
    ours = {name: in_layout(name, value) for name, value in ours.items()}
    largest = _largest_gradients(golden)
    zero = golden.zero_gradients | FAMILIES[family].zero(golden)
    rows = [
        compare(
            name,
            value,
            ours.get(name),
            file=os.fspath(path),
            family=family,
            forward_bound=forward_bound,
            gradient_bound=gradient_bound,
            zero_beside=largest[gradient_section(name)] if name in zero else None,
            measured=functools.partial(measured, name),
        )
        for name, value in recorded.items()
    ]
    exact_of = FAMILIES[family].exact
    if exact_of and any(map(_is_off, rows)):
        exact = {name: in_layout(name, value) for name, value in exact_of(golden).items()}
        rows = [
            judge(row, recorded[row.name], ours[row.name], exact[row.name])
            if _is_off(row) and row.name in exact
            else row
            for row in rows
        ]
    return sorted(rows, key=_badness, reverse=True)


def _largest_gradients(golden: Golden) -> dict[str, float]:
    """The largest recorded magnitude of every section of gradients."""
    found: dict[str, float] = {}
    for name, value in golden.recorded.items():
        if is_gradient(name):
            section = gradient_section(name)
            found[section] = max(found.get(section, 0.0), float(np.abs(value).max(initial=0.0)))
    return found


def _is_off(row: ParityRow) -> bool:
    """Whether an error beyond the bound might be the recording's own."""
    return not row.ok and row.error is not None and row.max_abs > 0 and row.note != ZERO


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
        if row.error is not None and row.ours_to_exact is None and row.note:
            error += ' zero' if row.note == ZERO else ' abs'
        by_exact = '' if row.ours_to_exact is None else '*'
        table.add_row(
            row.name,
            'x'.join(map(str, row.shape)) or 'scalar',
            f'{row.max_abs:.2e}',
            error,
            f'{row.bound:.0e}',
            f'yes{by_exact}' if row.ok else styled((f'NO{by_exact}', 'bold red')),
        )
    console.print(table)
    for row in rows:
        if row.ours_to_exact is not None:
            console.print(f'* {row.name}: {row.note}')
    for kind in ('forward', 'gradient'):
        row = worst(rows, kind)
        if row:
            error = row.note if row.error is None else f'{row.error:.2e}'
            console.print(f'worst {kind}: {error} (bound {row.bound:.0e}) in {row.name}')
    failed = sum(not row.ok for row in rows)
    judged = sum(row.ok and row.ours_to_exact is not None for row in rows)
    verdict = (f'{failed} outside their bounds', 'bold red') if failed else 'all within bounds'
    if judged and not failed:
        verdict += (
            f', {judged} of them (*) within one widened by the rounding of the recording: ours is '
            'at least as near to the exact value, computed in float64'
        )
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
    parser.add_argument('--forward_bound', type=float, help='default: that of the family')
    parser.add_argument('--gradient_bound', type=float, help='default: that of the family')
    parser.add_argument('--float64', action='store_true', help='run our model in float64')
    args = parser.parse_args(argv)
    console = Console()
    rows: list[ParityRow] = []
    broken = False
    for path in args.paths:
        try:
            found = check(
                path,
                forward_bound=args.forward_bound,
                gradient_bound=args.gradient_bound,
                float64=args.float64,
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
