import contextlib
import json
import os

import numpy as np
import pytest

from input_pipeline.datasets import DATASETS
from input_pipeline.label_maps import read_label_map
from input_pipeline.list_formats import LIST_FORMATS, guess_format
from input_pipeline.sampling import PROTOCOLS
from input_pipeline.sources import open_source
from input_pipeline.video_list import Record


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def labels(source):
    return [source[k].label for k in range(len(source))]


def paths(source, root):
    return [source[k].path.removeprefix(f'{root}/') for k in range(len(source))]


def test_kinetics_lines_with_spaces_in_paths(tmp_path):
    text = 'playing chess/a b.mp4 1\n\nriding/c.mp4 0\n'
    source = open_source(write(tmp_path / 'train.txt', text), 'kinetics', '/data')
    assert source[0] == Record('/data/playing chess/a b.mp4', 1, 'a b')
    assert labels(source) == [1, 0]
    assert source.class_names == ('0', '1')
    assert source.num_classes == 2


def test_a_path_that_is_not_utf8_opens_its_file(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b'caf\xe9.mp4')
    with open(name, 'wb'):
        pass
    (tmp_path / 'train.txt').write_bytes(b'caf\xe9.mp4 0\n')
    (tmp_path / 'train.csv').write_bytes(b'path,label\ncaf\xe9.mp4,caf\xe9\n')
    for file in ('train.txt', 'train.csv'):
        source = open_source(tmp_path / file)
        assert os.fsencode(source[0].path) == name and os.path.exists(source[0].path)
    (tmp_path / 'train.txt').write_text('a.mp4 0\n', encoding='utf-16')
    with pytest.raises(ValueError, match=r'train\.txt: is not UTF-8 text'):
        open_source(tmp_path / 'train.txt')


def test_paths_start_at_the_folder_of_the_list_by_default(tmp_path):
    source = open_source(write(tmp_path / 'train.txt', 'a.mp4 0\n/abs/b.mp4 0\n'))
    assert [source[0].path, source[1].path] == [f'{tmp_path}/a.mp4', '/abs/b.mp4']


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('names.txt', 'chess\nriding a bike\n'),
        ('ids.txt', '0 chess\n1 riding a bike\n'),
        ('map.csv', 'id,name\n1,riding a bike\n0,chess\n'),
        ('bare.csv', '0,chess\n1,riding a bike\n'),
        ('map.json', '{"chess": "0", "riding a bike": "1"}'),
        ('inverse.json', '{"0": "chess", "1": "riding a bike"}'),
        ('list.json', '["chess", "riding a bike"]'),
    ],
)
def test_label_maps_of_all_formats(tmp_path, name, text):
    label_map = write(tmp_path / name, text)
    videos = write(tmp_path / 'list.csv', 'path,label\na.mp4,riding a bike\nb.mp4,0\n')
    source = open_source(videos, label_map=label_map)
    assert source.class_names == ('chess', 'riding a bike')
    assert labels(source) == [1, 0]


def test_names_that_begin_with_numbers_stay_names(tmp_path):
    path = write(tmp_path / 'names.txt', '3 point shot\n100 metres\n')
    assert read_label_map(path).names == ('3 point shot', '100 metres')


def test_ids_from_one_are_found_by_lists_from_one(tmp_path):
    label_map = write(tmp_path / 'map.txt', '1 chess\n2 riding\n')
    source = open_source(write(tmp_path / 'l.txt', 'a.mp4 2\nb.mp4 1\n'), label_map=label_map)
    assert labels(source) == [1, 0]


def test_kinetics_official_csv_finds_the_files(tmp_path):
    text = 'label,youtube_id,time_start,time_end,split\nplaying chess,abc,3,13,train\n'
    videos = write(tmp_path / 'train.csv', text)
    layouts = {
        'abc_000003_000013.mp4': tmp_path / '1',
        'playing chess/abc_000003_000013.mp4': tmp_path / '2',
        'playing_chess/abc.mp4': tmp_path / '3',
    }
    for file, root in layouts.items():
        write(root / file, '')
        source = open_source(videos, 'csv', root)
        assert source[0] == Record(f'{root}/{file}', 0, 'abc')
    assert source.class_names == ('playing chess',)


def test_split_column_keeps_the_subset(tmp_path):
    text = 'path,label,split\na.mp4,0,train\nb.mp4,1,val\n'
    videos = write(tmp_path / 'all.csv', text)
    assert paths(open_source(videos, subset='val'), tmp_path) == ['b.mp4']
    with pytest.raises(ValueError, match=r"no row has split 'test', found \['train', 'val'\]"):
        open_source(videos, subset='test')


def test_csv_without_header_and_with_semicolons(tmp_path):
    source = open_source(write(tmp_path / 'l.csv', 'a b.mp4;1\nc.mp4;0\n'))
    assert paths(source, tmp_path) == ['a b.mp4', 'c.mp4']
    assert labels(source) == [1, 0]


def test_csv_with_times_and_two_labels(tmp_path):
    text = 'path,label,label_2,start,end\na.mp4,1,2,0.5,00:01:02.5\nb.mp4,0,1,,\n'
    source = open_source(write(tmp_path / 'l.csv', text), num_classes=(2, 4))
    assert source[0] == Record(f'{tmp_path}/a.mp4', (1, 2), 'a', 0.5, 62.5)
    assert source[1] == Record(f'{tmp_path}/b.mp4', (0, 1), 'b')
    assert source.num_classes == (2, 4)


def test_epic_kitchens_csv_has_two_heads_and_segments(tmp_path):
    text = (
        'narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n'
        'P01_01_0,P01,P01_01,00:00:00.14,00:01:03.37,3,10\n'
    )
    verbs = write(tmp_path / 'verbs.csv', 'id,key\n' + ''.join(f'{k},v{k}\n' for k in range(97)))
    nouns = write(tmp_path / 'nouns.csv', 'id,key\n' + ''.join(f'{k},n{k}\n' for k in range(300)))
    source = open_source(
        write(tmp_path / 'EPIC_100_train.csv', text),
        root='/epic',
        label_map=(verbs, nouns),
        num_classes=DATASETS['epic_kitchens'].num_classes,
    )
    assert source[0] == Record('/epic/P01/videos/P01_01.MP4', (3, 10), 'P01_01_0', 0.14, 63.37)
    assert source.num_classes == (97, 300)
    assert source.class_names[1][10] == 'n10'


def ssv2(tmp_path):
    label_map = write(
        tmp_path / 'labels.json', json.dumps({'Holding something': '1', 'Moving something up': '0'})
    )
    entries = [
        {'id': '7', 'label': 'holding a cup', 'template': 'Holding [something]'},
        {'id': '8', 'label': 'moving pen up', 'template': 'Moving [something] up'},
    ]
    return write(tmp_path / 'train.json', json.dumps(entries)), label_map


def test_ssv2_templates_lose_their_brackets(tmp_path):
    videos, label_map = ssv2(tmp_path)
    source = open_source(videos, 'auto', '/ssv2', label_map)
    assert paths(source, '/ssv2') == ['7.webm', '8.webm']
    assert labels(source) == [1, 0]
    assert source.class_names == ('Moving something up', 'Holding something')


def test_ssv2_files_may_be_mp4(tmp_path):
    videos, label_map = ssv2(tmp_path)
    write(tmp_path / 'videos' / '7.mp4', '')
    source = open_source(videos, 'ssv2_json', tmp_path / 'videos', label_map)
    assert source[1].path.endswith('8.mp4')


def test_ssv2_test_list_is_an_error_that_says_so(tmp_path):
    videos = write(tmp_path / 'test.json', '[{"id": "1"}, {"id": "2"}]')
    with pytest.raises(ValueError, match=r'test\.json\[0\]: no template.*test list without labels'):
        open_source(videos, label_map=ssv2(tmp_path)[1])


def test_ucf101_train_and_test_lists(tmp_path):
    label_map = write(tmp_path / 'classInd.txt', '1 ApplyEyeMakeup\n2 Archery\n')
    train = write(tmp_path / 'trainlist01.txt', 'Archery/v_Archery_g08.avi 2\n')
    test = write(tmp_path / 'testlist01.txt', 'ApplyEyeMakeup/v_A_g01.avi\n')
    assert labels(open_source(train, root='/ucf', label_map=label_map)) == [1]
    source = open_source(test, root='/ucf', label_map=label_map)
    assert source[0] == Record('/ucf/ApplyEyeMakeup/v_A_g01.avi', 0, 'v_A_g01')
    with pytest.raises(ValueError, match=r'need label_map, the path of classInd\.txt'):
        open_source(train)


def test_hmdb51_split_files(tmp_path):
    folder = tmp_path / 'splits'
    write(folder / 'run_test_split1.txt', 'a.avi 1\nb.avi 2\nc.avi 0\n')
    write(folder / 'brush_hair_test_split1.txt', 'd.avi 1 \n')
    write(folder / 'run_test_split2.txt', 'b.avi 1\n')
    write(folder / 'brush_hair_test_split2.txt', 'd.avi 2\n')
    train = open_source(folder, root='/hmdb', subset='train1')
    assert paths(train, '/hmdb') == ['brush_hair/d.avi', 'run/a.avi']
    assert train.class_names == ('brush_hair', 'run')
    assert paths(open_source(folder, root='/hmdb', subset='train'), '/hmdb')[1] == 'run/a.avi'
    names = write(tmp_path / 'labels.txt', 'brush_hair\nrun\n')
    test = open_source(folder, root='/hmdb', subset='test1', label_map=names)
    assert labels(test) == [1]
    with pytest.raises(ValueError, match="subset='validation' must be train or test"):
        open_source(folder, subset='validation')
    with pytest.raises(ValueError, match=r'no files .*_test_split3'):
        open_source(folder, 'hmdb51', subset='test3')


def test_json_and_json_lines(tmp_path):
    entries = [
        {'path': 'a.mp4', 'label': 'x', 'start': 1.5, 'end': 3, 'video_id': 'A'},
        {'path': 'b.mp4', 'label': 'y'},
    ]
    whole = write(tmp_path / 'l.json', json.dumps(entries))
    lines = write(tmp_path / 'l.jsonl', '\n'.join(map(json.dumps, entries)))
    for source in (open_source(whole), open_source(lines)):
        assert source[0] == Record(f'{tmp_path}/a.mp4', 0, 'A', 1.5, 3.0)
        assert source[1].label == 1


def captions(source, root):
    """Name of the file and captions of each video."""
    return [
        (source[k].path.removeprefix(f'{root}/'), source[k].captions) for k in range(len(source))
    ]


def open_usual(name, path, purpose, **fields):
    """As a run opens a list of a data set."""
    usual = DATASETS[name].list_format
    return open_source(path, 'auto', usual_format=usual, purpose=purpose, **fields)


def msrvtt(folder, splits=('train', 'validate', 'test')):
    content = {
        'videos': [{'video_id': f'video{k}', 'split': s, 'id': k} for k, s in enumerate(splits)],
        'sentences': [
            {'caption': f'text {j} of {k}', 'video_id': f'video{k}', 'sen_id': 3 * j + k}
            for j in range(2)
            for k in range(len(splits))
        ],
    }
    return write(folder / 'MSRVTT_data.json', json.dumps(content))


def test_msrvtt_reads_the_split_that_a_run_means(tmp_path):
    videos = msrvtt(tmp_path)
    found = [(f'video{k}.mp4', (f'text 0 of {k}', f'text 1 of {k}')) for k in range(3)]
    assert captions(open_usual('msrvtt', videos, 'train'), tmp_path) == found[:1]
    assert captions(open_usual('msrvtt', videos, 'val'), tmp_path) == found[1:2]
    assert captions(open_usual('msrvtt', videos, 'val', subset='test'), tmp_path) == found[2:]
    assert captions(open_source(videos), tmp_path) == found  # of no run: as a check reads it
    test_only = msrvtt(tmp_path / 'official', ('test', 'test'))
    assert len(open_usual('msrvtt', test_only, 'val')) == 2
    with pytest.raises(ValueError, match=r"split 'test'.*train list.*data\.train_subset"):
        open_usual('msrvtt', test_only, 'train')


@pytest.mark.parametrize('train', ['MSRVTT_train.9k.csv', 'MSRVTT_train.7k.csv'])
def test_msrvtt_as_the_csv_of_the_retrieval_splits(tmp_path, train):
    msrvtt(tmp_path)
    write(tmp_path / train, 'video_id\nvideo2\nvideo0\n')
    text = 'key,vid_key,video_id,sentence\nret0,msr7,video1,"one, two"\nret1,msr8,video0,three\n'
    test = write(tmp_path / 'MSRVTT_JSFUSION_test.csv', text)
    source = open_usual('msrvtt', tmp_path / train, 'train', root='/msrvtt')
    assert captions(source, '/msrvtt')[0] == ('video2.mp4', ('text 0 of 2', 'text 1 of 2'))
    assert [source[k].video_id for k in range(2)] == ['video2', 'video0']
    source = open_usual('msrvtt', test, 'val')
    assert captions(source, tmp_path) == [('video1.mp4', ('one, two',)), ('video0.mp4', ('three',))]
    own = write(tmp_path / 'own.csv', 'video_id,path,caption\nA,a.avi,a text\n')
    assert captions(open_usual('msrvtt', own, 'val'), tmp_path) == [('a.avi', ('a text',))]


def test_msvd_and_vatex(tmp_path):
    text = '# MSR Video Description Corpus\na_1_2 a cat sits\nb_0_9 a dog\na_1_2 a cat\n'
    write(tmp_path / 'AllVideoDescriptions.txt', text)
    videos = write(tmp_path / 'train_list.txt', 'b_0_9\na_1_2\n')
    for purpose in ('train', 'val'):
        assert captions(open_usual('msvd', videos, purpose), tmp_path) == [
            ('b_0_9.avi', ('a dog',)),
            ('a_1_2.avi', ('a cat sits', 'a cat')),
        ]
    entries = [{'videoID': 'x-1_000001_000011', 'enCap': ['a', 'b'], 'chCap': ['\u4e00']}]
    videos = write(tmp_path / 'vatex_training_v1.0.json', json.dumps(entries))
    for purpose in ('train', 'val'):
        source = open_usual('vatex', videos, purpose)
        assert captions(source, tmp_path) == [('x-1_000001_000011.mp4', ('a', 'b'))]


def test_captions_of_one_video_come_together_and_parts_stay_apart(tmp_path):
    text = 'path,caption\nb.mp4,one\na.mp4,"two, too"\nb.mp4,three\n'
    entries = [dict(path=p, caption=c) for p, c in (('b.mp4', 'one'), ('a.mp4', 'two, too'))]
    entries.append({'path': 'b.mp4', 'captions': ['three']})
    lines = '\n'.join(map(json.dumps, entries))
    for name, content in (('l.csv', text), ('l.jsonl', lines), ('l.json', json.dumps(entries))):
        source = open_usual('custom', write(tmp_path / name, content), 'train')
        assert captions(source, tmp_path) == [('b.mp4', ('one', 'three')), ('a.mp4', ('two, too',))]
        assert (source.class_names, source.num_classes, source.labels.shape) == ((), 0, (2, 0))
    text = 'path,start,end,caption\na.mp4,0,2,one\na.mp4,2,4,two\na.mp4,0,2,three\n'
    source = open_source(write(tmp_path / 'parts.csv', text))
    found = [(source[k].start, source[k].end, source[k].captions) for k in range(2)]
    assert found == [(0, 2, ('one', 'three')), (2, 4, ('two',))]


@pytest.mark.parametrize(
    ('usual', 'name', 'content', 'message'),
    [
        ('', 'l.csv', b'path,caption\na,one\nb,\n', r'l\.csv:3: no caption'),
        ('', 'l.csv', b'path,caption\na,one\na, \n', r'l\.csv:3: no caption'),
        ('', 'l.csv', b'path,caption\na,caf\xe9\n', r'l\.csv:2: the text caf.xe9 is not UTF-8'),
        ('', 'l.csv', b'path,caption\na,one\nb\n', r'l\.csv:3: 1 fields, the header has 2'),
        ('', 'l.jsonl', b'{"path": "a", "captions": []}', r'l\.jsonl:1: no caption'),
        ('', 'l.jsonl', b'{"path": "a", "captions": ["b", " "]}', 'captions must be a text'),
        ('', 'l.jsonl', b'{"path": "a", "caption": "\\udcff"}', r'l\.jsonl:1: .* not UTF-8'),
        ('', 'l.jsonl', b'{"path": "a", "caption": "\\ud83d"}', r'l\.jsonl:1: not valid JSON'),
        (
            '',
            'l.jsonl',
            b'{"path": "a", "caption": "%s"}' % (b'x' * 10_000_000),
            r'l\.jsonl:1: the text x{60}\.\.\. has 10000000 characters',
        ),
        ('msrvtt', 'l.csv', b'video_id\nvideo0\nvideo9\n', r'l\.csv:3: no caption'),
        ('msrvtt', 'l.csv', b'video_id,sentence\nvideo0\n', r'l\.csv:2: 1 fields'),
        ('msrvtt', 'none/l.csv', b'video_id\nvideo0\n', r'none/MSRVTT_data\.json is missing'),
        ('msvd', 'none/l.txt', b'a_1_2\n', r'l\.txt: .*none/AllVideoDescriptions\.txt is missing'),
        ('vatex', 'l.json', b'[{"videoID": "a"}]', r'l\.json\[0\]: needs videoID and enCap'),
        (
            '',
            'l.json',
            b'{"videos": [{"video_id": "v"}], "sentences": [{"video_id": "v", "caption": 5}]}',
            r'l\.json\.sentences\[0\]: caption must be a text, found 5',
        ),
    ],
)
def test_wrong_captions_are_errors_with_file_and_line(tmp_path, usual, name, content, message):
    msrvtt(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path / name, usual_format=usual, purpose='train')
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_of_class_folders(tmp_path):
    for name in ('run/b.MP4', 'run/deep/a.mov', 'jump/c.webm', 'jump/notes.txt'):
        write(tmp_path / 'videos' / name, '')
    (tmp_path / 'videos' / 'sit').mkdir()
    source = open_source(tmp_path / 'videos')
    assert source.class_names == ('jump', 'run', 'sit')
    assert [(source[k].video_id, source[k].label) for k in range(3)] == [
        ('jump/c.webm', 0),
        ('run/b.MP4', 1),
        ('run/deep/a.mov', 1),
    ]
    write(tmp_path / 'val' / 'sit' / 'd.mp4', '')
    assert labels(open_source(tmp_path / 'val', label_map=tmp_path / 'videos')) == [2]


def test_a_folder_without_class_folders_is_explained(tmp_path):
    write(tmp_path / 'run' / 'a.MP4', '')
    with pytest.raises(ValueError, match=rf'holds videos \(a\.MP4, .*; name {tmp_path} if run'):
        open_source(tmp_path / 'run')
    for name in ('val/b.mp4', 'train/c.mp4', 'run_train.txt', 'run-val.csv', 'train_notes.txt'):
        write(tmp_path / 'set' / name, '')
    with pytest.raises(ValueError, match=r'with their labels, as .*/run-val\.csv or .*train\.txt$'):
        open_source(tmp_path / 'set/train')


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('empty.txt', '\n', 'the list is empty'),
        ('names.txt', 'a.mp4 jumping\n', 'cannot tell the format.*kinetics, csv, ssv2_json'),
        ('odd.json', '{"a": 1}', 'cannot tell the format'),
        ('broken.json', '[{"path": \n', r'broken\.json:2: not valid JSON'),
        ('broken.jsonl', '{"path": "a", "label": 1}\n{\n', r'broken\.jsonl:2: not valid JSON'),
        ('short.jsonl', '{"path": "a"}\n', r'short\.jsonl:1: needs path and label'),
        ('short.csv', 'path,label\na.mp4\n', r'short\.csv:2: 1 fields, the header has 2'),
        ('empty.csv', 'path,label\n', 'the list has no videos'),
        ('test.csv', 'youtube_id,time_start\nabc,1\n', 'no label column.*test list without labels'),
        ('time.csv', 'path,label,start\na.mp4,0,noon\n', r"time\.csv:2: 'noon' is not a time"),
        ('range.txt', 'a.mp4 0\nb.mp4 5\n', r'range\.txt:2: label 5 is out of range.*0 to 2'),
        ('minus.txt', 'a.mp4 0\nb.mp4 -1\n', r'minus\.txt:2: label -1 is out of range'),
        ('name.csv', 'path,label\na.mp4,jumpin\n', r"name\.csv:2: .*did you mean 'jumping'\?"),
    ],
)
def test_wrong_lists_are_errors_with_file_and_line(tmp_path, name, text, message):
    label_map = write(tmp_path / 'labels.txt', 'jumping\nrunning\nsitting\n')
    with pytest.raises(ValueError, match=message) as caught:
        open_source(write(tmp_path / name, text), label_map=label_map)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('twice.txt', 'run\njump\nrun\n', "class name 'run' appears twice"),
        ('twice.csv', 'id,name\n0,run\n0,jump\n', 'class id 0 appears twice'),
        ('bad.csv', 'id,name\nzero,run\n', r'bad\.csv:2: expected "id,name"'),
        ('mixed.json', '{"a": "x"}', 'neither its keys nor its values'),
        ('empty.txt', '', 'no class names'),
        ('missing', None, 'no such list file'),
    ],
)
def test_wrong_label_maps_are_errors(tmp_path, name, text, message):
    videos = write(tmp_path / 'list.txt', 'a.mp4 0\n')
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(videos, label_map=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_list_number_of_classes_and_format_are_checked(tmp_path):
    videos = write(tmp_path / 'list.txt', 'a.mp4 0\nb.mp4 3\n')
    with pytest.raises(ValueError, match='no such list'):
        open_source(tmp_path / 'nothing.txt')
    with pytest.raises(ValueError, match=r'list\.txt:2: label 3 is out of range, expected 0 to 2'):
        open_source(videos, num_classes=3)
    assert open_source(videos, num_classes=400).num_classes == 400
    label_map = write(tmp_path / 'labels.txt', 'a\nb\nc\nd\n')
    with pytest.raises(ValueError, match='4 classes, expected num_classes=400'):
        open_source(videos, label_map=label_map, num_classes=400)
    with pytest.raises(ValueError, match="list_format='text' must be one of auto, kinetics"):
        open_source(videos, 'text')


def test_every_data_set_names_a_known_format():
    for name, info in DATASETS.items():
        assert info.list_format in LIST_FORMATS, name
        assert info.sampling in PROTOCOLS, name
    assert DATASETS['something_v2'].flip.label_pairs == ((86, 87), (93, 94), (166, 167))


def test_guessing_a_folder_without_videos_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='the folder is empty'):
        guess_format(tmp_path)
    write(tmp_path / 'notes.doc', '')
    with pytest.raises(ValueError, match='cannot tell the format'):
        guess_format(tmp_path)


def test_a_list_of_several_splits_is_never_read_whole_by_a_run(tmp_path):
    text = 'path,label,split\na.mp4,0,train\nb.mp4,1,validate\nc.mp4,1,test\n'
    everything = write(tmp_path / 'all.csv', text)
    entries = [dict(zip(('path', 'label', 'split'), line.split(','))) for line in text.split()[1:]]
    for videos in (everything, write(tmp_path / 'all.jsonl', '\n'.join(map(json.dumps, entries)))):
        assert paths(open_source(videos, purpose='train'), tmp_path) == ['a.mp4']
        assert paths(open_source(videos, purpose='val'), tmp_path) == ['b.mp4']
        assert paths(open_source(videos, purpose='val', subset='test'), tmp_path) == ['c.mp4']
    held_out = write(tmp_path / 'two.csv', 'path,label,split\na.mp4,0,Train\nb.mp4,0,test\n')
    assert paths(open_source(held_out, purpose='val'), tmp_path) == ['b.mp4']
    own = write(tmp_path / 'own.csv', 'path,label,split\na.mp4,0,fold 3\n')
    assert paths(open_source(own, purpose='val'), tmp_path) == ['a.mp4']


@pytest.mark.parametrize(
    ('rows', 'purpose', 'message'),
    [
        ('a.mp4,0,one\nb.mp4,0,two\n', 'train', r"split 'one', 'two'.*data\.train_subset"),
        ('a.mp4,0,train\n', 'val', r"split 'train'.*data\.val_subset"),
        ('a.mp4,0,val\nb.mp4,0,validation\nc.mp4,0,test\n', 'val', 'which of them is the val list'),
    ],
)
def test_a_split_that_is_not_certain_is_an_error(tmp_path, rows, purpose, message):
    videos = write(tmp_path / 'all.csv', f'path,label,split\n{rows}')
    with pytest.raises(ValueError, match=message) as caught:
        open_source(videos, purpose=purpose)
    assert str(videos) in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('list.txt', 'a.mp4 0\n'),
        ('list.csv', 'a.mp4,0\n'),
        ('header.csv', 'path,label\na.mp4,0\n'),
        ('list.json', '[{"path": "a.mp4", "label": 0}]'),
        ('videos', None),
    ],
)
def test_a_subset_of_a_list_without_splits_is_an_error(tmp_path, name, text):
    if text is None:
        write(tmp_path / name / 'run' / 'a.mp4', '')
    else:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=r"subset='train1' \(data\.val_subset\)") as caught:
        open_source(tmp_path / name, subset='train1', purpose='val')
    assert str(tmp_path / name) in str(caught.value)


def test_a_column_of_frame_counts_is_no_label(tmp_path):
    videos = write(tmp_path / 'l.csv', 'a.mp4,300,1\nb.mp4,120,0\n')
    source = open_source(videos, num_classes=2)
    assert (labels(source), source.num_classes) == ([1, 0], 2)
    assert labels(open_source(videos, num_classes=(400, 2))) == [(300, 1), (120, 0)]
    with pytest.raises(
        ValueError, match=r'l\.csv:1: 3 fields and no header.*path,num_frames,label'
    ):
        open_source(videos)


def test_what_systems_put_beside_the_videos_is_no_class(tmp_path, caplog):
    kept = ('run/a.mp4', 'jump/b.mp4')
    junk = ('.git/c.mp4', '__MACOSX/d.mp4', '@eaDir/e.mp4', 'run/._a.mp4', 'run/@eaDir/f.mp4')
    for name in (*kept, *junk, '.ipynb_checkpoints/g.mp4'):
        write(tmp_path / 'videos' / name, '')
    source = open_source(tmp_path / 'videos')
    assert source.class_names == ('jump', 'run')
    assert sorted(source[k].video_id for k in range(len(source))) == sorted(kept)
    assert read_label_map(tmp_path / 'videos').names == ('jump', 'run')


def test_files_that_are_skipped_are_counted_by_suffix(tmp_path, caplog):
    for name in ('a.WMV', 'b.gif', 'c.3gp', 'd.mts', 'e.txt', 'f.txt', 'g.srt', 'h'):
        write(tmp_path / 'videos/run' / name, '')
    write(tmp_path / 'videos/loose.mp4', '')
    assert len(open_source(tmp_path / 'videos')) == 4
    assert 'skipped 4 files' in caplog.text
    assert '2 .txt, 1 .srt, 1 without a suffix' in caplog.text
    assert 'skipped 1 files that lie in no class folder' in caplog.text


def test_a_folder_of_splits_says_which_to_name(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path / 'my_videos' / split / 'run' / 'a.mp4', '')
    with pytest.raises(
        ValueError, match=r'holds the splits train, val.*set data\.train_list to'
    ) as e:
        open_source(tmp_path / 'my_videos', purpose='train')
    assert f'{tmp_path}/my_videos/train or ' in str(e.value)
    write(tmp_path / 'vehicles' / 'train' / 'a.mp4', '')  # a class of that name
    assert open_source(tmp_path / 'vehicles').class_names == ('train',)


def test_a_label_without_a_map_is_bounded_by_the_list(tmp_path):
    videos = write(tmp_path / 'l.txt', 'a.mp4 0\nb.mp4 1000000000000\n')
    with pytest.raises(ValueError, match=r'l\.txt:2: label 1000000000000 .*0 to 999.*label_map'):
        open_source(videos)
    assert open_source(write(tmp_path / 'few.txt', 'a.mp4 999\n')).num_classes == 1000


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('deep.json', '[' * 100_000, 'deep.json: not valid JSON: nested too deeply'),
        ('deep.jsonl', '[' * 100_000, 'deep.jsonl:1: not valid JSON: nested too deeply'),
        ('nan.json', '[{"path": "a", "label": NaN}]', 'NaN is not a JSON value'),
        ('digits.json', f'[{{"path": "a", "label": {"9" * 5000}}}]', 'digits.json: not valid JSON'),
        ('long.csv', f'path,label\na,"{"x" * 200_000}\n', r'long\.csv:2: not CSV: field larger'),
        (
            'path.json',
            '[{"path": 5, "label": 1}]',
            r'path\.json\[0\]: path must be a text, found 5',
        ),
        ('flag.json', '[{"path": "a", "label": true}]', r'label must be a text or a whole number'),
        ('half.json', '[{"path": "a", "label": 0.5}]', r'whole number, found 0\.5'),
        ('null.json', '[{"path": "a", "label": null}]', r'whole number, found None'),
        ('list.json', '[{"path": "a", "label": 1}, 5]', 'expected a list of objects'),
        ('time.json', '[{"path": "a", "label": 1, "start": [1]}]', r'\[1\] is not a time'),
        ('s.json', '[{"id": 1, "template": 5}]', r's\.json\[0\]: template must be a text, found 5'),
        ('score.csv', 'path,label\na,1_0\n', r"score\.csv:2: label '1_0' is neither"),
        ('nan.csv', 'path,label\na,run\nb,nan\n', r"nan\.csv:3: label 'nan' is neither"),
        ('empty.csv', 'path,label\na,\n', r"empty\.csv:2: label '' is neither"),
        ('float.csv', 'path,label\na,1.0\n', r"float\.csv:2: label '1\.0' is neither"),
        ('mixed.csv', 'path,label\na,1\nb,run\n', r"mixed\.csv:3: label 'run' is no whole number"),
        ('wide.csv', 'path,label\na,\uff11\n', r'wide\.csv:2: label'),
        (
            'inf.csv',
            'label,youtube_id,time_start\nx,a,inf\n',
            r"inf\.csv:2: time_start 'inf' is not",
        ),
        (
            'abc.csv',
            'label,youtube_id,time_start\nx,a,abc\n',
            r"abc\.csv:2: time_start 'abc' is not",
        ),
        ('1_0.csv', 'path,label,start\na,x,1_0\n', r"1_0\.csv:2: '1_0' is not a time"),
        ('minus.csv', 'path,label,end\na,x,-1\n', r"minus\.csv:2: '-1' is not a time"),
        ('hours.csv', 'path,label,end\na,x,1:2:3:4\n', r'hours\.csv:2: .* is not a time'),
    ],
)
def test_lists_are_read_strictly(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        open_source(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('deep.json', '[' * 100_000, 'nested too deeply'),
        ('numbers.json', '["run", 5]', r'numbers\.json\[1\]: expected a class name, found 5'),
        ('nested.json', '{"0": ["run"], "1": "jump"}', 'neither its keys nor its values'),
        ('flags.json', '{"run": true, "jump": false}', 'neither its keys nor its values'),
        ('score.csv', 'id,name\n1_0,run\n', r'score\.csv:2: expected "id,name"'),
        ('long.txt', 'x' * 5000, 'a class name of 5000 characters'),
        ('long.csv', f'id,name\n0,"{"x" * 200_000}\n', r'long\.csv:2: not CSV'),
        ('pipe', None, 'is a FIFO, not a regular file'),
    ],
)
def test_label_maps_are_read_strictly(tmp_path, name, text, message):
    if text is None:
        os.mkfifo(tmp_path / name)
    else:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_label_map(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_random_bytes_in_lists_are_value_errors(tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        'l.txt': b'a/b.mp4 300 1\nc d.mp4 2 0\n',
        'trainlist01.txt': b'Run/v_Run_g01.avi 1\nJump/v_Jump_g02.avi 2\n',
        'l.csv': b'label,youtube_id,time_start,time_end,split\nrun,abc,0,10,train\n',
        'e.csv': b'video_id,start_timestamp,stop_timestamp,verb_class,noun_class\nP1,0:1,2,3,4\n',
        'l.json': b'[{"id": "7", "template": "Holding [something]"}, {"id": 8, "label": "x"}]',
        'm.json': b'{"videos": [{"video_id": "v0", "split": "train"}], "sentences": '
        b'[{"video_id": "v0", "caption": "a cat"}]}',
        'v.json': b'[{"videoID": "abc_0_10", "enCap": ["a cat", "a dog"]}]',
        'l.jsonl': b'{"path": "a.mp4", "label": [1, 2], "start": 1.5}\n',
        'c.csv': b'path,caption\na.mp4,a cat\nb.mp4,"a dog, too"\na.mp4,a tree\n',
        'c.jsonl': b'{"path": "a", "captions": ["x", "y"]}\n{"path": "a", "caption": "z"}\n',
    }
    label_map = write(tmp_path / 'names.txt', 'run\njump\n')
    pieces = [
        b'"',
        b'[',
        b']',
        b'{',
        b',',
        b'\n',
        b'\0',
        b'\xff',
        b'NaN',
        b'1e999',
        b'-',
        b'\r',
        b'5',
    ]
    for name, content in whole.items():
        for _ in range(150):
            changed = bytearray(content)
            for _ in range(rng.integers(1, 5)):
                start, length = rng.integers(0, len(changed) + 1), rng.integers(0, 4)
                changed[start : start + length] = pieces[rng.integers(len(pieces))]
            (tmp_path / name).write_bytes(changed)
            for arguments in ({}, {'label_map': label_map, 'purpose': 'train'}):
                with contextlib.suppress(ValueError, OSError):
                    open_source(tmp_path / name, **arguments)


# A form feed, NEL, a line separator and a group separator, which str.splitlines takes for ends.
ODD_NAME = 'a\x0cb\x85c\u2028d\x1de.mp4'


def test_lines_of_a_list_end_at_newlines_only(tmp_path):
    names = (ODD_NAME, 'b.mp4')
    text = ''.join(f'{name} 0\n' for name in names)
    json_lines = ''.join(
        json.dumps({'path': name, 'label': 'x'}, ensure_ascii=False) + '\n' for name in names
    )
    table = 'path,label\n' + ''.join(f'{name},x\n' for name in names)
    for file, content in (('l.txt', text), ('l.csv', table), ('l.jsonl', json_lines)):
        for ending in ('\n', '\r\n'):
            write(tmp_path / file, content.replace('\n', ending))
            assert paths(open_source(tmp_path / file), tmp_path) == list(names)


def test_a_quoted_field_of_a_csv_keeps_its_newline(tmp_path):
    source = open_source(write(tmp_path / 'l.csv', 'path,label\n"a\nb.mp4",x\nc.mp4,y\n'))
    assert paths(source, tmp_path) == ['a\nb.mp4', 'c.mp4']


def test_a_quote_that_takes_the_next_rows_for_a_name_is_an_error(tmp_path):
    text = 'path,label\n"a.mp4,0\nb.mp4,1\n"c.mp4",1\nd.mp4,0\n'
    with pytest.raises(ValueError, match=r'l\.csv:4: not CSV'):
        open_source(write(tmp_path / 'l.csv', text))


def test_a_csv_with_a_column_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'l\.csv:1: column label appears twice'):
        open_source(write(tmp_path / 'l.csv', 'path,label,label\na.mp4,0,1\n'))


def test_half_a_surrogate_pair_is_refused_and_a_byte_that_is_not_utf8_is_not(tmp_path):
    for name in ('l.json', 'l.jsonl'):
        text = r'{"path": "\ud83d\ude00\udcff.mp4", "label": "x"}'
        text = f'[{text}]' if name == 'l.json' else text
        (path,) = paths(open_source(write(tmp_path / name, text)), tmp_path)
        assert os.fsencode(path) == '\U0001f600'.encode() + b'\xff.mp4'
        for wrong in ('path', 'label'):
            other = text.replace(f'"{wrong}": "', rf'"{wrong}": "\uD83D ')
            with pytest.raises(ValueError, match=rf'{name}.*: not valid JSON: .*ud83d'):
                open_source(write(tmp_path / name, other))


def test_links_to_folders_are_followed_and_a_ring_of_them_ends(tmp_path):
    for name in ('videos/run/1.mp4', 'videos/jump/2.mp4', 'elsewhere/deep/3.mp4'):
        write(tmp_path / name, '')
    (tmp_path / 'videos/run/more').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere/deep/ring').symlink_to(tmp_path / 'videos/run')
    source = open_source(tmp_path / 'videos')
    assert [source[k].video_id for k in range(len(source))] == [
        'jump/2.mp4',
        'run/1.mp4',
        'run/more/deep/3.mp4',
    ]
