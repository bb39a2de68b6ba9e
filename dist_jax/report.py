"""What a person looks at: summaries on the console, curves and tables as a page.

A page is one file: pictures are inside it, once for light and once for dark screens.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from rich.table import Table

from configs.base import flat
from dist_jax.drawing import DARK, LIGHT, cut, theme
from dist_jax.evaluate import EvalResult
from dist_jax.metric_writer import METRICS_FILE, read_metrics
from dist_jax.metrics import worst_confusions
from dist_jax.progress import duration
from input_pipeline import escape
from input_pipeline.escape import Console, styled

if TYPE_CHECKING:  # matplotlib costs half a second and is needed at the end of a run only
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger('dist_jax')

Rows = Sequence[Mapping[str, Any]]
ClassNames = Sequence[Sequence[str]]
PathLike = str | os.PathLike[str]

MATRIX_CLASSES = 20  # up to here a matrix; a list of the worst confusions beyond
WORST = 20  # confusions and classes that are shown at once
SMOOTHED_FROM = 12  # points of a curve below which smoothing would hide more than it shows
LINE_FROM = 3  # below that there is no curve: points, with their values
LEGEND_ROOM = 1.35  # upper end of an axis over its highest value, where a legend stands on top


def write_report(
    workdir: PathLike,
    summary: Mapping[str, Any],
    result: EvalResult | None,
    class_names: ClassNames,
) -> None:
    """Writes `report.html` and `curves.png` of a run.

    Args:
      workdir: the run; `metrics.jsonl`, `config.json`, `parameters.txt` and `bad_videos*.jsonl` are
        used where they are there.
      summary: what `summary.json` holds.
      result: the last evaluation, or None.
      class_names: of each label column.
    """
    folder = epath.Path(os.fspath(workdir))
    metrics_file = folder / METRICS_FILE
    sizes = tuple(map(len, class_names))
    summary = _telling(summary, sizes)
    rows = read_metrics(metrics_file) if metrics_file.exists() else []
    rows = [_telling(row, sizes) for row in rows]
    panels = [(title, draw) for title, draw in PANELS if _shows(draw, rows)]
    sections = [_tiles(_summary_tiles(summary))]
    if panels:
        (folder / 'curves.png').write_bytes(_png(lambda: _curves(panels, rows)))
        pictures = ''.join(
            _picture(lambda draw=draw: _panel(draw, rows), title) for title, draw in panels
        )
        sections.append(f'<h2>Curves</h2><div class="curves">{pictures}</div>')
    else:
        sections.append('<h2>Curves</h2><p>Nothing was logged.</p>')
    if result is None:
        sections.append('<h2>Validation</h2><p>There was none.</p>')
    else:
        sections += _result_sections(result, class_names)
    sections.append('<h2>Summary</h2>' + _table(('field', 'value'), _summary_rows(summary)))
    config = _read(folder / 'config.json')
    if config:
        fields = [(name, json.dumps(value)) for name, value in flat(json.loads(config)).items()]
        sections.append(_details('Config', _table(('field', 'value'), fields)))
    overview = _read(folder / 'parameters.txt')
    if overview:
        sections.append(_details('Parameters', f'<pre>{escape.html(overview)}</pre>'))
    files = folder.iterdir() if folder.exists() else ()
    reports = sorted(p for p in files if p.match('bad_videos*.jsonl'))
    bad = ''.join(map(_read, reports))
    if bad:
        sections.append(_details('Unreadable videos', f'<pre>{escape.html(bad)}</pre>'))
    name = folder.name or 'run'
    _write(folder / 'report.html', _page(f'Training: {name}', sections))


def write_evaluation(
    folder: PathLike, figures: Mapping[str, Any], result: EvalResult, class_names: ClassNames
) -> None:
    """Writes `evaluation.html`, `confusions.png` and `per_class.csv`.

    Args:
      folder: where to.
      figures: what `evaluation.json` holds.
      result: the evaluation.
      class_names: of each label column.
    """
    folder = epath.Path(os.fspath(folder))
    columns = list(zip(class_names, result.columns))
    figures = _telling(figures, tuple(map(len, class_names)))
    (folder / 'confusions.png').write_bytes(_png(lambda: _confusions(columns)))
    _write(folder / 'per_class.csv', _per_class_csv(columns))
    sections = [_tiles(_evaluation_tiles(figures))]
    sections += _result_sections(result, class_names)
    rows = [
        (name, _show(name, value)) for name, value in figures.items() if not isinstance(value, list)
    ]
    sections.append('<h2>Figures</h2>' + _table(('field', 'value'), rows))
    _write(folder / 'evaluation.html', _page('Evaluation', sections))
    log.info('see %s, per_class.csv and evaluation.json beside it', folder / 'evaluation.html')


def print_summary(workdir: PathLike, summary: Mapping[str, Any]) -> None:
    """Prints the key figures of a run, what to look at, and how to go on."""
    if jax.process_index() != 0:
        return
    console = Console()
    workdir = os.fspath(workdir)
    if summary.get('interrupted'):
        console.print(
            f'Stopped and saved at step {summary["step"]} of {summary.get("total_steps", "?")}. '
            'The same command continues.',
            soft_wrap=True,
        )
        return
    summary = _telling(summary, summary.get('num_classes', ()))
    console.print(_rich_table(_summary_rows(summary)))
    found = [
        (name, text)
        for name, text in (
            ('report.html', 'curves, classes, confusions, config'),
            ('summary.json', 'these figures'),
            (METRICS_FILE, 'what was logged'),
            ('tensorboard', f'tensorboard --logdir={os.path.join(workdir, "tensorboard")}'),
        )
        if (epath.Path(workdir) / name).exists()
    ]
    steps = [(os.path.join(workdir, name), text) for name, text in found]
    steps.append((f'dist_jax evaluate --workdir={workdir}', 'test accuracy, other lists'))
    steps.append((f'dist_jax predict --workdir={workdir} VIDEO', 'single videos'))
    _print_steps(console, steps)


def print_evaluation(figures: Mapping[str, Any]) -> None:
    """Prints the key figures of an evaluation, its weakest classes and what was unreadable."""
    if jax.process_index() != 0:
        return
    console = Console()
    figures = _telling(figures, tuple(map(len, figures.get('per_class', ()))))
    skipped = ('seconds', 'num_bad_videos')
    console.print(
        _rich_table(
            [
                (_label(name), _show(name, value))
                for name, value in figures.items()
                if not isinstance(value, list) and name not in skipped
            ]
        )
    )
    for i, column in enumerate(figures.get('per_class', ())):
        seen = [row for row in column if row['top1'] is not None]
        weakest = sorted(seen, key=lambda row: row['top1'])[:5]
        if weakest and len(seen) > 1:
            title = 'weakest classes' + (f', label column {i}' if i else '')
            table = Table(title=title, title_justify='left', title_style='')
            table.add_column('class')
            table.add_column('videos', justify='right')
            table.add_column('top-1', justify='right')
            for row in weakest:
                table.add_row(row['name'], str(row['videos']), _percent(row['top1']))
            console.print(table)
    bad = figures.get('bad_videos', ())
    if bad:
        said = f'{len(bad)} videos could not be read and are in no figure'
        console.print(
            styled((said, 'bold red'), f', for example {bad[0][0]}: {bad[0][1]}'), soft_wrap=True
        )


def _rich_table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False)
    table.add_column(style='bold')
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def _print_steps(console: Console, steps: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in steps)
    for name, text in steps:
        console.print(styled(f'  {name:{width}}  ', (text, 'dim')), soft_wrap=True)


LABELS = {
    'step': 'step',
    'val_top1': 'validation top-1',
    'val_top5': 'validation top-5',
    'val_mean_class_accuracy': 'validation mean class',
    'best_step': 'best step',
    'best_val_top1': 'best validation top-1',
    'frame_only_top1': 'frame-only baseline top-1',
    'frame_only_seconds': 'frame-only baseline duration',
    'top1': 'top-1',
    'top5': 'top-5',
    'mean_class_accuracy': 'mean class accuracy',
    'num_videos': 'videos',
    'num_classes': 'classes',
    'num_bad_videos': 'unreadable videos',
    'trainable_parameters': 'trained parameters',
    'params_sha256': 'SHA-256 of the parameters',
    'total_steps': 'steps planned',
    'seconds': 'duration',
}


def _telling(figures: Mapping[str, Any], num_classes: Sequence[int]) -> dict[str, Any]:
    """Figures without the top-5 of label columns with at most 5 classes, where all are right."""

    def tells(name: str) -> bool:
        column = re.match(r'column_(\d+)_', name)
        i = int(column[1]) if column else 0
        return not name.endswith('top5') or i >= len(num_classes) or num_classes[i] > 5

    return {name: value for name, value in figures.items() if tells(name)}


def _label(name: str) -> str:
    return LABELS.get(name, name.replace('_', ' '))


def _percent(share: float | None) -> str:
    return '-' if share is None or math.isnan(share) else f'{100 * share:.2f} %'


def _show(name: str, value: Any) -> str:
    """A figure as a person writes it."""
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if name.endswith(('top1', 'top5', 'accuracy', 'chance')) and isinstance(value, (int, float)):
        return _percent(value)
    if name.endswith('seconds') and isinstance(value, (int, float)):
        return f'{duration(value)} ({value:.1f} s)'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, (list, tuple)):  # a figure of each label column
        return ', '.join(_show(name, each) for each in value)
    if isinstance(value, float):
        return f'{value:.4g}'
    return str(value)


def _summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_label(name), _show(name, value)) for name, value in summary.items()]


def _summary_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ('val_top1', 'val_top5', 'val_mean_class_accuracy', 'frame_only_top1', 'chance')
    tiles = [(_label(n), _percent(summary[n])) for n in names if summary.get(n) is not None]
    if 'step' in summary:
        tiles.append(('steps', f'{summary["step"]:,}'))
    if 'trainable_parameters' in summary:
        tiles.append(('trained parameters', _short(summary['trainable_parameters'])))
    if 'seconds' in summary:
        tiles.append(('duration', duration(summary['seconds'])))
    return tiles


def _evaluation_tiles(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ('top1', 'top5', 'mean_class_accuracy')
    tiles = [(_label(n), _percent(figures[n])) for n in names if n in figures]
    tiles += [(_label(n), f'{figures[n]:,}') for n in ('num_videos', 'views') if n in figures]
    if figures.get('num_bad_videos'):
        tiles.append((_label('num_bad_videos'), f'{figures["num_bad_videos"]:,}'))
    return tiles


def _short(count: int) -> str:
    for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if count >= size:
            return f'{count / size:.3g} {unit}'
    return str(count)


def _read(path: epath.Path) -> str:
    return path.read_bytes().decode('utf-8', 'replace') if path.exists() else ''


def _write(path: epath.Path, text: str) -> None:
    path.write_bytes(text.encode())  # UTF-8 whatever the locale


# Curves.


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


def _draw_loss(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'loss')
    axis.set_title('training loss')


def _draw_validation(axis: Axes, rows: Rows) -> None:
    _plot(axis, rows, 'val_top1', 'top-1', 100)
    _plot(axis, rows, 'val_top5', 'top-5', 100)
    axis.set_title('validation accuracy, %')
    axis.set_ylim(-3, 103)
    if len(axis.lines) > 1:
        few = any(line.get_linestyle() == 'None' for line in axis.lines)
        axis.legend(loc='upper left' if few else 'best')  # values stand on the left of points


def _draw_learning_rate(axis: Axes, rows: Rows) -> None:
    _plot(axis, rows, 'learning_rate')
    axis.set_title('learning rate')
    axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    axis.set_ylim(bottom=0)


def _draw_grad_norm(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'grad_norm')
    axis.set_title('gradient norm')
    axis.set_ylim(bottom=0)


def _draw_speed(axis: Axes, rows: Rows) -> None:
    _plot_smoothed(axis, rows, 'clips_per_second')
    axis.set_title('clips per second')
    axis.set_ylim(bottom=0)


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


Draw = Callable[['Axes', Rows], None]
PANELS: tuple[tuple[str, Draw], ...] = (
    ('training loss', _draw_loss),
    ('validation accuracy', _draw_validation),
    ('learning rate', _draw_learning_rate),
    ('gradient norm', _draw_grad_norm),
    ('clips per second', _draw_speed),
    ('seconds per step', _draw_step_time),
)
_NEEDS = {
    _draw_loss: 'loss',
    _draw_validation: 'val_top1',
    _draw_learning_rate: 'learning_rate',
    _draw_grad_norm: 'grad_norm',
    _draw_speed: 'clips_per_second',
    _draw_step_time: 'compute_seconds',
}


def _shows(draw: Draw, rows: Rows) -> bool:
    return len(_series(rows, _NEEDS[draw])[0]) > 0


def _panel(draw: Draw, rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.9), layout='constrained')
    _draw_panel(figure.subplots(), draw, rows)
    return figure


def _curves(panels: Sequence[tuple[str, Draw]], rows: Rows) -> Figure:
    """All panels on one sheet."""
    from matplotlib.figure import Figure

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across, 2.9 * down), layout='constrained')
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, (_, draw) in zip(axes, panels):
        _draw_panel(axis, draw, rows)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    return figure


def _draw_panel(axis: Axes, draw: Draw, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    draw(axis, rows)
    last = max(int(row['step']) for row in rows if 'step' in row)
    axis.set_xlim(0, 1.02 * last + 0.5)
    axis.set_xlabel('step')
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(True)


def _png(draw: Callable[[], Figure], colours: Mapping[str, Any] = LIGHT) -> bytes:
    buffer = io.BytesIO()
    with theme(colours):
        draw().savefig(buffer, format='png', dpi=140)
    return buffer.getvalue()


def _picture(draw: Callable[[], Figure], text: str) -> str:
    """A picture inside the page, in the colours of the reader's screen."""
    light, dark = (
        'data:image/png;base64,' + base64.b64encode(_png(draw, colours)).decode()
        for colours in (LIGHT, DARK)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape.html(text)}"></picture>'
    )


# Classes and confusions.


def _result_sections(result: EvalResult, class_names: ClassNames) -> list[str]:
    sections = []
    for i, (names, column) in enumerate(zip(class_names, result.columns)):
        of = f', label column {i}' if len(class_names) > 1 else ''
        picture = _picture(
            lambda names=names, column=column: _confusions([(names, column)]),
            'confusions; the tables below hold the same figures',
        )
        wide = 'wide' if len(names) <= MATRIX_CLASSES else 'wide list'
        sections.append(f'<h2>Confusions{of}</h2><div class="{wide}">{picture}</div>')
        worst = [
            (names[a], names[b], str(n), _percent(n / column['per_class_count'][a]))
            for a, b, n in worst_confusions(column['confusion'], WORST)
        ]
        if worst:
            table = _table(('class', 'taken for', 'videos', 'of the class'), worst)
            sections.append(_details(f'Worst confusions{of}', table))
        rows = _class_rows(names, column)
        head = ('class', 'videos', 'top-1', 'most often taken for')
        sections.append(f'<h2>Classes{of}, weakest first</h2>' + _table(head, rows[:WORST], bars=2))
        if len(rows) > WORST:
            rest = _table(head, rows[WORST:], bars=2)
            sections.append(_details(f'the other {len(rows) - WORST} classes', rest))
    if result.bad_videos:
        sections.append(
            f'<h2>Unreadable videos: {len(result.bad_videos)}, in no figure</h2>'
            + _table(('path', 'reason'), result.bad_videos)
        )
    return sections


def _most_taken_for(column: Mapping[str, Any], label: int) -> tuple[int, int]:
    """(predicted class, videos) of the most frequent mistake of a class; 0 videos if none."""
    wrong = np.array(column['confusion'][label])
    wrong[label] = 0
    return int(wrong.argmax()), int(wrong.max())


def _class_rows(names: Sequence[str], column: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows, weakest class first, classes without videos last."""
    accuracy, count = column['per_class_accuracy'], column['per_class_count']
    order = sorted(range(len(names)), key=lambda i: (math.isnan(accuracy[i]), accuracy[i], i))
    rows = []
    for i in order:
        other, videos = _most_taken_for(column, i)
        taken = f'{names[other]} ({videos})' if videos else ''
        rows.append((names[i], str(int(count[i])), _percent(float(accuracy[i])), taken))
    return rows


def _per_class_csv(columns: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(
        ('label_column', 'class', 'name', 'videos', 'top1', 'most_taken_for', 'videos_so')
    )
    for i, (names, column) in enumerate(columns):
        for k, name in enumerate(names):
            top1 = float(column['per_class_accuracy'][k])
            other, videos = _most_taken_for(column, k)
            writer.writerow(
                (
                    i,
                    k,
                    escape.csv_cell(name),
                    int(column['per_class_count'][k]),
                    '' if math.isnan(top1) else f'{top1:.6f}',
                    escape.csv_cell(names[other]) if videos else '',
                    videos,
                )
            )
    return buffer.getvalue()


def _confusions(columns: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> Figure:
    """Confusions of each label column, one below the other."""
    from matplotlib.figure import Figure

    heights = [
        1.9 + 0.42 * len(names)
        if len(names) <= MATRIX_CLASSES
        else 0.9 + 0.34 * max(len(worst_confusions(column['confusion'], WORST)), 1)
        for names, column in columns
    ]
    figure = Figure(figsize=(8.2, sum(heights)), layout='constrained')
    axes = figure.subplots(len(columns), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (names, column) in zip(axes, columns):
        if len(names) <= MATRIX_CLASSES:
            _draw_matrix(axis, names, column['confusion'])
        else:
            _draw_worst(axis, names, column)
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


def _draw_worst(axis: Axes, names: Sequence[str], column: Mapping[str, Any]) -> None:
    """Bars of the most frequent mistakes, both names above each bar."""
    worst = worst_confusions(column['confusion'], WORST)
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
        axis.text(n, at, f'  {n} of {column["per_class_count"][a]}', va='center', fontsize=8.5)
    axis.set_xlim(0, max(videos) * 1.15)
    axis.set_ylim(len(worst) - 0.4, -0.75)


# The page.

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #57606a; --paper: #fff; --card: #f6f8fa;
  --lines: #d8dee4; --bar: #cfe3f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dce2; --dim: #9aa4af; --paper: #161b22;
  --card: #1f262e; --lines: #343b44; --bar: #234467; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .3rem 0 1rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--lines); border-radius: .5rem;
  padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.3rem; } .tiles span { color: var(--dim); font-size: .85rem; }
.curves { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; max-width: 54rem; } .wide img { min-width: 40rem; }
.list img { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem .4rem; border-bottom: 1px solid var(--lines);
  overflow-wrap: break-word; vertical-align: top; }
td:last-child { overflow-wrap: anywhere; min-width: 9rem; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td.bar { white-space: nowrap; min-width: 6.5rem;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left / var(--share) 100%; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); padding: .6rem; font-size: .8rem; }
"""  # noqa: E501


def _page(title: str, sections: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape.html(title)}</title><style>{STYLE}</style></head>\n<body>'
        f'<h1>{escape.html(title)}</h1>\n' + '\n'.join(sections) + '\n</body></html>\n'
    )


def _tiles(figures: Sequence[tuple[str, str]]) -> str:
    cells = ''.join(
        f'<div><b>{escape.html(value)}</b><span>{escape.html(name)}</span></div>'
        for name, value in figures
    )
    return f'<div class="tiles">{cells}</div>'


def _details(title: str, content: str) -> str:
    return f'<details><summary>{escape.html(title)}</summary>{content}</details>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], bars: int | None = None) -> str:
    """A table; the percentages of column `bars` are drawn behind their text."""
    lines = []
    for row in rows:
        cells = []
        for i, text in enumerate(row):
            share = text.removesuffix(' %').strip() if i == bars and text.endswith('%') else ''
            extra = f' class="bar" style="--share: {share}%"' if share else ''
            cells.append(f'<td{extra}>{escape.html(text)}</td>')
        lines.append(f'<tr>{"".join(cells)}</tr>')
    titles = ''.join(f'<th>{escape.html(name)}</th>' for name in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'
