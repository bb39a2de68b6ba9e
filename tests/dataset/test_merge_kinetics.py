"""The command that merges Kinetics: its files, its words, and what it refuses."""

import json

import cv2
import pytest

from dist_jax.dataset import merge_kinetics
from dist_jax.dataset.merging import kinetics
from input_pipeline.sources import open_source

CLASSES = ('abseiling', 'hugging (not baby)', 'sipping cup')
OLD = {'hugging (not baby)': 'hugging', 'sipping cup': 'drinking'}


def table(path, source, split, reverse=False):
    """An official table: two videos a class, and one that the training of all sets shares."""
    rows = []
    for k, name in enumerate(CLASSES):
        label = OLD.get(name, name) if source == 'k400' else name
        rows += [f'{label},{source}{split:-<5}{k}{n},{n},{n + 10},{split}' for n in (0, 1)]
    if split == 'train':
        rows.append(f'abseiling,shared-----,0,10,{split}')
        rows.append(f'abseiling,k400test-10,0,10,{split}')
    head = 'label,youtube_id,time_start,time_end,split'
    path.write_text('\n'.join([head, *(reversed(rows) if reverse else rows)]) + '\n')


@pytest.fixture(scope='module')
def arguments(tmp_path_factory):
    """Makes the arguments of a merge, its tables in either order of rows."""
    folder = tmp_path_factory.mktemp('tables')

    def make(*more, reverse=False):
        words = []
        for source in kinetics.SETS:
            words.append(f'--{source}')
            for split in ('train', 'val', 'test'):
                path = folder / str(reverse) / source / f'{split}.csv'
                path.parent.mkdir(parents=True, exist_ok=True)
                table(path, source, split, reverse)
                words.append(f'{split}={path}')
        return [*words, '--k700_edition', '2020', '--any_classes', *map(str, more)]

    return make


@pytest.fixture(scope='module')
def out(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp('merged') / 'k710'
    assert merge_kinetics.main(arguments('--out', out)) == 0
    return out


def test_command_writes_lists_report_and_picture(out):
    report = json.loads((out / 'report.json').read_text())
    # Six own videos of each set, the shared one once; a test video of k400 leaves all three.
    assert report['total'] == {'train': 19, 'val': 18}
    assert [report['train'][s]['leaked'] for s in kinetics.SETS] == [1, 1, 1]
    assert [report['train'][s]['duplicate'] for s in kinetics.SETS] == [1, 1, 0]
    text = (out / 'report.txt').read_text()
    assert 'rule      drop_val_and_test (UniFormerV2' in text and '2020 edition' in text
    assert 'WARNING' not in text
    lines = [line.split() for line in text.splitlines()]
    assert ['k400', '8', '1', '0', '0', '1', '6'] in lines
    assert ['sum', '24', '3', '0', '0', '2', '19'] in lines
    assert all(decision in text for decision in kinetics.DECISIONS)
    assert 'hugging -> hugging (not baby)' in text
    source = open_source(out / 'train.csv', 'csv', '', out / 'names.txt')
    assert source.class_names == CLASSES and len(source) == 19
    assert cv2.imread(str(out / 'class_counts.png')).std() > 10
    assert not list(out.parent.glob('.*'))


def test_same_rows_in_another_order_give_the_same_bytes(out, arguments, tmp_path):
    again = tmp_path / 'again'
    assert merge_kinetics.main(arguments('--out', again, reverse=True)) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(files) == 18
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files


def test_other_rules_warn_of_what_they_leave(arguments, tmp_path):
    for rule in ('drop_val', 'clean_val'):
        assert merge_kinetics.main(arguments('--out', tmp_path / rule, '--rule', rule)) == 0
        text = (tmp_path / rule / 'report.txt').read_text()
        assert 'WARNING: this rule leaves held-out videos in training: 1 of k400 test.' in text


def test_nothing_but_a_merge_is_replaced_and_only_on_demand(out, arguments, tmp_path, capsys):
    before = (out / 'report.json').read_bytes()
    assert merge_kinetics.main(arguments('--out', out)) == 2
    assert 'pass --overwrite' in capsys.readouterr().out
    copy = tmp_path / 'k710'
    for rule in ('drop_val_and_test', 'clean_val'):
        assert merge_kinetics.main(arguments('--out', copy, '--overwrite', '--rule', rule)) == 0
    assert json.loads((copy / 'report.json').read_text())['rule'] == 'clean_val'
    assert [path.name for path in tmp_path.iterdir()] == ['k710']
    (copy / 'dropped.csv').unlink()
    assert merge_kinetics.main(arguments('--out', copy, '--overwrite')) == 2
    assert 'is no merge' in capsys.readouterr().out
    assert (out / 'report.json').read_bytes() == before


def test_a_merge_that_fails_leaves_nothing(arguments, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(merge_kinetics, 'draw_counts', fail)
    assert merge_kinetics.main(arguments('--out', tmp_path / 'k710')) == 2
    assert not list(tmp_path.iterdir())


def test_own_synonyms(arguments, tmp_path, capsys):
    file = tmp_path / 'synonyms.json'
    file.write_text(json.dumps({'hugging': 'hugging (not baby)'}))
    options = ('--out', tmp_path / 'k710', '--synonyms', file)
    assert merge_kinetics.main(arguments(*options)) == 0
    names = (tmp_path / 'k710' / 'names.txt').read_text().splitlines()
    assert names == ['abseiling', 'drinking', 'hugging (not baby)', 'sipping cup']
    file.write_text('[]')
    assert merge_kinetics.main(arguments(*options, '--overwrite')) == 2
    assert 'expected an object' in capsys.readouterr().out


def test_wrong_arguments_are_said(arguments, tmp_path, capsys):
    whole = arguments('--out', tmp_path / 'k710')
    assert merge_kinetics.main([*whole, '--k600', 'tarin=x.csv']) == 2
    assert "'tarin=x.csv' is not KEY=PATH, KEY one of train, val" in capsys.readouterr().out
    assert merge_kinetics.main([word for word in whole if word != '--any_classes']) == 2
    assert 'k400: 3 classes in the training tables, expected 400' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        merge_kinetics.main([word for word in whole if word not in ('--k700_edition', '2020')])
    assert '--k700_edition' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
