"""Videos with any number of classes, from lists and shards to batches."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from video_files import pictures, write_video

from dist_jax import recipe
from dist_jax.dataset import build, inspect
from input_pipeline import check
from input_pipeline.class_names import mirror_pairs
from input_pipeline.label_maps import read_label_map
from input_pipeline.label_sets import LabelSets, MultiHot
from input_pipeline.pipeline import EvalReader, TrainReader, eval_batches, train_batches
from input_pipeline.records import BuiltSplit, index_file
from input_pipeline.sources import open_source
from input_pipeline.transforms import Flip

NAMES = 'turns left\nturns right\nopens\ncloses\n'
CHARADES = 'id,actions,length'


def write(path, text):
    path.write_text(text, encoding='utf-8')
    return path


def sets(source):
    return [sorted(source[k].label) for k in range(len(source))]


def names(source, root):
    return [source[k].path.removeprefix(f'{root}/') for k in range(len(source))]


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('l.csv', 'path,labels\na b.mp4,2;0\nc.mp4,\nd.mp4,3;3\n'),
        ('l.csv', 'path,labels\na b.mp4,turns left|opens\nc.mp4,\nd.mp4,closes\n'),
        ('l.csv', 'path;labels\na b.mp4;0|2\nc.mp4;\nd.mp4;3\n'),
        ('l.csv', 'labels,path\n"0,2",a b.mp4\n,c.mp4\n3,d.mp4\n'),
        ('l.csv', 'a b.mp4,0;2\nc.mp4,\nd.mp4,3\n'),
        ('l.txt', 'a b.mp4 0 2\nc.mp4\nd.mp4 3\n'),
        ('l.txt', 'a b.mp4 2,0\nc.mp4\nd.mp4 3\n'),
        ('l.txt', 'a b.mp4 turns left, opens\nc.mp4\nd.mp4 closes\n'),
        (
            'l.jsonl',
            '{"path": "a b.mp4", "labels": ["opens", "turns left"]}\n'
            '{"path": "c.mp4", "labels": []}\n{"path": "d.mp4", "labels": 3}\n',
        ),
    ],
)
def test_lists_of_all_forms(tmp_path, file, text):
    label_map = write(tmp_path / 'names.txt', NAMES)
    source = open_source(write(tmp_path / file, text), label_map=label_map, several=True)
    assert sets(source) == [[0, 2], [], [3]]
    assert names(source, tmp_path) == ['a b.mp4', 'c.mp4', 'd.mp4']
    assert source.class_names == tuple(NAMES.splitlines())
    assert isinstance(source[1].label, frozenset)
    assert sets(pickle.loads(pickle.dumps(source))) == sets(source)
    assert recipe.list_sha256(source) != recipe.list_sha256(
        open_source(write(tmp_path / 'o.jsonl', '{"path": "a b.mp4", "labels": [0]}'))
    )


@pytest.mark.parametrize('field', ['labels', 'label'])
def test_a_list_says_by_its_column_whether_there_are_several(tmp_path, field):
    rows = ''.join(f'{k}.mp4,{k},{k}\n' for k in range(3))
    path = write(tmp_path / 'l.csv', f'path,{field},caption\n{rows}')
    assert sets(open_source(path, several=True)) == [[0], [1], [2]]
    plain = open_source(path)
    # Lists with a caption and no class are of captions, as they were.
    assert not isinstance(plain.labels, LabelSets)
    assert bool(plain.class_names) == (field == 'label')
    path = write(tmp_path / 'l.csv', 'path,labels\na.mp4,0\n')
    assert isinstance(open_source(path).labels, LabelSets)


def test_numbers_and_names_without_a_label_map(tmp_path):
    path = write(tmp_path / 'l.csv', 'path,labels\na.mp4,4;1\nb.mp4,\n')
    assert open_source(path).class_names == tuple('01234')
    path = write(tmp_path / 'l.csv', 'path,labels\na.mp4,run;jump\nb.mp4,\n')
    assert open_source(path).class_names == ('jump', 'run')


def test_frame_folders_and_paths_with_spaces_and_numbers(tmp_path):
    text = 'my folder 1,2\nclip 7/part 3.mp4 1\nfolder 2 0\nfolder\nx 1, 2\n'
    source = open_source(write(tmp_path / 'l.txt', text), 'multi_label')
    assert names(source, tmp_path) == ['my folder', 'clip 7/part 3.mp4', 'folder', 'folder', 'x']
    assert sets(source) == [[1, 2], [1], [0, 2], [], [1, 2]]


def test_charades(tmp_path):
    header = (
        'id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length'
    )
    rows = (
        '46GP8,HR43,Kitchen,6,7,Yes,"A person cooks; then, eats.",food;stove,"A person, at the '
        'stove.;x",c092 11.90 21.20;c147 0.00 12.60,24.83\nN11GT,0KZ7,Stairs,6,7,No,x,y,z,,18.33\n'
    )
    labels = ''.join(f'c{k:03d} Doing {k} things\n' for k in range(157))
    label_map = write(tmp_path / 'Charades_v1_classes.txt', labels)
    (tmp_path / 'N11GT.mp4').touch()
    source = open_source(
        write(tmp_path / 'l.csv', f'{header}\n{rows}'), label_map=label_map, num_classes=157
    )
    assert sets(source) == [[92, 147], []]
    assert source.class_names[92] == 'Doing 92 things' and source.num_classes == 157
    assert names(source, tmp_path) == ['46GP8.mp4', 'N11GT.mp4'] and source[0].video_id == '46GP8'
    assert (source[0].start, source[0].end) == (None, None)
    without = open_source(tmp_path / 'l.csv', num_classes=157)
    assert without.class_names[:2] == ('0', '1') and sets(without) == sets(source)


@pytest.mark.parametrize(
    ('file', 'text', 'message'),
    [
        ('l.csv', 'path,labels\na.mp4,1;9\n', r'l\.csv:2: label 9 is out of range.* 0 to 3'),
        ('l.csv', 'path,labels\na.mp4,1\nb.mp4,-1\n', r'l\.csv:3: label -1 is out of range'),
        ('l.csv', 'path,labels\na.mp4,open\n', r"l\.csv:2: label 'open' .*mean 'opens'"),
        ('l.csv', 'path,labels\na.mp4,1;;2\n', r"l\.csv:2: classes '1;;2': one of them is empty"),
        ('l.csv', 'path,labels\na.mp4,1;\n', r'l\.csv:2: classes .* is empty'),
        ('l.csv', 'path,label\na.mp4,1;2\n', r"l\.csv:2: '1;2' in the column label.*labels"),
        ('l.csv', 'path,label,label_2\na.mp4,1,2\n', r'l\.csv: a label for each of 2 heads'),
        ('l.csv', 'a.mp4,1,2\n', r'l\.csv:1: 3 fields and no header.*path,labels'),
        ('l.csv', 'path,labels\n,1\n', r"l\.csv:2: expected a path and 'labels'"),
        ('l.csv', f'{CHARADES}\nA,c001 1,9\n', r"l\.csv:2: action 'c001 1', expected"),
        ('l.csv', f'{CHARADES}\nA,c001 1 x,9\n', r"l\.csv:2: action 'c001 1 x'"),
        ('l.csv', f'{CHARADES}\nA,c001 -1 2,9\n', r"l\.csv:2: action 'c001 -1 2'"),
        ('l.csv', f'{CHARADES}\nA,c001 nan 2,9\n', r"l\.csv:2: action 'c001 nan 2'"),
        ('l.csv', f'{CHARADES}\nA,opens 1 2,9\n', r"l\.csv:2: action 'opens 1 2'"),
        ('l.csv', f'{CHARADES}\nA,c001 1 2;,9\n', r'l\.csv:2: classes .* is empty'),
        ('l.csv', f'{CHARADES}\nA,c004 1 2,9\n', r'l\.csv:2: label 4 is out of range'),
        ('l.csv', f'{CHARADES}\n,c001 1 2,9\n', r'l\.csv:2: no id'),
        ('l.txt', 'a.mp4 1\nb.mp4 1 x\n', r"l\.txt:2: label '1 x' is not a class"),
        ('l.txt', 'a.mp4 1,,2\n', r'l\.txt:1: classes .* is empty'),
        ('l.json', '[{"path": "a", "labels": {"a": 1}}]', r'l\.json\[0\]: label must be'),
        ('l.json', '[{"path": "a", "labels": null}]', r'l\.json\[0\]: label must be'),
        ('l.json', '[{"path": "a", "labels": [[1]]}]', r'l\.json\[0\]: label must be'),
        (
            'l.json',
            '[{"path": "a", "labels": [1]}, {"path": "b", "label": 1}]',
            r"l\.json\[1\]: expected a path and 'labels'",
        ),
    ],
)
def test_wrong_rows_are_errors_with_file_and_line(tmp_path, file, text, message):
    label_map = write(tmp_path / 'names.txt', NAMES)
    with pytest.raises(ValueError, match=message):
        open_source(write(tmp_path / file, text), label_map=label_map, several=True)


def test_a_list_without_any_class_needs_names(tmp_path):
    path = write(tmp_path / 'l.csv', 'path,labels\na.mp4,\n')
    with pytest.raises(ValueError, match=r'l\.csv: no video has a class; set label_map'):
        open_source(path)
    assert sets(open_source(path, num_classes=2)) == [[]]


def test_one_label_a_video_is_a_set_of_one(tmp_path):
    for folder in ('run', 'walk'):
        (tmp_path / 'clips' / folder).mkdir(parents=True)
        (tmp_path / 'clips' / folder / f'{folder}.mp4').touch()
    assert sets(open_source(tmp_path / 'clips', several=True)) == [[0], [1]]
    path = write(tmp_path / 'l.txt', 'a.mp4 1\nb.mp4 0\n')
    assert sets(open_source(path, 'kinetics', several=True)) == [[1], [0]]


def test_a_long_line_takes_little_time(tmp_path):
    path = write(tmp_path / 'l.txt', 'x ' + '1 ' * 200_000 + '\n' + ', ' * 200_000 + 'a\n')
    with pytest.raises(ValueError, match=r'l\.txt:2'):
        open_source(path, 'multi_label')


def test_a_mirror_swaps_sides_in_sets():
    flip = Flip(1.0, mirror_pairs(NAMES.splitlines()))
    video = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    for label, wanted in (({0, 2}, {1, 2}), ({1}, {0}), ({0, 1, 3}, {0, 1, 3}), ((), ())):
        mirrored, found = flip(video, frozenset(label), np.random.default_rng(0))
        assert found == frozenset(wanted)
        np.testing.assert_array_equal(mirrored, video[:, :, ::-1])


def test_packed_sets():
    packed = LabelSets.pack([{2, 0}, (), [1, 1], (), {3}])
    assert [set(packed[k]) for k in range(-5, 5)] == [{0, 2}, set(), {1}, set(), {3}] * 2
    assert packed.counts(5).tolist() == [1, 1, 1, 1, 0] and packed.sizes.tolist() == [2, 0, 1, 0, 1]
    assert [packed.members(k).tolist() for k in range(5)] == [[0], [2], [0], [4], []]
    packed.check()
    LabelSets.pack([]).check()
    LabelSets.pack([(), ()]).check()
    for classes, ends in (([1, 0], [2]), ([0, 0], [2]), ([0, 1], [1]), ([0], [])):
        with pytest.raises(ValueError, match='ascending'):
            LabelSets(np.array(classes), np.array(ends, int)).check()


@pytest.fixture(scope='module')
def listed(tmp_path_factory):
    """A folder with three videos, one of which cannot be read, and one without a class."""
    folder = tmp_path_factory.mktemp('listed')
    for name in 'ac':
        write_video(folder / f'{name}.mp4', pictures(12, 32, 48))
    (folder / 'b.mp4').write_text('no video')
    write(folder / 'l.csv', 'path,labels\na.mp4,turns left;opens\nb.mp4,opens\nc.mp4,\n')
    write(folder / 'names.txt', NAMES)
    return folder


@pytest.fixture(scope='module')
def built(listed):
    words = ['custom', '--list', f'train={listed}/l.csv', '--videos', listed, '--out', listed / 'o']
    words += ['--label_map', listed / 'names.txt', '--workers', 0]
    assert build.main(list(map(str, words))) == 0
    return listed / 'o'


def test_batches_have_ones_where_a_clip_has_a_class(listed):
    source = open_source(listed / 'l.csv', label_map=listed / 'names.txt')
    annotate = MultiHot(4)
    (batch, rest) = eval_batches(source, EvalReader(2, 32, annotate=annotate), batch_size=2)
    wanted = [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    found = np.concatenate([batch['label'], rest['label']])
    assert found.dtype == np.uint8 and found.tolist() == wanted  # unreadable, none, padding
    assert [*batch['mask'], *rest['mask']] == [1, 0, 1, 0]
    flip = Flip(1.0, mirror_pairs(source.class_names))
    transforms = (lambda video, label, rng: (video[:, :32, :32], label), flip)
    reader = TrainReader(2, 32, transforms=transforms, annotate=annotate, repeats=2)
    (batch,) = train_batches(source, reader, batch_size=6, seed=0, num_steps=1, shuffle=False)
    assert batch['label'].tolist() == [[0, 1, 1, 0]] * 2 + [[0] * 4] * 4
    (batch,) = eval_batches(source, EvalReader(2, 32), batch_size=4)
    assert 'label' not in batch  # where nobody asks for classes, videos can be read


def test_built_sets_keep_the_classes(built):
    source = BuiltSplit(built, 'train')
    assert sets(source) == [[0, 2], []] and source.num_classes == 4
    assert source.class_names == tuple(NAMES.splitlines())
    examples = tfds.builder_from_directory(built).as_data_source('train')
    assert [list(example['labels']) for example in examples] == [[0, 2], []]
    assert json.loads((built / 'labels.json').read_text()) == {
        'train': {'labels': {'turns left': 1, 'turns right': 0, 'opens': 1, 'closes': 0}}
    }
    reader = EvalReader(2, 32, annotate=MultiHot(4))
    (batch,) = eval_batches(open_source(built, several=True), reader, batch_size=2)
    assert batch['label'].tolist() == [[1, 0, 1, 0], [0] * 4] and batch['mask'].all()
    assert inspect.main([str(built), '--videos', '1']) == 0
    found = json.loads((built / 'inspection/statistics.json').read_text())['train']
    assert found['classes of a video'] == {'none': 1, 'mean': 1.0, 'most': 2}
    assert found['classes of head 1']['without a video'] == 2
    assert check.main(['--list', str(built)]) == 0


def test_a_record_of_other_classes_is_found(built):
    source = BuiltSplit(built, 'train')
    source.index = dataclasses.replace(source.index, labels=LabelSets.pack([{0, 3}, ()]))
    with pytest.raises(OSError, match='is not the one of the index'):
        source[0].load()


def test_a_damaged_index_of_sets_is_a_value_error(built, tmp_path):
    content = dict(np.load(built / index_file('train')))
    (tmp_path / 'index.json').write_text((built / 'index.json').read_text())
    for change in (
        {'label_ends': np.array([2, 3])},
        {'label_ends': np.array([2, 1])},
        {'label_ends': np.zeros((), int)},
        {'labels': np.array([2, 0], np.int32)},
        {'labels': np.array([0, 9], np.int32)},
        {'labels': np.array([0.0, 1.0])},
        {'labels': np.zeros((2, 1), np.int32)},
    ):
        np.savez(tmp_path / index_file('train'), **(content | change))
        with pytest.raises(ValueError, match='build the set again'):
            BuiltSplit(tmp_path, 'train')
    del content['label_ends']
    np.savez(tmp_path / index_file('train'), **(content | {'labels': np.zeros((2, 1), np.int32)}))
    with pytest.raises(ValueError, match='build the set again'):
        BuiltSplit(tmp_path, 'train')


def test_label_maps_of_charades(tmp_path):
    path = write(tmp_path / 'l.txt', 'c001 Opening a door\nc000 Holding\n')
    assert read_label_map(path).names == ('Holding', 'Opening a door')
    path = write(tmp_path / 'l.txt', 'c001 a\nc003 b\n')  # not numbered: names
    assert read_label_map(path).names == ('c001 a', 'c003 b')
