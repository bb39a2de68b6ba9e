"""What the study draws: accuracy over what it costs, parts, shares of the data, fusion."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tools.studying.results import Cells
from tools.studying.rows import FUSIONS, ROWS, Row, fusion_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

# Of families, to be told apart on light and on dark paper; marks for those who see no colours.
COLOURS = {
    'zero-shot': ('#8c8c8c', 'X'),
    'frame mean': ('#b0882f', 's'),
    'attentive probe': ('#c9569b', 'v'),
    'fine-tuning': ('#d0453f', 'D'),
    'DiST': ('#2f81d6', 'o'),
    'EVL': ('#d9772b', '^'),
    'Side4Video': ('#2f9e4f', 'P'),
    'STS': ('#8866cc', '*'),
}
DIM = '#8c8c8c'  # of lines to compare with
LEFT_OUT = 0.6  # an axis of accuracies may begin above 0 if all are above this
# (figure, title, unit in which it is shown)
COSTS = (
    ('memory', 'memory of the training step, MB', 1e6),
    ('trainable_parameters', 'trained parameters, thousands', 1e3),
    ('training_seconds', 'seconds of training, without waiting for clips', 1.0),
)
NEW = {'motion': 'motion', 'looks': 'looks', 'motion_new': 'new motions', 'looks_new': 'new looks'}


def main_rows() -> list[Row]:
    """Those of the main table."""
    return [row for row in ROWS if row.group == 'main']


def trade_offs(cells: Cells, chance: Mapping[str, float]) -> Figure:
    """Accuracy over memory, trained parameters and time: motion above, looks below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.6), layout='constrained')
    axes = figure.subplots(2, len(COSTS))
    marks = {}
    for line, data in zip(axes, ('motion', 'looks')):
        for axis, (cost, title, unit) in zip(line, COSTS):
            marks |= _trade_off(axis, cells, data, cost, unit)
            axis.set_title(f'{data}: top-1 of the test list, %')
            axis.set_xlabel(title)
            for key, name, place in (
                (f'zero_shot/{data}', 'zero-shot CLIP', 'left'),
                (f'frame_mean/{data}', 'frame mean', 'center'),
            ):
                top1 = cells.values(key, 'top1')
                _line(axis, name, statistics.mean(top1) if top1 else None, place)
            _line(axis, 'chance', chance.get(data), 'right')
    if marks:
        figure.legend(
            marks.values(), marks.keys(), loc='outside lower center', ncols=min(len(marks), 5)
        )
    return figure


def _trade_off(
    axis: Axes, cells: Cells, data: str, cost: str, unit: float
) -> dict[str, ErrorbarContainer]:
    """Draws a point a row; what stands for it in a legend, by label."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    marks, seen, lowest = {}, set(), 1.0
    for row in main_rows():
        key = f'{row.name}/{data}'
        # Memory is asked for once a row: other classes change the classifier alone.
        paid = cells.values(key, cost) or cells.values(f'{row.name}/motion', cost)
        top1 = cells.values(key, 'top1')
        if not paid or not top1:
            continue
        lowest = min(lowest, statistics.mean(top1) - _deviation(top1))
        colour, mark = COLOURS[row.family]
        marks[row.label] = axis.errorbar(
            statistics.mean(paid) / unit,
            100 * statistics.mean(top1),
            100 * _deviation(top1),
            color=colour,
            marker=mark,
            markersize=8,
            fillstyle='none' if row.family in seen else 'full',
            linestyle='none',
            capsize=3,
        )
        seen.add(row.family)
    axis.set_xscale('log')
    axis.margins(x=0.15)
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.xaxis.set_minor_locator(NullLocator())
    # Where all are close together, what is below is left out.
    axis.set_ylim(10 * math.floor(10 * lowest - 1) if seen and lowest > LEFT_OUT else 0, 103)
    axis.grid(True)
    return marks


def _line(axis: Axes, name: str, value: float | None, place: str) -> None:
    """A dotted line across the picture, with its name at a place where no other stands."""
    if value is None or 100 * value < axis.get_ylim()[0]:
        return
    axis.axhline(100 * value, linestyle=':', linewidth=1, color=DIM)
    axis.annotate(
        name,
        ({'left': 0, 'center': 0.5, 'right': 1}[place], 100 * value),
        (0, 2),
        xycoords=('axes fraction', 'data'),
        textcoords='offset points',
        ha=place,
        fontsize=7,
        color=DIM,
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def bars(cells: Cells, groups: Sequence[str], chance: float | None) -> Figure:
    """Accuracy on motion of the rows of some groups, under the row of the main table they vary."""
    from matplotlib.figure import Figure

    found = []
    for base in main_rows():
        key = f'{base.name}/motion'
        rows = [
            row
            for row in ROWS
            if row.group in groups
            and row.config == base.config
            and cells.values(f'{row.name}/motion', 'top1')
        ]
        if not rows or any(family == base.family for family, *_ in found):
            continue
        for i, row in enumerate((base, *rows)):
            values = cells.values(f'{row.name}/motion' if i else key, 'top1')
            found.append((row.family, row.label if i else base.label, values, not i))
    figure = Figure(figsize=(7.6, 0.6 + 0.3 * max(len(found), 3)), layout='constrained')
    axis = figure.subplots()
    for place, (family, _, values, whole) in enumerate(found):
        if not values:
            continue
        mean = 100 * statistics.mean(values)
        axis.barh(
            place,
            mean,
            color=COLOURS[family][0],
            alpha=1 if whole else 0.55,
            xerr=100 * _deviation(values) or None,
            error_kw={'capsize': 3, 'ecolor': DIM},
        )
        axis.annotate(
            f'{mean:.1f}',
            (mean + 100 * _deviation(values), place),
            (4, 0),
            textcoords='offset points',
            va='center',
            fontsize=8,
        )
    axis.set_yticks(range(len(found)), [label for _, label, *_ in found])
    for tick, (*_, whole) in zip(axis.get_yticklabels(), found):
        tick.set_fontweight('bold' if whole else 'normal')
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_title('motion: top-1 of the test list, %')
    if chance is not None:
        axis.axvline(100 * chance, linestyle=':', linewidth=1, color=DIM)
        axis.annotate(
            'chance',
            (100 * chance, 0),
            (3, 2),
            xycoords=('data', 'axes fraction'),
            textcoords='offset points',
            fontsize=7,
            color=DIM,
        )
    axis.grid(True, axis='x')
    return figure


def shares_of(row: Row, cells: Cells) -> list[tuple[int, list[float]]]:
    """(percent of the training list, accuracies on motion) of a row of the main table."""
    cut = [
        (other.share, f'{other.name}/motion')
        for other in ROWS
        if other.group == 'data' and other.name.startswith(f'{row.name}_{other.share}_')
    ]
    cut = [(share, cells.values(key, 'top1')) for share, key in cut]
    cut = [(share, values) for share, values in cut if values]
    whole = cells.values(f'{row.name}/motion', 'top1')
    return [*cut, (100, whole)] if cut and whole else cut


def efficiency(cells: Cells, chance: float | None) -> Figure:
    """Accuracy on motion over the share of the training videos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout='constrained')
    axis = figure.subplots()
    for row in main_rows():
        points = shares_of(row, cells)
        if not points:
            continue
        colour, mark = COLOURS[row.family]
        axis.errorbar(
            [share for share, _ in points],
            [100 * statistics.mean(values) for _, values in points],
            [100 * _deviation(values) for _, values in points],
            color=colour,
            marker=mark,
            capsize=3,
            label=row.label,
        )
    if chance is not None:
        axis.axhline(100 * chance, linestyle=':', linewidth=1, color=DIM, label='chance')
    axis.set_xscale('log')
    axis.set_xticks([5, 10, 20, 50, 100], ['5', '10', '20', '50', '100'])
    axis.minorticks_off()
    axis.set_xlabel('share of the training videos, %; as many clips seen')
    axis.set_title('motion: top-1 of the test list, %')
    axis.set_ylim(0, 103)
    axis.grid(True)
    figure.legend(loc='outside right upper')
    return figure


def fusion_points(cells: Cells, data: str) -> list[tuple[float, list[float]]]:
    """(weight of the frozen CLIP, accuracies, one a seed) on one list."""
    found = ((weight, cells.values(fusion_name(data, weight), 'top1')) for weight in FUSIONS)
    return [(weight, values) for weight, values in found if values]


def fusion(cells: Cells, chance: Mapping[str, float]) -> Figure:
    """Accuracy of DiST's text head over the weight of the frozen CLIP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout='constrained')
    for axis, kind, colour in zip(figure.subplots(1, 2), ('motion', 'looks'), ('C0', 'C1')):
        for data, style in ((kind, '-'), (f'{kind}_new', '--')):
            points = fusion_points(cells, data)
            if points:
                weights, values = zip(*points)
                axis.errorbar(
                    weights,
                    [100 * statistics.mean(own) for own in values],
                    [100 * _deviation(own) for own in values],
                    linestyle=style,
                    color=colour,
                    marker='o',
                    markersize=4,
                    capsize=3,
                    label=NEW[data],
                )
            if data in chance:
                axis.axhline(100 * chance[data], linestyle=':', linewidth=1, color=DIM)
        axis.set_title(f'{kind}: top-1, %')
        axis.set_xlabel('weight of the frozen CLIP (0: DiST alone)')
        axis.set_ylim(0, 103)
        axis.grid(True)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc='best')
    return figure
