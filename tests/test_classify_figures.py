"""Classes and confusions: every class is told, names break nothing, few classes have no top-5."""

import csv
import json
import re

import classified
import cv2
import numpy as np
import pytest

from dist_jax import metrics
from dist_jax.reports import console, page
from dist_jax.tasks.classify_figures import classification_figures


def test_top5_of_few_classes_is_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, 'png', lambda *_: b'')
    monkeypatch.setattr('dist_jax.tasks.classify_figures.png', lambda *_: b'')
    for size, shown in ((4, False), (6, True)):
        rows = [{'step': step, 'val_top1': 0.5, 'val_top5': 0.9} for step in (5, 10)]
        (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        summary = {'step': 10, 'val_top1': 0.625, 'val_top5': 0.9, 'num_classes': [size]}
        figures = classified.figures((size,))
        stored = classified.stored(figures)
        page.write_report(tmp_path, summary, figures)
        page.write_evaluation(tmp_path, stored, figures)
        console.print_summary(tmp_path, summary)
        console.print_evaluation(stored, figures)
        texts = [(tmp_path / name).read_text() for name in ('report.html', 'evaluation.html')]
        for text in (*texts, capsys.readouterr().out, figures.line):
            assert ('top-5' in text) == shown
        assert 'top5' in stored  # other programs may want it


def test_names_cannot_break_the_page(tmp_path):
    names = (('<script>x</script>', '$a & "b"$', 'caf\udce9\x1b[31m', '=1+1'),)
    bad = [('<i>.mp4', 'missing')]
    figures = classified.figures(bad=bad, class_names=names)
    page.write_evaluation(tmp_path, classified.stored(figures, bad), figures)
    text = (tmp_path / 'evaluation.html').read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert all(source.startswith('data:') for source in sources)
    assert '<script' not in text and '@import' not in text and 'url(' not in text
    assert '&lt;script&gt;' in text and '&lt;i&gt;.mp4' in text
    assert 'caf\\xe9\\x1b[31m' in text
    assert ",'=1+1," in (tmp_path / 'per_class.csv').read_text()


@pytest.mark.parametrize('sizes', [(4,), (60,), (30, 5)])
def test_evaluation_has_page_picture_and_a_row_for_every_class(tmp_path, sizes):
    figures = classified.figures(sizes, num_videos=60)
    page.write_evaluation(tmp_path, classified.stored(figures), figures)
    assert cv2.imread(str(tmp_path / 'confusions.png')).std() > 5
    text = (tmp_path / 'evaluation.html').read_text()
    with (tmp_path / 'per_class.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(sizes)
    found = classified.found(sizes, num_videos=60)
    for row in rows:
        head, label = int(row['head']), int(row['class'])
        assert row['name'] == classified.names(sizes)[head][label] and row['name'] in text
        expected = found[head]
        assert int(row['videos']) == expected['per_class_count'][label]
        if row['top1']:
            assert float(row['top1']) == pytest.approx(
                expected['per_class_accuracy'][label], abs=1e-6
            )
        else:
            assert row['videos'] == '0'
        detail = figures.details['per_class'][head][label]
        assert detail['name'] == row['name'] and detail['videos'] == int(row['videos'])


def test_perfect_evaluation_of_many_classes_says_that_there_are_no_confusions(tmp_path):
    found = metrics.classification(np.eye(30), np.arange(30))
    figures = classification_figures([found], None, classified.names((30,)))
    page.write_evaluation(tmp_path, classified.stored(figures), figures)
    assert 'Worst confusions' not in (tmp_path / 'evaluation.html').read_text()


def test_several_heads_are_judged_together_and_each():
    found = classified.found((30, 5), num_videos=60)
    figures = classification_figures(found, 0.125, classified.names((30, 5)))
    assert figures.scalars == {
        'top1': 0.125,
        'top5': found[0]['top5'],
        'mean_class_accuracy': found[0]['mean_class_accuracy'],
        'head_0_top1': found[0]['top1'],
        'head_0_top5': found[0]['top5'],
        'head_1_top1': found[1]['top1'],
        'head_1_top5': found[1]['top5'],
    }
    assert figures.line.startswith('top-1 12.50 %  top-5 ')
    assert [table.title for table in figures.brief] == [
        'weakest classes, head 0',
        'weakest classes, head 1',
    ]


def test_console_shows_weakest_class_and_unreadable_videos(capsys):
    names = (('a', 'weak [b]one', 'c', 'none'),)
    bad = [('a[1].mp4', 'missing')]
    found = metrics.classification(np.eye(4)[[0, 0, 2, 2, 0]], np.array([0, 0, 2, 2, 1]))
    figures = classification_figures([found], None, names)
    console.print_evaluation(classified.stored(figures, bad), figures)
    out = capsys.readouterr().out
    assert 'weak [b]one' in out and 'a[1].mp4' in out and '1 videos could not be read' in out
    rows = figures.brief[0].rows
    assert rows[0] == ('weak [b]one', '1', '0.00 %')
    assert [row[0] for row in rows] == ['weak [b]one', 'a', 'c']  # without a video: not weak
