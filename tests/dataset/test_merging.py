"""Kinetics-710 from planted tables: every count of the report, every rule, every decision."""

import csv
import json
import random
from pathlib import Path

import pytest
from kinetics_tables import whole_sets, whole_tables, write_table, write_tables, youtube_id
from video_files import write_video

from dist_jax.dataset.merging import kinetics
from dist_jax.dataset.merging.kinetics import RULES, SETS, Inputs, merge, write_lists
from input_pipeline import check
from input_pipeline.datasets import DATASETS
from input_pipeline.kinetics import SYNONYMS, merged_key
from input_pipeline.sources import open_source

HUG, WINE, NOT_WINE = 'hugging (not baby)', 'opening wine bottle', 'opening bottle (not wine)'

# (label, id, start, end); letters name the case, `youtube_id` makes 11 characters of them.
TABLES = {
    'k400 train': [
        ('hugging', 'A', 0, 10),  # in k700 under its new name, with another window
        ('opening bottle', 'B', 0, 10),  # in k700 as another class
        ('abseiling', 'C', 1, 11),  # the same in k600
        ('abseiling', 'D', 0, 10),  # validation of k600
        ('abseiling', 'E', 0, 10),  # test of k700
        ('abseiling', 'F', 20, 30),  # two windows
        ('abseiling', 'F', 3, 13),
        ('drinking', 'G', 0, 10),  # two labels of one window
        ('abseiling', 'G', 0, 10),
        ('abseiling', 'H', 0, 10),  # no file
        ('abseiling', 'I', 0, 10),  # unreadable
        ('abseiling', 'J', 0, 10),  # missing in k700, unreadable in k600
        ('abseiling', 'K', 0, 10),  # twice the same row
        ('abseiling', 'K', 0, 10),
        ('abseiling', 'L', 0, 10),  # validation of this very set, and no file
        ('hugging', 'Q', 7, 17),
        ('drinking', 'R', 0, 10),
    ],
    'k600 train': [
        ('abseiling', 'C', 1, 11),
        ('abseiling', 'J', 0, 10),
        ('sipping cup', 'S', 0, 10),
        ('hugging (not baby)', 'E', 4, 14),  # test of k700 here too
    ],
    'k700 train': [
        (HUG, 'A', 5, 15),
        (WINE, 'B', 0, 10),
        ('abseiling', 'J', 0, 10),
        (NOT_WINE, 'T', 0, 10),
        ('abseiling', 'V', 0, 10),  # test of k400
    ],
    'k400 val': [
        ('abseiling', 'L', 0, 10),
        ('hugging', 'M', 0, 10),  # no file
        ('hugging', 'N', 0, 10),  # unreadable
        ('drinking', 'O', 0, 10),  # twice the same row
        ('drinking', 'O', 0, 10),
        ('opening bottle', 'P', 0, 10),  # another class in the validation of k700
        ('abseiling', 'X', 0, 10),
    ],
    'k600 val': [
        ('abseiling', 'D', 0, 10),
        ('sipping cup', 'O', 2, 12),
        ('hugging (not baby)', 'W', 0, 10),
    ],
    'k700 val': [(WINE, 'P', 0, 10), (HUG, 'Y', 0, 10), ('abseiling', 'Z', 0, 10)],
    'k400 test': [('abseiling', 'V', 0, 10)],
    'k600 test': [('abseiling', 'U', 0, 10)],
    'k700 test': [(None, 'E', 0, 10)],
}
MISSING = {('k400', 'H'), ('k400', 'L'), ('k400', 'M'), ('k700', 'J')}
BROKEN = {('k400', 'I'), ('k400', 'N'), ('k600', 'J')}
# Folder and name of the files of each set, as copies of the sets have them.
LAYOUTS = {
    'k400': '{label}/{id}.mp4',
    'k600': 'vol_00/{id}_{start:06d}_{end:06d}.mp4',
    'k700': '{label_}/{id}_{start:06d}_{end:06d}.mp4',
}


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    """Tables, real videos and the reports of `dist_jax check` of every set."""
    folder = tmp_path_factory.mktemp('planted')
    video = write_video(folder / 'video.mp4').read_bytes()
    inputs = write_tables(folder / 'tables', TABLES)
    for source, layout in LAYOUTS.items():
        root = folder / source
        for name, rows in TABLES.items():
            for label, letter, start, end in rows if name.startswith(source) else ():
                if (source, letter) in MISSING or label is None:
                    continue
                fields = {
                    'label': label,
                    'label_': label.replace(' ', '_'),
                    'id': youtube_id(letter),
                }
                path = root / layout.format(**fields, start=start, end=end)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b'no video' if (source, letter) in BROKEN else video)
        report = folder / f'bad_{source}.jsonl'
        check.main(['--list', str(root), '--format', 'folder', '--report', str(report)])
        tables = inputs[source]
        inputs[source] = Inputs(tables.train, tables.val, tables.test, (str(root),), (str(report),))
    return inputs


def run(inputs, rule=kinetics.DEFAULT_RULE, **options):
    options.setdefault('synonyms', {old: SYNONYMS[old] for old in ('hugging', 'drinking')})
    options['synonyms'] |= {'opening bottle': NOT_WINE}
    return merge(inputs, 2020, rule, complete=False, **options)


def row(leaked=0, missing=0, broken=0, duplicate=0, kept=0):
    total = leaked + missing + broken + duplicate + kept
    return {
        'input': total,
        'leaked': leaked,
        'missing': missing,
        'broken': broken,
        'duplicate': duplicate,
        'kept': kept,
    }


def kept(clips):
    return {(c.source, c.youtube_id.rstrip('-'), c.start, c.label) for c in clips}


def test_every_count_of_the_default_rule(planted):
    merged = run(planted)
    report = merged.report
    assert kept(merged.train) == {
        ('k700', 'A', 5, HUG),
        ('k700', 'B', 0, WINE),
        ('k600', 'C', 1, 'abseiling'),
        ('k400', 'F', 3, 'abseiling'),
        ('k400', 'G', 0, 'abseiling'),
        ('k400', 'J', 0, 'abseiling'),
        ('k400', 'K', 0, 'abseiling'),
        ('k400', 'Q', 7, 'hugging'),
        ('k400', 'R', 0, 'drinking'),
        ('k600', 'S', 0, 'sipping cup'),
        ('k700', 'T', 0, NOT_WINE),
    }
    assert report['train'] == {
        'k400': row(leaked=3, missing=1, broken=1, duplicate=6, kept=6),
        'k600': row(leaked=1, broken=1, kept=2),
        'k700': row(leaked=1, missing=1, kept=3),
    }
    assert report['duplicates'] == {
        'train across_sets other_label': 1,  # B
        'train across_sets other_window': 1,  # A
        'train across_sets same_clip': 1,  # C
        'train within_a_set other_label': 1,  # G
        'train within_a_set other_window': 1,  # F
        'train within_a_set same_clip': 1,  # K
        'val across_sets other_label': 1,  # P
        'val across_sets other_window': 1,  # O
    }
    # Alone, a set holds out its own tables only, and keeps all windows.
    assert report['train_of_sets'] == {
        'k400': row(leaked=1, missing=1, broken=1, duplicate=1, kept=13),
        'k600': row(broken=1, kept=3),
        'k700': row(missing=1, kept=4),
    }
    assert ('k400', 'F', 20, 'abseiling') in kept(merged.train_of['k400'])
    assert report['val_of_sets'] == {
        'k400': row(missing=2, broken=1, duplicate=1, kept=3),
        'k600': row(kept=3),
        'k700': row(kept=3),
    }
    assert report['val'] == {
        'k400': row(duplicate=2, kept=1),
        'k600': row(kept=3),
        'k700': row(kept=3),
    }
    assert report['total'] == {'train': 11, 'val': 7}
    assert report['ids_shared_before'] == {
        'k400 train': shared(k400_val=1, k600_val=1, k400_test=0, k700_test=1),
        'k600 train': shared(k700_test=1),
        'k700 train': shared(k400_test=1),
    }
    assert report['ids_shared_after'] == shared()
    assert (report['rule'], report['k700_edition']) == ('drop_val_and_test', 2020)
    assert report['tables']['k400 train']['rows'] == 17
    assert report['tables']['k400 train']['ids'] == 14
    assert report['classes']['without_training_videos'] == []
    assert report['train_of_sets']['k400']['kept'] == len(merged.train_of['k400'])
    dropped = {(d.list_name, d.clip.source, d.clip.youtube_id[0], d.reason) for d in merged.dropped}
    assert ('train', 'k400', 'L', 'leaked') in dropped  # and not missing: the first reason counts
    assert ('train', 'k700', 'J', 'missing') in dropped
    assert ('train', 'k600', 'J', 'broken') in dropped
    assert ('val_k400', 'k400', 'M', 'missing') in dropped
    (because,) = (d.because for d in merged.dropped if d.clip.youtube_id[0] == 'B')
    assert because == f'other_label: k700 {youtube_id("B")}_000000_000010 {WINE}'
    (because,) = (d.because for d in merged.dropped if d.clip.youtube_id[0] == 'D')
    assert because == 'k600 val'


def shared(**counts):
    names = [f'{s} {split}' for split in ('val', 'test') for s in SETS]
    return {name: counts.get(name.replace(' ', '_'), 0) for name in names}


def test_drop_val_leaves_test_videos_in_training_and_says_so(planted):
    merged = run(planted, 'drop_val')
    report = merged.report
    assert report['train'] == {
        'k400': row(leaked=2, missing=1, broken=1, duplicate=7, kept=6),
        'k600': row(broken=1, kept=3),
        'k700': row(missing=1, kept=4),
    }
    assert ('k600', 'E', 4, HUG) in kept(merged.train)
    assert ('k700', 'V', 0, 'abseiling') in kept(merged.train)
    assert report['ids_shared_after'] == shared(k400_test=1, k700_test=1)
    assert report['val_of_sets'] == run(planted).report['val_of_sets']


def test_clean_val_takes_the_ids_of_training_out_of_validation(planted):
    merged = run(planted, 'clean_val')
    report = merged.report
    assert report['train'] == {
        'k400': row(missing=2, broken=1, duplicate=7, kept=7),  # L has no file
        'k600': row(broken=1, kept=3),
        'k700': row(missing=1, kept=4),
    }
    assert ('k400', 'D', 0, 'abseiling') in kept(merged.train)
    assert report['val_of_sets'] == {
        'k400': row(missing=2, broken=1, duplicate=1, kept=3),
        'k600': row(leaked=1, kept=2),
        'k700': row(kept=3),
    }
    assert report['total'] == {'train': 14, 'val': 6}
    assert report['ids_shared_after'] == shared(k400_test=1, k700_test=1)


def test_another_set_may_be_preferred(planted):
    merged = run(planted, prefer=('k400', 'k600', 'k700'))
    assert {('k400', 'A', 0, 'hugging'), ('k400', 'B', 0, 'opening bottle')} <= kept(merged.train)
    assert merged.report['train']['k700'] == row(leaked=1, missing=1, duplicate=2, kept=1)


def test_tables_alone_drop_nothing_as_missing(tmp_path):
    inputs = write_tables(tmp_path / 'tables', TABLES)
    report = run(inputs).report
    assert report['train']['k400'] == row(leaked=3, duplicate=7, kept=7)
    bad = tmp_path / 'bad.txt'
    # An id, the name of a clip, a file name, a window that no row has.
    bad.write_text(
        f'{youtube_id("H")}\n{youtube_id("I")}_000000_000010\n{youtube_id("Q")}.mp4\n{youtube_id("R")}_000001_000011\n'
    )
    inputs['k400'] = Inputs(**{**vars(inputs['k400']), 'broken': (str(bad),)})
    assert run(inputs).report['train']['k400'] == row(leaked=3, broken=3, duplicate=7, kept=4)


def test_lists_are_read_by_open_source(planted, tmp_path):
    merged = run(planted)
    write_lists(merged, tmp_path)
    names = (tmp_path / 'names.txt').read_text().splitlines()
    assert names == ['abseiling', HUG, NOT_WINE, WINE, 'sipping cup'] == sorted(names)
    wanted = {c.youtube_id: kinetics.merged_label(merged.classes, c) for c in merged.train}
    for name, kind in (('train.txt', 'kinetics'), ('train.csv', 'csv'), ('train.csv', 'auto')):
        for label_map in ('names.txt', 'classes.csv'):
            source = open_source(tmp_path / name, kind, '', tmp_path / label_map, 5)
            assert source.class_names == tuple(names)
            records = [source[i] for i in range(len(source))]
            assert {r.video_id[:11]: names[r.label] for r in records} == wanted
            assert all(Path(r.path).stat().st_size for r in records)
    source = open_source(tmp_path / 'train.csv', 'csv', '', tmp_path / 'names.txt', subset='train')
    assert len(source) == 11
    for own, expected in (('', 'hugging'), ('_as_k710', HUG)):
        labels = tmp_path / ('names.txt' if own else 'names_k400.txt')
        source = open_source(tmp_path / f'val_k400{own}.txt', 'kinetics', '', labels)
        assert sorted(source.class_names[source[i].label] for i in range(3)) == sorted(
            [NOT_WINE, 'abseiling', 'sipping cup'] if own else merged_val_names(merged)
        )
        assert expected in source.class_names
    table = list(csv.DictReader((tmp_path / 'val_k400.csv').open()))
    assert {(r['label'], r['native_label'], r['merged_label']) for r in table} >= {
        ('opening bottle', 'opening bottle', NOT_WINE)
    }
    assert {(r['split'], r['source']) for r in table} == {('val', 'k400')}
    counts = {r['name']: r for r in csv.DictReader((tmp_path / 'classes.csv').open())}
    hugs = counts[HUG]
    assert (hugs['id'], hugs['k400'], hugs['k600'], hugs['k700']) == ('1', '1', '0', '1')
    assert (hugs['train'], hugs['val']) == ('2', '2')
    assert len((tmp_path / 'dropped.csv').read_text().splitlines()) == len(merged.dropped) + 1


def merged_val_names(merged):
    return [clip.label for clip in merged.val_of['k400']]


def test_index_arrays_gather_a_head_by_name(planted, tmp_path):
    write_lists(run(planted), tmp_path)
    index = json.loads((tmp_path / 'index.json').read_text())
    assert index['names'] == (tmp_path / 'names.txt').read_text().splitlines()
    for source in SETS:
        part = index[source]
        assert part['names'] == (tmp_path / f'names_{source}.txt').read_text().splitlines()
        gathered = [index['names'][k] for k in part['index']]
        assert [merged_key(n) for n in part['names']] == [merged_key(n) for n in gathered]
    assert index['k400']['names'] == ['abseiling', 'drinking', 'hugging', 'opening bottle']
    assert index['k400']['index'] == [0, 4, 1, 2]


def test_paths_start_from_the_root(planted, tmp_path):
    root = str(tmp_path.parent.parent)
    write_lists(run(planted), tmp_path, root)
    source = open_source(tmp_path / 'train.txt', 'kinetics', root, tmp_path / 'names.txt')
    assert not (tmp_path / 'train.txt').read_text().startswith('/')
    assert all(Path(source[i].path).stat().st_size for i in range(11))


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_order_of_rows_does_not_matter(tmp_path):
    seen = []
    for k, order in enumerate((None, random.Random(1), random.Random(2))):
        inputs = write_tables(tmp_path / f'tables{k}', TABLES, order)
        out = tmp_path / f'out{k}'
        out.mkdir()
        merged = run(inputs)
        write_lists(merged, out)
        (out / 'report').write_text(json.dumps(merged.report))
        seen.append(bytes_of(out))
    assert seen[0] == seen[1] == seen[2]
    assert 'train.txt' not in seen[0]  # nobody looked for files


def test_several_tables_of_a_split_are_one(tmp_path):
    inputs = write_tables(tmp_path / 'tables', TABLES)
    rows = TABLES['k400 train']
    parts = [
        write_table(tmp_path / f'{k}.csv', part, 'train')
        for k, part in enumerate((rows[:5], rows[5:]))
    ]
    parted = inputs | {'k400': Inputs(**{**vars(inputs['k400']), 'train': tuple(parts)})}
    assert run(parted).report == run(inputs).report
    everything = tmp_path / 'all.csv'  # one file for all splits
    everything.write_text(
        ''.join(
            ''.join((tmp_path / 'tables' / f'k400_{split}.csv').open().readlines()[skip:])
            for split, skip in (('train', 0), ('val', 1), ('test', 1))
        )
    )
    one = Inputs((str(everything),), (str(everything),), (str(everything),))
    assert run(inputs | {'k400': one}).report == run(inputs).report


@pytest.mark.parametrize('rule', RULES)
def test_no_training_id_is_in_what_the_rule_holds_out(rule, tmp_path):
    order = random.Random(rule)
    for world in range(20):
        tables = {
            f'{source} {split}': [
                (order.choice(('a', 'b', 'c')), str(order.randrange(60)), start, start + 10)
                for start in (order.randrange(3) for _ in range(30))
            ]
            + [(label, f'{source}{split}{label}', 0, 10) for label in 'abc']
            for source in SETS
            for split in ('train', 'val', 'test')
        }
        inputs = write_tables(tmp_path / str(world), tables)
        merged = merge(inputs, 2019, rule, synonyms={}, complete=False)
        training = [clip.youtube_id for clip in merged.train]
        assert len(training) == len(set(training)) == merged.report['total']['train']
        validation = {c.youtube_id for clips in merged.val_of.values() for c in clips}
        assert not validation & set(training)
        held = {
            youtube_id(r[1])
            for split in RULES[rule].held_out
            for s in SETS
            for r in tables[f'{s} {split}']
        }
        assert not held & set(training)
        if rule == 'drop_val_and_test':
            assert not any(merged.report['ids_shared_after'].values())
        everyone = {youtube_id(r[1]) for s in SETS for r in tables[f'{s} train']}
        assert set(training) == everyone - held  # and no more is lost
        for part in ('train', 'train_of_sets', 'val_of_sets', 'val'):
            for counts in merged.report[part].values():
                assert counts['input'] == sum(counts.values()) - counts['input']


def test_725_names_become_710_classes(tmp_path):
    sets = whole_sets()
    assert {source: len(names) for source, names in sets.items()} == SETS
    assert len({name for names in sets.values() for name in names}) == 725
    tables = whole_tables()
    classes = merge(write_tables(tmp_path / 'tables', tables), 2020).classes
    assert classes.distinct == {'as_written': 725, 'normalised': 724, 'merged': 710}
    assert len(classes.names) == 710 == DATASETS['kinetics710'].num_classes
    assert list(classes.names) == sorted(classes.names)
    assert not set(SYNONYMS) & set(classes.names) and set(SYNONYMS.values()) <= set(classes.names)
    for source, number in SETS.items():
        assert len(classes.index[source]) == len(set(classes.index[source])) == number
    assert {(own, merged) for _, own, merged in classes.respelled} == set(SYNONYMS.items())
    outside = set(classes.names) - set(classes.merged['k700'].values())
    assert outside == {f'gone {k}' for k in range(10)}

    last = tables['k400 train'].pop()[0]
    tables['k400 val'] = [row for row in tables['k400 val'] if row[0] != last]
    with pytest.raises(ValueError, match='k400: 399 classes in the training tables, expected 400'):
        merge(write_tables(tmp_path / 'fewer', tables), 2020)


def test_names_are_compared_after_normalisation():
    assert merged_key('Hugging') == merged_key('"hugging (not baby)"') == merged_key(HUG)
    assert merged_key('passing_american_football_(not_in_game)') == merged_key(
        'passing American  football (not in game) '
    )
    assert merged_key('massaging person\u2019s head') == merged_key("massaging person's head")
    assert merged_key('massaging persons head') != merged_key("massaging person's head")
    assert merged_key('hugging baby') != merged_key('hugging')
    assert len({merged_key(name) for pair in SYNONYMS.items() for name in pair}) == 15


def test_a_set_may_be_written_in_another_way(tmp_path):
    tables = {
        name: [(label and label.replace(' ', '_').title(), *rest) for label, *rest in rows]
        if name == 'k600 train' or name == 'k400 val'
        else rows
        for name, rows in TABLES.items()
    }
    merged, plain = (
        run(write_tables(tmp_path / str(k), t)) for k, t in enumerate((tables, TABLES))
    )
    assert [c[:3] for c in merged.train] == [c[:3] for c in plain.train]
    assert merged.report['total'] == plain.report['total']
    assert merged.classes.names == plain.classes.names  # the newest set spells
    assert merged.classes.native['k400'] == plain.classes.native['k400']
    assert merged.classes.native['k600'] == ('Abseiling', 'Hugging (Not Baby)', 'Sipping Cup')


def test_of_several_files_that_in_the_folder_of_the_class_is_taken():
    clip = kinetics.Clip(youtube_id('a'), 3, 13, 'playing chess', 'k400', 'train')
    name = f'{youtube_id("a")}_000003_000013'
    files = {
        name: ['/r/Playing_Chess/x.mp4', '/r/abseiling/x.mp4'],
        youtube_id('a'): ['/r/playing chess/y.mp4'],
    }
    assert kinetics.find_file(clip, files) == '/r/Playing_Chess/x.mp4'
    assert kinetics.find_file(clip._replace(label='other'), files) == '/r/Playing_Chess/x.mp4'
    assert kinetics.find_file(clip._replace(start=4), files) == '/r/playing chess/y.mp4'
    assert kinetics.find_file(clip._replace(youtube_id=youtube_id('b')), files) == ''


def changed(name, rows):
    return lambda tables: tables | {name: rows}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            changed('k400 train', [('a_b', 'A', 0, 10), ('A b', 'B', 0, 10)]),
            r"k400_train\.csv:3: classes 'A b' and 'a_b' differ in case, quotes",
        ),
        (
            changed('k400 val', [('abseilin', 'A', 0, 10)]),
            r"k400_val\.csv:2: 'abseilin' is no class of the k400 train; did you mean 'abseiling'",
        ),
        (
            changed('k600 train', [*TABLES['k600 train'], ('hugging', 'B', 0, 10)]),
            r"k600: its classes 'hugging' and 'hugging \(not baby\)' both become",
        ),
        (changed('k400 train', [('', 'A', 0, 10)]), r'k400_train\.csv:2: no label'),
        (changed('k400 train', [('a', 'A', 'x', 10)]), r"csv:2: time_start 'x' is not a whole"),
        (changed('k400 train', [('a', 'A', 0, 9.5)]), r"csv:2: time_end '9\.5' is not a whole"),
        (changed('k400 train', [('a', '#NAME?', 0, 10)]), r"'#NAME\?-----' is not a YouTube id"),
    ],
)
def test_wrong_tables_are_errors_with_file_and_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(write_tables(tmp_path / 'tables', change(TABLES)))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', r'x\.csv:1: no column youtube_id, label, time_start, time_end, found \[\]'),
        ('youtube_id,time_start,time_end\n', r'x\.csv:1: no column label'),
        ('label,youtube_id,time_start,time_end,split\n', r'no row of split train, it has no rows'),
        (
            f'label,youtube_id,time_start,time_end,split\na,{youtube_id("a")},0,10,val\n',
            r"no row of split train, found \['val'\]",
        ),
        (
            f'label,youtube_id,time_start,time_end,split\na,{youtube_id("a")},0,10,holdout\n',
            r"x\.csv:2: split 'holdout' is not one of train, val",
        ),
        (
            f'label,youtube_id,time_start,time_end\na,{youtube_id("a")},0\n',
            r'x\.csv:2: 3 fields, the header has 4',
        ),
    ],
)
def test_what_is_no_official_table_is_said(tmp_path, text, message):
    inputs = write_tables(tmp_path / 'tables', TABLES)
    (tmp_path / 'x.csv').write_text(text)
    inputs['k400'] = Inputs((str(tmp_path / 'x.csv'),), inputs['k400'].val, inputs['k400'].test)
    with pytest.raises(ValueError, match=message):
        run(inputs)


def test_wrong_options_are_errors(planted, tmp_path):
    with pytest.raises(ValueError, match="rule='drop' is not one of drop_val_and_test"):
        run(planted, 'drop')
    with pytest.raises(ValueError, match='must name each of k400, k600, k700 once'):
        run(planted, prefer=('k400', 'k400', 'k700'))
    without = planted['k600']
    for fields, message in (
        ({'test': ()}, r"no test table of k600: rule 'drop_val_and_test' needs it; pass --k600"),
        ({'val': ()}, 'no val table of k600'),
        ({'videos': ()}, 'no video folder of k600; pass --k600 videos=DIR'),
        ({'videos': (str(tmp_path / 'none'),)}, 'no such folder of videos'),
        ({'videos': (str(tmp_path),)}, 'no videos'),
        ({'broken': (str(tmp_path / 'none'),)}, 'no such list file'),
    ):
        inputs = planted | {'k600': Inputs(**{**vars(without), **fields})}
        with pytest.raises(ValueError, match=message):
            run(inputs)
    inputs = planted | {'k600': Inputs(**{**vars(without), 'test': ()})}
    assert 'k600 test' not in run(inputs, 'drop_val').report['ids_shared_after']


def test_a_report_without_ids_is_an_error(tmp_path):
    report = tmp_path / 'bad.jsonl'
    for text, message in (
        ('{"path": "/data/clip7.mp4"}\n', r"bad\.jsonl:1: no YouTube id in 'clip7\.mp4'"),
        ('{"index": 1}\n', r'bad\.jsonl:1: not a line of a bad video report'),
    ):
        report.write_text(text)
        with pytest.raises(ValueError, match=message):
            kinetics.read_broken(str(report))


@pytest.mark.parametrize(
    ('synonyms', 'message'),
    [
        ({'a': 'b', 'b': 'c'}, "'b' is merged away itself"),
        ({'a_': 'b', 'A': 'c'}, "'A' is merged into two classes"),
        ({'"': 'c'}, 'has an empty name'),
    ],
)
def test_wrong_synonyms_are_errors(planted, synonyms, message):
    with pytest.raises(ValueError, match=message):
        merge(planted, 2020, synonyms=synonyms, complete=False)


def test_unknown_synonyms_are_errors_in_a_complete_merge(tmp_path):
    inputs = write_tables(tmp_path / 'tables', whole_tables())
    with pytest.raises(ValueError, match="no table has 'jousting', 'tilting'; check"):
        merge(inputs, 2020, synonyms=SYNONYMS | {'jousting': 'tilting'})
    less = {old: new for old, new in SYNONYMS.items() if old != 'sniffing'}
    with pytest.raises(ValueError, match='711 merged classes, expected 710'):
        merge(inputs, 2020, synonyms=less)
