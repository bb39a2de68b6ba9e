"""The report of a study: `study.json`, `report.html`, pictures, `results.md` for other pages."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_jax import doctor, drawing
from dist_jax.json_file import write_json
from dist_jax.progress import duration
from dist_jax.reports import page
from dist_jax.tasks.api import Picture, Table
from input_pipeline import escape, machine
from tools.studying import claims, pictures
from tools.studying.claims import Comparison, Finding, Judged
from tools.studying.results import Cells, Record
from tools.studying.rows import ROWS, TESTS

REPORT, RESULTS, STUDY, WHERE = 'report.html', 'results.md', 'study.json', 'where.json'
UNITS = {
    'memory': (1e6, 'MB'),
    'compute_seconds': (1e-3, 'ms'),
    'trainable_parameters': (1e3, 'k'),
}
LABELS = {
    'top1': '',
    't2v_r1': 'text to video R@1',
    'v2t_r1': 'video to text R@1',
    'memory': 'memory',
    'compute_seconds': 'time of a step',
    'trainable_parameters': 'trained parameters',
}
SEVERAL = '± is the standard deviation between seeds'
RULE = (
    f'Each is a difference of means; here ± is half of a {100 * claims.CONFIDENCE:.0f} % interval, '
    'from the '
    'spread between seeds of both rows or, where one has a single seed, of the main table or of '
    'the other row, whichever is larger. Costs are shares of the second row; memory and '
    'parameters are exact. It did not hold if all of the interval is below '
    f'{100 * claims.WORTH:.0f} point (where little may be lost: below that loss), and held if all '
    'of it is above 0 (above that loss); a claim of several held if all did, and did not if one '
    'did not. The intervals know of seeds only, not of other test videos or other worlds.'
)


def write(
    out: Path, name: str, records: Sequence[Record], failed: Mapping[str, Sequence[str]]
) -> None:
    """Writes all files.

    Args:
      out: folder of the study, with what `note_where` wrote.
      name: of its size.
      records: see `results.collect`.
      failed: jobs that failed, with the end of their logs.
    """
    cells, chance = Cells(records), chances(records)
    judged = claims.judge_all(cells)
    where = _read_where(out)
    seconds = sum(record['job_seconds'] for record in records)
    study = {'size': name, **where, 'seconds': round(seconds, 1), 'chance': chance}
    study |= {'runs': list(records), 'claims': _claims(judged)}
    study |= {'failed': {job: list(log) for job, log in failed.items()}}
    write_json(out / STUDY, study)
    tables = [table for table in _tables(cells, chance) if table.rows]
    drawn = _drawn(cells, chance)
    for file, picture in drawn.items():
        (out / file).write_bytes(drawing.png(picture.draw))
    trained = sum('steps' in record for record in records)
    verdicts = [one.verdict for one in judged]
    tiles = [
        ('trainings', str(trained)),
        ('evaluations beside them', str(len(records) - trained)),
        ('duration of all', duration(seconds)),
        *((verdict, str(verdicts.count(verdict))) for verdict in dict.fromkeys(verdicts)),
        *([('failed', str(len(failed)))] if failed else []),
    ]
    sections = [page.tiles(tiles), f'<p>{escape.html(_about(where))}</p>']
    # The main table, what is drawn, the others.
    sections += map(page.section, (*tables[:1], *drawn.values(), *tables[1:]))
    if judged:
        rule = f'<p>{escape.html(RULE)}</p>'
        sections += ['<h2>What the papers say</h2>', rule, *map(_paragraph, judged)]
    if failed:
        rows = [(job, '\n'.join(log)) for job, log in failed.items()]
        sections.append(page.section(Table('Failed', ('run', 'end of its log'), rows)))
    rows = [(name, str(value)) for name, value in where.items()]
    sections.append(page.section(Table('Where', ('', ''), rows, folded=True)))
    (out / REPORT).write_bytes(page.document(f'Study: {name}', sections).encode())
    (out / RESULTS).write_bytes(_markdown(tables, judged, where, seconds).encode())


def _claims(judged: Sequence[Judged]) -> dict[str, Any]:
    return {
        one.claim.name: {
            'source': one.claim.source,
            'text': one.claim.text,
            'verdict': one.verdict,
            'comparisons': [
                dataclasses.asdict(comparison) | dataclasses.asdict(finding)
                for comparison, finding in zip(one.claim.comparisons, one.findings)
            ],
        }
        for one in judged
    }


def chances(records: Sequence[Record]) -> dict[str, float]:
    """Chance by data: one of as many classes as a run on it had."""
    return {
        record['data']: 1 / record['num_classes'][0]
        for record in records
        if record.get('num_classes')
    }


def note_where(out: Path) -> None:
    """Writes what machine, versions and code the runs have, for the report.

    Where earlier runs had others, these stay, under `earlier`.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {
        'machine': _processor(),
        'cores': machine.num_cpus(),
        'versions': doctor.own_versions(),
        'commit': _commit(),
        'code_sha256': doctor.code_sha256(),
    }
    before = _read_where(out) if (out / WHERE).exists() else found
    earlier = before.pop('earlier', [])
    if any(before.get(name) != value for name, value in found.items() if name != 'commit'):
        earlier = [*earlier, before]
    write_json(out / WHERE, found | ({'earlier': earlier} if earlier else {}))


def _read_where(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / WHERE).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'{out / WHERE} cannot be read ({error}); delete it') from None


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout; '' where there is none, with a + where files were changed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ['git', '-C', str(here), *arguments], capture_output=True, text=True, check=False
        )
        return found.stdout.strip() if found.returncode == 0 else ''

    try:
        commit = git('rev-parse', 'HEAD')
        return f'{commit}+' if commit and git('status', '--porcelain', '-uno') else commit
    except OSError:
        return ''


def _about(where: Mapping[str, Any]) -> str:
    versions = where['versions']
    others = '; some runs had another machine or other code, see study.json'
    return (
        f'All figures are of the test lists, at the last step of a run; {SEVERAL}, and without ± '
        'there is one. Costs are of motion: memory is what the compiler plans for a training step, '
        'times are medians. '
        f'{where["machine"]}, {where["cores"]} cores, jax {versions.get("jax", "?")}, '
        f'commit {where["commit"] or "unknown"}{others if "earlier" in where else ""}.'
    )


def _spread(values: Sequence[float], unit: str = ' %', factor: float = 100) -> str:
    """A mean and, of several seeds, what lies between them."""
    if not values:
        return '-'
    values = [factor * value for value in values]
    mean = f'{statistics.mean(values):.1f}'
    return f'{mean} ± {statistics.stdev(values):.1f}{unit}' if len(values) > 1 else mean + unit


def _number(cells: Cells, key: str, figure: str, factor: float, digits: int = 0) -> str:
    values = cells.values(key, figure)
    return f'{statistics.mean(values) / factor:,.{digits}f}' if values else '-'


def _tables(cells: Cells, chance: Mapping[str, float]) -> list[Table]:
    return [
        _main_table(cells, chance),
        _ablations(cells),
        _sts_table(cells),
        _efficiency_table(cells),
        _fusion_table(cells, chance),
        _retrieval_table(cells),
    ]


def _main_table(cells: Cells, chance: Mapping[str, float]) -> Table:
    columns = (
        '',
        'motion top-1',
        'looks top-1',
        'trained parameters, k',
        'memory of a step, MB',
        'step, ms',
        'waiting, ms',
        'training, s',
    )
    rows = []
    for row in pictures.main_rows():
        key = f'{row.name}/motion'
        top1 = [cells.values(f'{row.name}/{data}', 'top1') for data in ('motion', 'looks')]
        if any(top1):
            rows.append(
                (
                    row.label,
                    *map(_spread, top1),
                    _number(cells, key, 'trainable_parameters', 1e3, 1),
                    _number(cells, key, 'memory', 1e6),
                    _number(cells, key, 'compute_seconds', 1e-3),
                    _number(cells, key, 'data_wait_seconds', 1e-3),
                    _number(cells, key, 'training_seconds', 1),
                )
            )
    if rows:
        shares = (_spread(_of(chance, data)) for data in ('motion', 'looks'))
        rows.append(('chance', *shares, *('-' * (len(columns) - 3))))
    return Table('Accuracy and what it costs', columns, rows)


def _ablations(cells: Cells) -> Table:
    rows = []
    bases = {row.config: row for row in reversed(pictures.main_rows())}
    for row in ROWS:
        values = cells.values(f'{row.name}/motion', 'top1')
        if row.group in ('ablation', 'frames') and values:
            base = bases[row.config]
            whole = cells.values(f'{base.name}/motion', 'top1')
            change = 100 * (statistics.mean(values) - statistics.mean(whole)) if whole else None
            rows.append(
                (
                    f'{row.family}, {row.label}',
                    _spread(values),
                    _spread(whole),
                    '-' if change is None else f'{change:+.1f}',
                )
            )
    columns = ('', 'motion top-1', 'row of the main table', 'points')
    return Table('Parts, layers and frames', columns, rows)


def _sts_table(cells: Cells) -> Table:
    labels = ('sts', 'sts_plain', 'sts_scratch', 'sts_scratch_plain')
    by_name = {row.name: row for row in ROWS}
    rows = [
        (
            by_name[name].label,
            _spread(cells.values(f'{name}/motion', 'top1')),
            _number(cells, f'{name}/motion', 'trainable_parameters', 1e3, 1),
            _number(cells, f'{name}/motion', 'compute_seconds', 1e-3),
        )
        for name in labels
        if cells.runs(f'{name}/motion')
    ]
    columns = ('', 'motion top-1', 'trained parameters, k', 'step, ms')
    return Table('STS and the plain network, from pictures and from scratch', columns, rows)


def _efficiency_table(cells: Cells) -> Table:
    found = {row.label: dict(pictures.shares_of(row, cells)) for row in pictures.main_rows()}
    found = {label: points for label, points in found.items() if points}
    shares = sorted({share for points in found.values() for share in points})
    rows = [
        (label, *(_spread(points.get(share, ())) for share in shares))
        for label, points in found.items()
    ]
    columns = ('motion top-1', *(f'{share} %' for share in shares))
    return Table('With a share of the training videos', columns, rows)


def _fusion_table(cells: Cells, chance: Mapping[str, float]) -> Table:
    found = {data: dict(pictures.fusion_points(cells, data)) for data in pictures.NEW}
    weights = sorted({weight for points in found.values() for weight in points})
    rows = [
        (
            pictures.NEW[data],
            *(_spread(points.get(weight, ())) for weight in weights),
            _spread(_of(chance, data)),
        )
        for data, points in found.items()
        if points
    ]
    columns = ('top-1', *(f'{weight:g}' for weight in weights), 'chance')
    return Table('DiST: weight of the frozen CLIP, 0 to 1', columns, rows)


def _of(values: Mapping[Any, float], key: Any) -> list[float]:
    return [values[key]] if key in values else []


def _retrieval_table(cells: Cells) -> Table:
    rows = [
        (
            row.label,
            _spread(cells.values(f'{row.name}/captions', 't2v_r1')),
            _spread(cells.values(f'{row.name}/captions', 'v2t_r1')),
            _spread(cells.values(f'{row.name}/captions', 't2v_median_rank'), '', 1),
        )
        for row in ROWS
        if cells.runs(f'{row.name}/captions')
    ]
    videos = [n for row in ROWS for n in cells.values(f'{row.name}/captions', 'num_videos')]
    if videos:  # one of all videos; of all sentences, which are as many for each
        share = _spread([1 / videos[0]])
        rows.append(('chance', share, share, _spread([(videos[0] + 1) / 2], '', 1)))
    columns = ('', 'text to video R@1', 'video to text R@1', 'median rank of the video')
    return Table('Retrieval', columns, rows)


def _drawn(cells: Cells, chance: Mapping[str, float]) -> dict[str, Picture]:
    """Pictures by file; those without a point are left out."""
    motion = chance.get('motion')
    wanted: dict[str, tuple[bool, Picture]] = {
        'trade_offs.png': (
            any(cells.runs(f'{row.name}/motion') for row in pictures.main_rows()),
            Picture(
                'Accuracy over memory, trained parameters and time',
                lambda: pictures.trade_offs(cells, chance),
                'accuracy of each row over what it costs',
            ),
        ),
        'parts.png': (
            bool(_ablations(cells).rows),
            Picture(
                'Parts, layers and frames',
                lambda: pictures.bars(cells, ('ablation', 'frames'), motion),
                'accuracy of each family without its parts, with fewer layers and other frames',
                'wide',
            ),
        ),
        'shares.png': (
            bool(_efficiency_table(cells).rows),
            Picture(
                'With fewer videos',
                lambda: pictures.efficiency(cells, motion),
                'accuracy over the share of the training videos',
                'wide',
            ),
        ),
        'fusion.png': (
            bool(_fusion_table(cells, chance).rows),
            Picture(
                'Fusion with the frozen CLIP',
                lambda: pictures.fusion(cells, chance),
                'accuracy over the weight of the frozen CLIP',
                'wide',
            ),
        ),
    }
    return {file: picture for file, (there, picture) in wanted.items() if there}


def _sentence(comparison: Comparison, finding: Finding) -> str:
    """A comparison in words: both means, the difference with its interval."""
    first, second = (_cell(key) for key in (comparison.first, comparison.second))
    figure = LABELS[comparison.figure]
    named = f'{figure}: ' if figure else ''
    if finding.verdict == claims.MISSING:
        return f'{named}{first} against {second}: {claims.MISSING}'
    means = (_figure(comparison.figure, value) for value in (finding.first, finding.second))
    costs, difference = comparison.figure in claims.COSTS, 100 * finding.difference
    interval = '' if not finding.margin else f' ± {100 * finding.margin:.1f}'
    if costs:
        change = f'{abs(difference):.1f}{interval} % {"more" if difference < 0 else "less"}'
    else:
        change = f'{difference:+.1f}{interval} points'
    if comparison.wants == claims.KEEPS:
        change += (
            f' (up to {100 * claims.COSTS_KEPT:.0f} % more is allowed)'
            if costs
            else f' (a loss of {100 * claims.KEPT:.0f} is allowed)'
        )
    if finding.margin is None:
        change += ', nothing known of the spread'
    elif finding.pooled:
        change += ', of a single seed'
    return f'{named}{first} {next(means)}, {second} {next(means)}: {change}: {finding.verdict}'


def _cell(key: str) -> str:
    """A cell in words."""
    name, _, data = key.partition('/')
    rows = {row.name: row for row in ROWS}
    tests = {test.name: test for test in TESTS}
    if name in tests:
        test = tests[name]
        return f'weight {test.fields["eval.fusion"]:g} on {pictures.NEW[test.data]}'
    row = rows[name]
    label = f'{row.family}, {row.label}' if row.group in ('ablation', 'frames') else row.label
    return f'{label} ({data})' if data == 'looks' else label


def _figure(figure: str, value: float) -> str:
    if figure in UNITS:
        factor, unit = UNITS[figure]
        return f'{value / factor:,.0f} {unit}'
    return f'{100 * value:.1f} %'


def _paragraph(one: Judged) -> str:
    return (
        f'<p><b>{escape.html(one.verdict.capitalize())}.</b> {escape.html(one.claim.text)} '
        f'<i>({escape.html(one.claim.source)})</i><br>{escape.html("; ".join(_evidence(one)))}.</p>'
    )


def _evidence(one: Judged) -> list[str]:
    return list(map(_sentence, one.claim.comparisons, one.findings))


def _markdown(
    tables: Sequence[Table], judged: Sequence[Judged], where: Mapping[str, Any], seconds: float
) -> str:
    parts = [f'{_about(where)} The runs that are shown took {duration(seconds)} together.']
    for table in tables:
        ruler = ['---'] + ['---:'] * (len(table.columns) - 1)
        lines = [f'**{table.title}**', '', *map(_line, (table.columns, ruler, *table.rows))]
        parts.append('\n'.join(lines))
    if judged:
        claimed = [
            '\n'.join(
                [
                    f'- **{one.verdict.capitalize()}.** {one.claim.text} *({one.claim.source})*',
                    *(f'  - {sentence}' for sentence in _evidence(one)),
                ]
            )
            for one in judged
        ]
        parts.append('\n'.join(['**What the papers say**', '', RULE, '', *claimed]))
    return '\n\n'.join(parts) + '\n'


def _line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'
