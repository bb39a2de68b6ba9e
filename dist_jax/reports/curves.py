"""Curves of what a run logged: one picture a figure, all of them on a sheet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_jax.scalars import SCALARS, SHARE, VALIDATION

if TYPE_CHECKING:  # matplotlib costs half a second and is needed at the end of a run only
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

SMOOTHED_FROM = 12  # points of a curve below which smoothing would hide more than it shows
LINE_FROM = 3  # below that there is no curve: points, with their values
LEGEND_ROOM = 1.35  # upper end of an axis over its highest value, where a legend stands on top


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture of what was logged.

    Attributes:
      title: what it is of.
      needs: figures of which one must have been logged.
      draw: draws it from the rows of `metrics.jsonl`.
    """

    title: str
    needs: tuple[str, ...]
    draw: Callable[[Axes, Rows], None]


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one figure: finite ones, in order, the last of a repeated step."""
    found: dict[int, float] = {}
    for row in rows:
        try:
            found[int(row['step'])] = float(row[name])  # 'nan' and 'inf' are strings in JSON Lines
        except (KeyError, TypeError, ValueError):
            continue
    steps = sorted(step for step, value in found.items() if math.isfinite(value))
    return np.array(steps, np.int64), np.array([found[step] for step in steps])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values; at the ends over those that are there."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def _plot(axis: Axes, rows: Rows, name: str, label: str = '', scale: float = 1.0) -> None:
    """One curve, with points where there are few of them; points alone where there are fewer."""
    steps, values = _series(rows, name)
    if not len(steps):
        return
    line = '-' if len(steps) >= LINE_FROM else 'none'
    marker = 'o' if len(steps) <= 30 else ''
    axis.plot(
        steps,
        scale * values,
        linestyle=line,
        marker=marker,
        markersize=3.5,
        label=label or None,
    )
    if line == 'none':
        for step, value in zip(steps, scale * values):
            axis.annotate(
                f'{value:.3g}',
                (step, value),
                (-6, 0),
                textcoords='offset points',
                ha='right',
                va='center',
                fontsize=8,
            )


def _plot_smoothed(axis: Axes, rows: Rows, name: str) -> None:
    """A noisy curve: smoothed, with the raw one faint behind it."""
    steps, values = _series(rows, name)
    if len(steps) < SMOOTHED_FROM:
        _plot(axis, rows, name)
        return
    window = max(5, len(values) // 20)
    axis.plot(steps, values, color='C0', alpha=0.3, linewidth=1)
    axis.plot(steps, smooth(values, window), color='C0')


def _from_zero(axis: Axes) -> None:
    """The axis begins at 0 and ends above the curve."""
    highest = max((max(line.get_ydata()) for line in axis.lines), default=0)
    axis.set_ylim(0, 1.08 * highest or 1)


def _draw_loss(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'loss')
    axis.set_title('training loss')


def _validation(curve: str) -> Panel:
    """The figures of evaluations whose rows in SCALARS name this curve."""
    kinds = {name: kind for name, kind in SCALARS.items() if kind.curve == curve}
    shares = all(kind.unit == SHARE for kind in kinds.values())
    title = f'validation {curve}'

    def draw(axis: Axes, rows: Rows) -> None:
        for name, kind in kinds.items():
            _plot(axis, rows, VALIDATION + name, kind.label, 100 if shares else 1)
        axis.set_title(f'{title}, %' if shares else title)
        if shares:
            axis.set_ylim(-3, 103)
        if len(axis.lines) > 1:
            few = any(line.get_linestyle() == 'None' for line in axis.lines)
            axis.legend(loc='upper left' if few else 'best')  # values stand on the left of points

    return Panel(title, tuple(VALIDATION + name for name in kinds), draw)


def _draw_learning_rate(axis: Axes, rows: Rows) -> None:
    _plot(axis, rows, 'learning_rate')
    axis.set_title('learning rate')
    axis.yaxis.set_major_formatter(lambda rate, _: f'{rate:.3g}')
    _from_zero(axis)


def _draw_grad_norm(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'grad_norm')
    axis.set_title('gradient norm')
    _from_zero(axis)


def _draw_speed(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'clips_per_second')
    axis.set_title('clips per second')
    _from_zero(axis)


def _draw_step_time(axis: Axes, rows: Rows) -> None:
    steps, compute = _series(rows, 'compute_seconds')
    waited_at, waited = _series(rows, 'data_wait_seconds')
    steps, here, there = np.intersect1d(steps, waited_at, return_indices=True)
    compute, waited = compute[here], waited[there]
    title = 'seconds per step'
    if len(steps) and len(steps) < LINE_FROM:
        width = 0.04 * max(int(steps[-1]), 1)
        axis.bar(steps, compute, width, label='compute')
        axis.bar(steps, waited, width, bottom=compute, label='data wait')
        axis.set_ylim(0, (compute + waited).max() * LEGEND_ROOM)
    elif len(steps):
        axis.stackplot(steps, compute, waited, labels=('compute', 'data wait'), alpha=0.85)
        # The first step is often compilation, far above the rest.
        total = compute + waited
        top = np.quantile(total, 0.95) * 1.6
        if total.max() > top:
            axis.set_ylim(0, top)
            title += f', at most {total.max():.3g}'
        else:
            axis.set_ylim(0, total.max() * LEGEND_ROOM)
    axis.set_title(title)
    axis.set_ylim(bottom=0)
    axis.legend(loc='upper left', ncols=2)


PANELS = (
    Panel('training loss', ('loss',), _draw_loss),
    *map(_validation, dict.fromkeys(kind.curve for kind in SCALARS.values() if kind.curve)),
    Panel('learning rate', ('learning_rate',), _draw_learning_rate),
    Panel('gradient norm', ('grad_norm',), _draw_grad_norm),
    Panel('clips per second', ('clips_per_second',), _draw_speed),
    Panel('seconds per step', ('compute_seconds',), _draw_step_time),
)


def panels(rows: Rows) -> list[Panel]:
    """Those for which something was logged."""
    return [p for p in PANELS if any(len(_series(rows, name)[0]) for name in p.needs)]


def single(panel: Panel, rows: Rows) -> Figure:
    """One panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.9), layout='constrained')
    _draw_panel(figure.subplots(), panel, rows)
    return figure


def sheet(shown: Sequence[Panel], rows: Rows) -> Figure:
    """Panels on one sheet, three a row."""
    from matplotlib.figure import Figure

    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.6 * across, 2.9 * down), layout='constrained')
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, panel in zip(axes, shown):
        _draw_panel(axis, panel, rows)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _draw_panel(axis: Axes, panel: Panel, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.draw(axis, rows)
    last = max(int(row['step']) for row in rows if 'step' in row)
    axis.set_xlim(0, 1.02 * last + 0.5)
    axis.set_xlabel('step')
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(True)
