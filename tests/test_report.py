"""The pages: complete in one file, and drawn whatever a run left behind."""

import csv
import json
import re

import cv2
import numpy as np
import pytest

from dist_jax import metrics, report
from dist_jax.evaluate import EvalResult

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


def _result(sizes=(4,), num_videos=12, bad=()):
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(num_videos) % (size - 1) for size in sizes], 1)
    scores = tuple(rng.random((num_videos, size)) for size in sizes)
    columns = tuple(metrics.classification(s, labels[:, i]) for i, s in enumerate(scores))
    return EvalResult(
        columns=columns,
        top1=columns[0]['top1'],
        top5=columns[0]['top5'],
        mean_class_accuracy=columns[0]['mean_class_accuracy'],
        num_videos=num_videos,
        bad_videos=tuple(bad),
        seconds=1.0,
        scores=scores,
        index=np.arange(num_videos),
    )


def _names(sizes=(4,)):
    return tuple(tuple(f'class {i} of {size}' for i in range(size)) for size in sizes)


def _figures(result):
    rows = [{'name': 'weak [b]one', 'videos': 2, 'top1': 0.0}]
    rows += [{'name': 'none', 'videos': 0, 'top1': None}, {'name': 'a', 'videos': 3, 'top1': 1.0}]
    return (
        result.scalars()
        | {'views': 3, 'bad_videos': list(result.bad_videos)}
        | {'per_class': [rows]}
    )


def _write_metrics(folder, steps=20, validation=True):
    with (folder / 'metrics.jsonl').open('w') as file:
        for step in range(1, steps + 1):
            row = {'step': step, 'loss': 1 / step, 'grad_norm': 2.0, 'learning_rate': 1e-3}
            row |= {'clips_per_second': 9.0, 'data_wait_seconds': 0.1, 'compute_seconds': 0.5}
            file.write(json.dumps(row) + '\n')
            if validation and step % 5 == 0:
                file.write(json.dumps({'step': step, 'val_top1': 0.5, 'val_top5': 0.9}) + '\n')


def _pictures(page):
    return re.findall(r'(?:src|srcset)="(data:image/png;base64,[^"]+)"', page)


def _assert_self_contained(page):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert all(source.startswith('data:') for source in sources)
    assert '<script' not in page and '@import' not in page and 'url(' not in page


def test_report_of_a_full_run_is_one_file_with_curves_classes_and_config(tmp_path):
    _write_metrics(tmp_path)
    (tmp_path / 'config.json').write_text('{"seed": 7, "data": {"num_frames": 16}}')
    (tmp_path / 'parameters.txt').write_text('| head/kernel |')
    report.write_report(tmp_path, SUMMARY, _result(), _names())
    page = (tmp_path / 'report.html').read_text()
    _assert_self_contained(page)
    assert 'name="viewport"' in page and 'prefers-color-scheme: dark' in page
    for text in ('62.50 %', '26.1 M', '1:02:05', 'data.num_frames', 'head/kernel', 'class 1 of 4'):
        assert text in page
    # Six panels and the confusions, each for light and for dark screens.
    assert len(_pictures(page)) == 14
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
    report.write_report(tmp_path, {'step': 2, 'val_top1': None}, None, _names())
    assert 'There was none' in (tmp_path / 'report.html').read_text()


def test_report_needs_no_metrics_file(tmp_path):
    report.write_report(tmp_path, SUMMARY, None, _names())
    assert 'Nothing was logged' in (tmp_path / 'report.html').read_text()
    assert not (tmp_path / 'curves.png').exists()


def test_few_points_are_no_line(tmp_path):
    _write_metrics(tmp_path, steps=2, validation=False)
    rows = [{'step': 1, 'loss': 2.0, 'val_top1': 0.1}, {'step': 9, 'loss': 1.5, 'val_top1': 0.5}]
    for draw in (report._draw_loss, report._draw_validation):
        (axis,) = report._panel(draw, rows).axes
        assert [line.get_linestyle() for line in axis.lines] == ['None']
        assert len(axis.texts) == 2  # their values
        (axis,) = report._panel(draw, [*rows, {'step': 12, 'loss': 1.0, 'val_top1': 0.7}]).axes
        assert axis.lines[0].get_linestyle() == '-' and not axis.texts


def test_top5_of_few_classes_is_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, '_png', lambda *_: b'')
    for size, shown in ((4, False), (6, True)):
        _write_metrics(tmp_path)
        summary = SUMMARY | {'num_classes': [size], 'chance': 1 / size}
        result = _result((size,))
        report.write_report(tmp_path, summary, result, _names((size,)))
        figures = _figures(result) | {
            'per_class': [[{'name': 'a', 'videos': 1, 'top1': 1.0}] * size]
        }
        report.write_evaluation(tmp_path, figures, result, _names((size,)))
        report.print_summary(tmp_path, summary)
        report.print_evaluation(figures)
        pages = [(tmp_path / name).read_text() for name in ('report.html', 'evaluation.html')]
        for text in (*pages, capsys.readouterr().out):
            assert ('top-5' in text) == shown


def test_classes_and_chance_are_written_as_a_person_would(tmp_path, capsys):
    report.print_summary(tmp_path, SUMMARY | {'num_classes': [97, 300], 'chance': 0.125})
    out = capsys.readouterr().out
    assert '97, 300' in out and '12.50 %' in out and '[' not in out


def test_run_without_validation_has_no_validation_panel(tmp_path):
    _write_metrics(tmp_path, steps=3, validation=False)
    report.write_report(tmp_path, SUMMARY, None, _names())
    assert len(_pictures((tmp_path / 'report.html').read_text())) == 10


def test_names_cannot_break_the_page(tmp_path):
    names = (('<script>x</script>', '$a & "b"$', 'caf\udce9\x1b[31m', '=1+1'),)
    result = _result(bad=[('<i>.mp4', 'missing')])
    report.write_evaluation(tmp_path, _figures(result), result, names)
    page = (tmp_path / 'evaluation.html').read_text()
    _assert_self_contained(page)
    assert '&lt;script&gt;' in page and '&lt;i&gt;.mp4' in page
    assert 'caf\\xe9\\x1b[31m' in page
    assert ",'=1+1," in (tmp_path / 'per_class.csv').read_text()


@pytest.mark.parametrize('sizes', [(4,), (60,), (30, 5)])
def test_evaluation_has_page_picture_and_a_row_for_every_class(tmp_path, sizes):
    result = _result(sizes, num_videos=60)
    report.write_evaluation(tmp_path, _figures(result), result, _names(sizes))
    assert cv2.imread(str(tmp_path / 'confusions.png')).std() > 5
    page = (tmp_path / 'evaluation.html').read_text()
    with (tmp_path / 'per_class.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(sizes)
    for row in rows:
        column, label = int(row['label_column']), int(row['class'])
        assert row['name'] == _names(sizes)[column][label] and row['name'] in page
        expected = result.columns[column]
        assert int(row['videos']) == expected['per_class_count'][label]
        if row['top1']:
            assert float(row['top1']) == pytest.approx(
                expected['per_class_accuracy'][label], abs=1e-6
            )
        else:
            assert row['videos'] == '0'


def test_perfect_evaluation_of_many_classes_says_that_there_are_no_confusions(tmp_path):
    scores = np.eye(30)
    column = metrics.classification(scores, np.arange(30))
    result = EvalResult((column,), 1.0, 1.0, 1.0, 30, (), 1.0, (scores,), np.arange(30))
    report.write_evaluation(tmp_path, _figures(result), result, _names((30,)))
    assert 'Worst confusions' not in (tmp_path / 'evaluation.html').read_text()


def test_smoothing_keeps_length_ends_and_constants():
    values = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    smoothed = report.smooth(values, 5)
    assert len(smoothed) == len(values)
    assert smoothed[0] == 3 and smoothed[-1] == 6
    assert smoothed[3] == pytest.approx(values[1:6].mean())
    np.testing.assert_allclose(report.smooth(np.full(7, 2.5), 5), 2.5)


def test_console_names_key_figures_and_where_to_go_on(tmp_path, capsys):
    (tmp_path / 'report.html').touch()
    report.print_summary(tmp_path, SUMMARY)
    out = capsys.readouterr().out
    assert '62.50 %' in out and f'{tmp_path}/report.html' in out
    assert 'summary.json' not in out  # it is not there
    report.print_summary(tmp_path, {'step': 3, 'total_steps': 9, 'interrupted': True})
    assert 'step 3 of 9. The same command continues' in capsys.readouterr().out


def test_console_shows_weakest_class_and_unreadable_videos(capsys):
    result = _result(bad=[('a[1].mp4', 'missing')])
    report.print_evaluation(_figures(result))
    out = capsys.readouterr().out
    assert 'weak [b]one' in out and 'a[1].mp4' in out and '1 videos could not be read' in out
