"""What an evaluation of a classifier shows: accuracies, classes, confusions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_jax.drawing import cut, png
from dist_jax.metrics import worst_confusions
from dist_jax.scalars import percent, telling
from dist_jax.tasks.api import Figures, Labels, Picture, Table
from input_pipeline import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Head = tuple[Sequence[str], Mapping[str, Any]]  # class names, `metrics.classification`

MATRIX_CLASSES = 20  # up to here a matrix; a list of the worst confusions beyond
WORST = 20  # confusions and classes that are shown at once
WEAKEST = 5  # classes on the console
HEADLINE = {'top1': 'top-1', 'top5': 'top-5', 'mean_class_accuracy': 'mean class'}


def classification_figures(
    found: Sequence[Mapping[str, Any]], joint_top1: float | None, labels: Labels
) -> Figures:
    """The figures of a classifier.

    Args:
      found: `metrics.classification` of each head.
      joint_top1: with several heads, the share of videos with all of them right; None with one.
      labels: class names of each head.
    """
    first = found[0]
    scalars = {name: first[name] for name in HEADLINE}
    if joint_top1 is not None:
        scalars['top1'] = joint_top1
        for i, head in enumerate(found):
            scalars |= {f'head_{i}_{name}': head[name] for name in ('top1', 'top5')}
    num_classes = tuple(map(len, labels))
    headline = tuple(name for name in telling(scalars, num_classes) if name in HEADLINE)
    heads = tuple(zip(labels, found, strict=True))
    named = [(head, f', head {i}' if len(heads) > 1 else '') for i, head in enumerate(heads)]
    return Figures(
        scalars=scalars,
        num_classes=num_classes,
        headline=headline,
        line='  '.join(f'{HEADLINE[name]} {percent(scalars[name])}' for name in headline),
        details={'per_class': [_per_class(head) for head in heads]},
        sections=tuple(part for head, of in named for part in _sections(head, of)),
        brief=tuple(table for head, of in named for table in _weakest(head, of)),
        files={
            'confusions.png': lambda: png(lambda: _confusions(heads)),
            'per_class.csv': lambda: _per_class_csv(heads).encode(),
        },
    )


def _per_class(head: Head) -> list[dict[str, Any]]:
    names, found = head
    return [
        {'name': name, 'videos': int(count), 'top1': None if np.isnan(top1) else float(top1)}
        for name, count, top1 in zip(names, found['per_class_count'], found['per_class_accuracy'])
    ]


def _order(head: Head) -> list[int]:
    """The weakest class first, classes without videos last."""
    return weakest_first(head[1]['per_class_accuracy'])


def weakest_first(shares: np.ndarray) -> list[int]:
    """Classes in the order of their shares (num_classes,), NaN last."""
    return sorted(range(len(shares)), key=lambda i: (math.isnan(shares[i]), shares[i], i))


def _weakest(head: Head, of: str) -> list[Table]:
    """The weakest classes, where there are others."""
    names, found = head
    accuracy, count = found['per_class_accuracy'], found['per_class_count']
    seen = [i for i in _order(head) if count[i]]
    if len(seen) < 2:
        return []
    rows = [(names[i], str(int(count[i])), percent(accuracy[i])) for i in seen[:WEAKEST]]
    return [Table(f'weakest classes{of}', ('class', 'videos', 'top-1'), rows)]


def _sections(head: Head, of: str) -> list[Table | Picture]:
    names, found = head
    sections: list[Table | Picture] = [
        Picture(
            f'Confusions{of}',
            lambda: _confusions([head]),
            text='confusions; the tables below hold the same figures',
            style='wide' if len(names) <= MATRIX_CLASSES else 'wide list',
        )
    ]
    worst = [
        (names[a], names[b], str(n), percent(n / found['per_class_count'][a]))
        for a, b, n in worst_confusions(found['confusion'], WORST)
    ]
    if worst:
        columns = ('class', 'taken for', 'videos', 'of the class')
        sections.append(Table(f'Worst confusions{of}', columns, worst, folded=True))
    columns = ('class', 'videos', 'top-1', 'most often taken for')
    return sections + class_tables(f'Classes{of}, weakest first', columns, _class_rows(head))


def class_tables(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[Table | Picture]:
    """A table with a row for each class, whose third column is a share; the most of many folded."""
    tables: list[Table | Picture] = [Table(title, columns, rows[:WORST], bars=2)]
    if len(rows) > WORST:
        others = f'the other {len(rows) - WORST} classes'
        tables.append(Table(others, columns, rows[WORST:], bars=2, folded=True))
    return tables


def _most_taken_for(found: Mapping[str, Any], label: int) -> tuple[int, int]:
    """(predicted class, videos) of the most frequent mistake of a class; 0 videos if none."""
    wrong = np.array(found['confusion'][label])
    wrong[label] = 0
    return int(wrong.argmax()), int(wrong.max())


def _class_rows(head: Head) -> list[tuple[str, ...]]:
    """Rows of a table, the weakest class first."""
    names, found = head
    rows = []
    for i in _order(head):
        other, videos = _most_taken_for(found, i)
        taken = f'{names[other]} ({videos})' if videos else ''
        count, accuracy = found['per_class_count'][i], found['per_class_accuracy'][i]
        rows.append((names[i], str(int(count)), percent(float(accuracy)), taken))
    return rows


def _per_class_csv(heads: Sequence[Head]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(('head', 'class', 'name', 'videos', 'top1', 'most_taken_for', 'videos_so'))
    for i, (names, found) in enumerate(heads):
        for k, name in enumerate(names):
            top1 = float(found['per_class_accuracy'][k])
            other, videos = _most_taken_for(found, k)
            writer.writerow(
                (
                    i,
                    k,
                    escape.csv_cell(name),
                    int(found['per_class_count'][k]),
                    '' if math.isnan(top1) else f'{top1:.6f}',
                    escape.csv_cell(names[other]) if videos else '',
                    videos,
                )
            )
    return buffer.getvalue()


def _confusions(heads: Sequence[Head]) -> Figure:
    """Confusions of each head, one below the other."""
    from matplotlib.figure import Figure

    heights = [
        1.9 + 0.42 * len(names)
        if len(names) <= MATRIX_CLASSES
        else 0.9 + 0.34 * max(len(worst_confusions(found['confusion'], WORST)), 1)
        for names, found in heads
    ]
    figure = Figure(figsize=(8.2, sum(heights)), layout='constrained')
    axes = figure.subplots(len(heads), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (names, found) in zip(axes, heads):
        if len(names) <= MATRIX_CLASSES:
            _draw_matrix(axis, names, found['confusion'])
        else:
            _draw_worst(axis, names, found)
    return figure


def _draw_matrix(axis: Axes, names: Sequence[str], confusion: np.ndarray) -> None:
    """Share of each class by prediction as shade, videos as numbers."""
    import matplotlib

    paper, accent = axis.get_facecolor(), matplotlib.rcParams['axes.prop_cycle'].by_key()['color']
    shades = matplotlib.colors.LinearSegmentedColormap.from_list('', (paper, accent[0]))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap=shades, vmin=0, vmax=1, aspect='auto')
    ink = matplotlib.rcParams['text.color']
    for (row, column), videos in np.ndenumerate(confusion):
        if videos:
            colour = paper if share[row, column] > 0.55 else ink
            axis.text(column, row, str(videos), ha='center', va='center', color=colour, fontsize=8)
    shown = [cut(name, 32) for name in names]
    axis.set_xticks(range(len(names)), shown, rotation=40, ha='right', rotation_mode='anchor')
    axis.set_yticks(range(len(names)), shown)
    axis.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.grid(True, which='minor')
    axis.tick_params(length=0, which='both')
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title('videos of a class (row) by prediction (column); shade: share of the class')


def _draw_worst(axis: Axes, names: Sequence[str], found: Mapping[str, Any]) -> None:
    """Bars of the most frequent mistakes, both names above each bar."""
    worst = worst_confusions(found['confusion'], WORST)
    axis.set_axis_off()
    if not worst:
        axis.set_title('no video was taken for another class')
        return
    axis.set_title(f'the {len(worst)} most frequent confusions of {len(names)} classes')
    videos = [n for _, _, n in worst]
    place = np.arange(len(worst))
    axis.barh(place, videos, height=0.28, color='C1')
    for at, (a, b, n) in zip(place, worst):
        axis.text(
            0,
            at - 0.22,
            f'{cut(names[a], 52)}  →  {cut(names[b], 52)}',
            va='bottom',
            fontsize=8.5,
        )
        axis.text(n, at, f'  {n} of {found["per_class_count"][a]}', va='center', fontsize=8.5)
    axis.set_xlim(0, max(videos) * 1.15)
    axis.set_ylim(len(worst) - 0.4, -0.75)
