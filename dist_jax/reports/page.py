"""A page that holds everything it shows: pictures inside it, for light and for dark screens."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from dist_jax.configs.base import flat
from dist_jax.drawing import DARK, LIGHT, png
from dist_jax.metric_writer import METRICS_FILE, read_metrics
from dist_jax.progress import duration
from dist_jax.reports import curves
from dist_jax.scalars import BASELINE, VALIDATION, ZERO_SHOT, label, show, telling
from dist_jax.tasks.api import Figures, Picture, Table
from input_pipeline import escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger('dist_jax')


def write_report(
    workdir: str | os.PathLike[str],
    summary: Mapping[str, Any],
    figures: Figures | None,
    first: Sequence[Table | Picture] = (),
) -> None:
    """Writes `report.html` and `curves.png` of a run.

    Args:
      workdir: the run; `metrics.jsonl`, `config.json`, `parameters.txt` and `bad_videos*.jsonl` are
        used where they are there.
      summary: what `summary.json` holds.
      figures: of the last evaluation, or None.
      first: what stands above the curves.
    """
    folder = epath.Path(os.fspath(workdir))
    metrics_file = folder / METRICS_FILE
    num_classes = summary.get('num_classes', ())
    summary = telling(summary, num_classes)
    rows = read_metrics(metrics_file) if metrics_file.exists() else []
    rows = [telling(row, num_classes) for row in rows]
    panels = curves.panels(rows)
    sections = [tiles(_summary_tiles(summary, figures.headline if figures else ()))]
    sections += map(section, first)
    if panels:
        (folder / 'curves.png').write_bytes(png(lambda: curves.sheet(panels, rows)))
        pictures = ''.join(
            _picture(lambda panel=panel: curves.single(panel, rows), panel.title)
            for panel in panels
        )
        sections.append(f'<h2>Curves</h2><div class="curves">{pictures}</div>')
    else:
        sections.append('<h2>Curves</h2><p>Nothing was logged.</p>')
    if figures is None:
        sections.append('<h2>Validation</h2><p>There was none.</p>')
    else:
        sections += map(section, figures.sections)
    pairs = [(label(name), show(name, value)) for name, value in summary.items()]
    sections.append('<h2>Summary</h2>' + _table(('field', 'value'), pairs))
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
    _write(folder / 'report.html', document(f'Training: {name}', sections))


def write_evaluation(
    folder: str | os.PathLike[str], stored: Mapping[str, Any], figures: Figures
) -> None:
    """Writes `evaluation.html` and the files of an evaluation.

    Args:
      folder: where to.
      stored: what `evaluation.json` holds.
      figures: the evaluation.
    """
    folder = epath.Path(os.fspath(folder))
    for name, content in figures.files.items():
        (folder / name).write_bytes(content())
    stored = telling(stored, figures.num_classes)
    sections = [tiles(_evaluation_tiles(stored, figures.headline))]
    sections += map(section, figures.sections)
    pairs = [
        (name, show(name, value))
        for name, value in stored.items()
        if not isinstance(value, (list, dict))
    ]
    sections.append('<h2>Figures</h2>' + _table(('field', 'value'), pairs))
    _write(folder / 'evaluation.html', document('Evaluation', sections))
    beside = ', '.join([*figures.files, 'evaluation.json'])
    log.info('see %s; beside it: %s', folder / 'evaluation.html', beside)


def _summary_tiles(summary: Mapping[str, Any], headline: Sequence[str]) -> list[tuple[str, str]]:
    starts = (VALIDATION, BASELINE, ZERO_SHOT)
    names = [start + name for start in starts for name in headline]
    names += ['chance', f'{ZERO_SHOT}chance']
    found = [(label(n), show(n, summary[n])) for n in names if summary.get(n) is not None]
    if 'step' in summary:
        found.append(('steps', f'{summary["step"]:,}'))
    if 'trainable_parameters' in summary:
        found.append(('trained parameters', _short(summary['trainable_parameters'])))
    if 'seconds' in summary:
        found.append(('duration', duration(summary['seconds'])))
    return found


def _evaluation_tiles(stored: Mapping[str, Any], headline: Sequence[str]) -> list[tuple[str, str]]:
    names = [*headline, 'num_videos', 'views']
    if stored.get('num_bad_videos'):
        names.append('num_bad_videos')
    return [(label(n), show(n, stored[n])) for n in names if n in stored]


def _short(count: int) -> str:
    for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if count >= size:
            return f'{count / size:.3g} {unit}'
    return str(count)


def _read(path: epath.Path) -> str:
    return path.read_bytes().decode('utf-8', 'replace') if path.exists() else ''


def _write(path: epath.Path, text: str) -> None:
    path.write_bytes(text.encode())  # UTF-8 whatever the locale


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


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page: a heading, and sections that are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape.html(title)}</title><style>{STYLE}</style></head>\n<body>'
        f'<h1>{escape.html(title)}</h1>\n' + '\n'.join(sections) + '\n</body></html>\n'
    )


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """(name, value) of key figures, as cards side by side."""
    cells = ''.join(
        f'<div><b>{escape.html(value)}</b><span>{escape.html(name)}</span></div>'
        for name, value in figures
    )
    return f'<div class="tiles">{cells}</div>'


def _details(title: str, content: str) -> str:
    return f'<details><summary>{escape.html(title)}</summary>{content}</details>'


def section(part: Table | Picture) -> str:
    """A table or a picture under its title."""
    heading = f'<h2>{escape.html(part.title)}</h2>'
    if isinstance(part, Picture):
        return f'{heading}<div class="{part.style}">{_picture(part.draw, part.text)}</div>'
    content = _table(part.columns, part.rows, part.bars)
    return _details(part.title, content) if part.folded else heading + content


def _picture(draw: Callable[[], Figure], text: str) -> str:
    """A picture inside the page, in the colours of the reader's screen."""
    light, dark = (
        'data:image/png;base64,' + base64.b64encode(png(draw, colours)).decode()
        for colours in (LIGHT, DARK)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape.html(text)}"></picture>'
    )


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
