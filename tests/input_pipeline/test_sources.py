import json

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
    with pytest.raises(ValueError, match='cannot tell the format'):
        guess_format(tmp_path)
