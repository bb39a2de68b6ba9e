"""The pages: complete in one file, and drawn whatever a run left behind; and the console."""

import json
import re

import classified
import cv2
import numpy as np
import pytest

from dist_jax import drawing, scalars
from dist_jax.reports import console, curves, page
from dist_jax.scalars import Scalar
from dist_jax.tasks.api import Figures, Picture, Table

SUMMARY = {
    'step': 40,
    'total_steps': 40,
    'interrupted': False,
    'val_top1': 0.625,
    'val_top5': 0.9,
    'val_mean_class_accuracy': 0.5,
    'num_bad_videos': 0,
    'params_sha256': 'ab' * 32,
    'trainable_parameters': 26_100_000,
    'devices': 8,
    'seconds': 3725.0,
}


def _write_metrics(folder, steps=20, validation=True):
    with (folder / 'metrics.jsonl').open('w') as file:
        for step in range(1, steps + 1):
            row = {'step': step, 'loss': 1 / step, 'grad_norm': 2.0, 'learning_rate': 1e-3}
            row |= {'clips_per_second': 9.0, 'data_wait_seconds': 0.1, 'compute_seconds': 0.5}
            file.write(json.dumps(row) + '\n')
            if validation and step % 5 == 0:
                file.write(json.dumps({'step': step, 'val_top1': 0.5, 'val_top5': 0.9}) + '\n')


def _pictures(text):
    return re.findall(r'(?:src|srcset)="(data:image/png;base64,[^"]+)"', text)


def _assert_self_contained(text):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert all(source.startswith('data:') for source in sources)
    assert '<script' not in text and '@import' not in text and 'url(' not in text


def test_report_of_a_full_run_is_one_file_with_curves_classes_and_config(tmp_path):
    _write_metrics(tmp_path)
    (tmp_path / 'config.json').write_text('{"seed": 7, "data": {"num_frames": 16}}')
    (tmp_path / 'parameters.txt').write_text('| head/kernel |')
    page.write_report(tmp_path, SUMMARY, classified.figures())
    text = (tmp_path / 'report.html').read_text()
    _assert_self_contained(text)
    assert 'name="viewport"' in text and 'prefers-color-scheme: dark' in text
    for part in ('62.50 %', '26.1 M', '1:02:05', 'data.num_frames', 'head/kernel', 'class 1 of 4'):
        assert part in text
    # Six panels and the confusions, each for light and for dark screens.
    assert len(_pictures(text)) == 14
    sheet = cv2.imread(str(tmp_path / 'curves.png'))
    assert sheet.shape[0] > 300 and sheet.std() > 5


@pytest.mark.parametrize(
    'lines',
    [
        [],
        ['{"step": 1, "loss": 2.5}'],
        ['{"step": 1, "loss": "nan"}', '{"step": 2, "loss": "inf", "grad_norm": "nan"}'],
        ['{"step": 1, "compute_seconds": 0.5, "data_wait_seconds": 0.1}', '{"step": 2, "lo'],
        ['{"step": 5, "loss": 1.0}', '{"step": 5, "loss": 2.0}', '{"step": 3, "loss": 1.5}'],
    ],
    ids=['empty', 'one row', 'no numbers', 'cut off', 'repeated and out of order'],
)
def test_report_is_written_whatever_was_logged(tmp_path, lines):
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
    page.write_report(tmp_path, {'step': 2, 'val_top1': None}, None)
    assert 'There was none' in (tmp_path / 'report.html').read_text()


def test_report_needs_no_metrics_file(tmp_path):
    page.write_report(tmp_path, SUMMARY, None)
    assert 'Nothing was logged' in (tmp_path / 'report.html').read_text()
    assert not (tmp_path / 'curves.png').exists()


def test_few_points_are_no_line(tmp_path):
    _write_metrics(tmp_path, steps=2, validation=False)
    rows = [{'step': 1, 'loss': 2.0, 'val_top1': 0.1}, {'step': 9, 'loss': 1.5, 'val_top1': 0.5}]
    panels = curves.panels(rows)
    assert [panel.title for panel in panels] == ['training loss', 'validation accuracy']
    for panel in panels:
        (axis,) = curves.single(panel, rows).axes
        assert [line.get_linestyle() for line in axis.lines] == ['None']
        assert len(axis.texts) == 2  # their values
        (axis,) = curves.single(panel, [*rows, {'step': 12, 'loss': 1.0, 'val_top1': 0.7}]).axes
        assert axis.lines[0].get_linestyle() == '-' and not axis.texts


def test_axes_have_no_offset_and_curves_end_below_their_top():
    rows = [{'step': s, 'learning_rate': 1e-5 + 1e-9 * s, 'loss': 2 + 1e-6 * s} for s in (1, 2, 3)]
    for panel in curves.panels(rows):
        with drawing.theme():
            figure = curves.single(panel, rows)
            figure.canvas.draw()
        (axis,) = figure.axes
        assert axis.yaxis.get_offset_text().get_text() == ''
        assert axis.get_ylim()[1] > max(axis.lines[0].get_ydata())


def test_classes_and_chance_are_written_as_a_person_would(tmp_path, capsys):
    console.print_summary(tmp_path, SUMMARY | {'num_classes': [97, 300], 'chance': 0.125})
    out = capsys.readouterr().out
    assert '97, 300' in out and '12.50 %' in out and '[' not in out


def test_a_sheet_with_room_left_shows_no_empty_frame():
    rows = [{'step': 1, 'loss': 1.0, 'learning_rate': 0.1, 'grad_norm': 1.0, 'clips_per_second': 9}]
    panels = curves.panels(rows)
    assert len(panels) == 4
    axes = curves.sheet(panels, rows).axes
    assert [axis.axison for axis in axes] == [True] * 4 + [False] * 2


def test_run_without_validation_has_no_validation_panel(tmp_path):
    _write_metrics(tmp_path, steps=3, validation=False)
    page.write_report(tmp_path, SUMMARY, None)
    assert len(_pictures((tmp_path / 'report.html').read_text())) == 10


def test_smoothing_keeps_length_ends_and_constants():
    values = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    smoothed = curves.smooth(values, 5)
    assert len(smoothed) == len(values)
    assert smoothed[0] == 3 and smoothed[-1] == 6
    assert smoothed[3] == pytest.approx(values[1:6].mean())
    np.testing.assert_allclose(curves.smooth(np.full(7, 2.5), 5), 2.5)


def test_console_names_key_figures_and_where_to_go_on(tmp_path, capsys):
    (tmp_path / 'report.html').touch()
    console.print_summary(tmp_path, SUMMARY)
    out = capsys.readouterr().out
    assert '62.50 %' in out and f'{tmp_path}/report.html' in out
    assert 'summary.json' not in out  # it is not there
    console.print_summary(tmp_path, {'step': 3, 'total_steps': 9, 'interrupted': True})
    assert 'step 3 of 9. The same command continues' in capsys.readouterr().out


def test_a_task_shows_what_it_measures_without_a_page_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(scalars.SCALARS, 'p2q_r1', Scalar('R@1 of videos', scalars.SHARE, 'recall'))
    drawn = []
    figures = Figures(
        scalars={'p2q_r1': 0.4321, 'p2q_mean_rank': 17.25},
        headline=('p2q_r1',),
        details={'worst': [{'text': 'a dog'}]},
        sections=(
            Table('Worst texts', ('text', 'rank'), [('<a dog>', '90')], folded=True),
            Picture('Ranks', lambda: drawn.append(1) or curves.single(panel, rows), text='a line'),
        ),
        brief=(Table('worst texts', ('text', 'rank'), [('[b]dog', '90')]),),
        files={'ranks.csv': lambda: b'rank\n90\n'},
    )
    panel = curves._validation('recall')
    rows = [{'step': step, 'val_p2q_r1': 0.1 * step} for step in (1, 2, 3)]
    (axis,) = curves.single(panel, rows).axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [10, 20, 30])
    assert axis.get_title() == 'validation recall, %'
    page.write_report(tmp_path, {'step': 3, 'val_p2q_r1': 0.4321}, figures)
    stored = {**figures.scalars, **figures.details}
    page.write_evaluation(tmp_path, stored, figures)
    assert (tmp_path / 'ranks.csv').read_bytes() == b'rank\n90\n'
    for name, told in (('report', 'validation R@1 of videos'), ('evaluation', 'R@1 of videos')):
        text = (tmp_path / f'{name}.html').read_text()
        assert f'<b>43.21 %</b><span>{told}</span>' in text
        assert '<summary>Worst texts</summary>' in text and '&lt;a dog&gt;' in text
        assert 'alt="a line"' in text and '<h2>Ranks</h2>' in text
    assert len(drawn) == 4  # both pages, for light and for dark screens
    console.print_summary(tmp_path, {'step': 3, 'val_p2q_r1': 0.4321})
    console.print_evaluation(stored, figures)
    out = capsys.readouterr().out
    assert 'validation R@1 of videos' in out and '43.21 %' in out
    assert 'p2q mean rank' in out and '17.25' in out and '[b]dog' in out


@pytest.mark.parametrize(
    ('name', 'label'),
    [
        ('step', 'step'),
        ('top1', 'top-1'),
        ('best_val_top1', 'best validation top-1'),
        ('val_mean_class_accuracy', 'validation mean class'),
        ('head_1_top5', 'head 1 top-5'),
        ('frame_only_seconds', 'frame-only baseline duration'),
        ('params_sha256', 'SHA-256 of the parameters'),
        ('nonstop1', 'nonstop1'),
    ],
)
def test_figures_are_named_by_the_end_of_their_names(name, label):
    assert scalars.label(name) == label
