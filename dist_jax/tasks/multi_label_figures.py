"""What an evaluation of any number of classes a video shows: average precisions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_jax.drawing import cut, png
from dist_jax.scalars import percent
from dist_jax.tasks.api import Figures, Picture, Table
from dist_jax.tasks.classify_figures import WEAKEST, class_tables, weakest_first
from input_pipeline import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALARS = ('map', 'micro_map', 'chance')
MOST_BARS = 40  # classes that get a bar and their name; a dot each beyond
TOLD = 6  # dots of either end that are named


def multi_label_figures(found: Mapping[str, Any], names: Sequence[str], num_videos: int) -> Figures:
    """The figures of a model of any number of classes a video.

    Args:
      found: `metrics.multi_label`.
      names: of the classes.
      num_videos: that were judged.
    """
    precision, count = found['per_class_average_precision'], found['per_class_count']
    order = weakest_first(precision)
    shares = count / num_videos
    columns = ('class', 'videos', 'average precision', 'of constant scores')
    rows = [
        (names[i], str(int(count[i])), percent(float(precision[i])), percent(float(shares[i])))
        for i in order
    ]
    seen = [row for i, row in zip(order, rows) if count[i]]
    return Figures(
        scalars={name: found[name] for name in SCALARS},
        num_classes=(len(names),),
        headline=('map', 'micro_map'),
        line=f'mAP {percent(found["map"])}  micro mAP {percent(found["micro_map"])}',
        details={'per_class': [_per_class(names, precision, count)]},
        sections=(
            Picture(
                'Average precision',
                lambda: _picture(names, precision, shares),
                text='average precision of each class; the table below holds the same figures',
                style='wide' if len(names) <= MOST_BARS else 'wide list',
            ),
            *class_tables('Classes, weakest first', columns, rows),
        ),
        brief=(Table('weakest classes', columns, seen[:WEAKEST]),) if len(seen) > 1 else (),
        files={
            'average_precision.png': lambda: png(lambda: _picture(names, precision, shares)),
            'per_class.csv': lambda: _per_class_csv(names, precision, count).encode(),
        },
    )


def _per_class(
    names: Sequence[str], precision: np.ndarray, count: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {'name': name, 'videos': int(n), 'average_precision': None if np.isnan(p) else float(p)}
        for name, p, n in zip(names, precision, count)
    ]


def _per_class_csv(names: Sequence[str], precision: np.ndarray, count: np.ndarray) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(('class', 'name', 'videos', 'average_precision'))
    for k, (name, p, n) in enumerate(zip(names, precision.tolist(), count.tolist())):
        writer.writerow((k, escape.csv_cell(name), n, '' if math.isnan(p) else f'{p:.6f}'))
    return buffer.getvalue()


def _picture(names: Sequence[str], precision: np.ndarray, shares: np.ndarray) -> Figure:
    """Average precision of each class that a video has, beside that of constant scores."""
    from matplotlib.figure import Figure

    order = [i for i in weakest_first(precision) if not math.isnan(precision[i])]
    few = len(order) <= MOST_BARS
    height = 1.1 + 0.24 * len(order) if few else 5.0
    figure = Figure(figsize=(8.2, height), layout='constrained')
    axis = figure.subplots()
    (_draw_bars if few else _draw_dots)(axis, names, precision, shares, order)
    return figure


def _draw_bars(
    axis: Axes, names: Sequence[str], precision: np.ndarray, shares: np.ndarray, order: list[int]
) -> None:
    import matplotlib

    place = np.arange(len(order))
    axis.barh(place, 100 * precision[order], height=0.66)
    ink = matplotlib.rcParams['text.color']
    axis.vlines(100 * shares[order], place - 0.4, place + 0.4, color=ink, label='constant scores')
    axis.set_yticks(place, [cut(names[i], 40) for i in order])
    axis.tick_params(axis='y', length=0)
    axis.set_xlim(0, 100)
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.set_title('average precision, %')
    axis.grid(True, axis='x')
    axis.legend(loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_dots(
    axis: Axes, names: Sequence[str], precision: np.ndarray, shares: np.ndarray, order: list[int]
) -> None:
    axis.scatter(100 * shares[order], 100 * precision[order], s=14)
    ends = np.array([shares[order].min(), shares[order].max()])
    axis.plot(100 * ends, 100 * ends, color='C1', linewidth=1, label='constant scores')
    for i in (*order[:TOLD], *order[-TOLD:]):
        axis.annotate(
            cut(names[i], 32),
            (100 * shares[i], 100 * precision[i]),
            (4, 0),
            textcoords='offset points',
            va='center',
            fontsize=7,
        )
    axis.set_xscale('log')
    axis.set_ylim(0, 100)
    axis.set_xlabel('videos that have the class, %')
    axis.set_title('average precision, %; a dot is a class')
    axis.grid(True, axis='y')
    axis.legend(loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0)
