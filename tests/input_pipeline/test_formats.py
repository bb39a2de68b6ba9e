"""Every list that README promises opens through a config, as a run opens it, and is read."""

import json
import shutil

import cv2
import pytest
from video_files import pictures, write_video

from dist_jax import recipe
from dist_jax.configs import dist
from dist_jax.dataset import build
from input_pipeline.pipeline import record_rng
from input_pipeline.records import BuiltSplit

CLASSES = {'kinetics400': 400, 'kinetics600': 600, 'kinetics700': 700, 'kinetics710': 710}
SIDES = ('Pulling something from left to right', 'Pulling something from right to left')


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp('video') / 'video.mp4', pictures(8))


@pytest.fixture
def place(video, tmp_path):
    """Puts the video, or with a folder's name its frames, under a name into a folder of data."""

    def put(*names):
        for name in names:
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix:
                shutil.copy(video, target)
                continue
            target.mkdir()
            for number, picture in enumerate(pictures(6), 1):
                cv2.imwrite(str(target / f'{number:05d}.jpg'), picture[..., ::-1])

    return put


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def read_both(name, root, train, val, label_map='', **fields):
    """The two lists of a config, after a clip of each was read; as (labels, labels)."""
    config = dist.get_config('demo')
    config.data.update(name=name, root=str(root), flip=False, num_frames=2, sampling='')
    config.data.update(train_list=str(train), val_list=str(val), label_map=str(label_map), **fields)
    found = []
    for split in ('train', 'val'):
        source = recipe.open_split(config, split)
        for index in range(len(source)):
            (clip,), _ = recipe.train_reader(config).read(source[index], record_rng(0, 0, index))
            assert clip.shape == (2, 48, 48, 3) and clip.any()
        found.append([source[index].label for index in range(len(source))])
    return tuple(found)


def names_file(tmp_path, count, first=()):
    names = [*first, *(f'class {k}' for k in range(count - len(first)))]
    return write(tmp_path / 'names.txt', '\n'.join(names))


@pytest.mark.parametrize('name', CLASSES)
def test_kinetics_as_lines_as_a_csv_and_as_the_official_csv(name, place, tmp_path):
    label_map = names_file(tmp_path, CLASSES[name], ('archery', 'riding a bike'))
    place('archery/abc_000003_000013.mp4', 'riding a bike/def_000000_000010.mp4')
    first, second = 'archery/abc_000003_000013.mp4', 'riding a bike/def_000000_000010.mp4'
    train = write(tmp_path / 'train.txt', f'{first} 0\n{second} 1\n')
    val = write(tmp_path / 'val.txt', f'{second} 1\n')
    assert read_both(name, tmp_path, train, val, label_map) == ([0, 1], [1])

    train = write(tmp_path / 'train.csv', f'path,label\n{first},0\n{second},riding a bike\n')
    val = write(tmp_path / 'val.csv', f'path,label\n{second},1\n')
    assert read_both(name, tmp_path, train, val, label_map) == ([0, 1], [1])

    header = 'label,youtube_id,time_start,time_end,split\n'
    train = write(tmp_path / 'train.csv', f'{header}archery,abc,3,13,train\n')
    val = write(tmp_path / 'validate.csv', f'{header}"riding a bike",def,0,10,validate\n')
    assert read_both(name, tmp_path, train, val, label_map) == ([0], [1])


def test_what_merge_kinetics_writes(place, tmp_path):
    place('a.mp4', 'b.mp4')
    header = 'label,youtube_id,time_start,time_end,split,source,native,merged,path\n'
    train = write(
        tmp_path / 'train.csv', f'{header}archery,a,0,10,train,k400,archery,archery,a.mp4\n'
    )
    val = write(tmp_path / 'val.csv', f'{header}class 0,b,0,10,val,k700,class 0,class 0,b.mp4\n')
    label_map = names_file(tmp_path, 710, ('archery',))
    assert read_both('kinetics710', tmp_path, train, val, label_map) == ([0], [1])


def test_something_v2_as_official_json_and_as_csv(place, tmp_path):
    place('videos/7.webm', 'videos/8.webm')
    root = tmp_path / 'videos'
    names = [*SIDES, *(f'Class {k}' for k in range(172))]
    labels = write(tmp_path / 'labels.json', json.dumps({n: str(k) for k, n in enumerate(names)}))
    lists = [
        write(tmp_path / f'{split}.json', json.dumps([{'id': str(number), 'template': template}]))
        for split, number, template in (
            ('train', 7, 'Pulling [something] from left to right'),
            ('validation', 8, 'Pulling [something] from right to left'),
        )
    ]
    assert read_both('something_v2', root, *lists, labels) == ([0], [1])
    for text in ('path,label\n7.webm,0\n8.webm,1\n', f'7;{SIDES[0]}\n8;{SIDES[1]}\n'):
        train = write(tmp_path / 'train.csv', text)
        assert read_both('something_v2', root, train, train, labels) == ([0, 1], [0, 1])
    # A list without templates is still the data set's own.
    train = write(tmp_path / 'train.json', json.dumps([{'id': '7', 'label': SIDES[0]}]))
    assert read_both('something_v2', root, train, train, labels) == ([0], [0])


def test_something_v1_as_folders_of_frames(place, tmp_path):
    place('frames/7', 'frames/8')
    root = tmp_path / 'frames'
    names = [*SIDES, *(f'Class, {k}' for k in range(172))]
    labels = write(tmp_path / 'something-something-v1-labels.csv', '\n'.join(names))
    train = write(tmp_path / 'something-something-v1-train.csv', f'7;{SIDES[1]}\n8;Class, 3\n')
    val = write(tmp_path / 'something-something-v1-validation.csv', f'8;{SIDES[0]}\n')
    assert read_both('something_v1', root, train, val, labels) == ([1, 5], [0])
    train = write(tmp_path / 'train.txt', '7 6 1\n8 6 5\n')  # path, frames, label
    assert read_both('something_v1', root, train, val, labels) == ([1, 5], [0])


def test_ucf101_as_files_and_as_the_folder_of_split_files(place, tmp_path):
    place('ApplyEyeMakeup/v_A_g08.avi', 'Archery/v_B_g01.avi')
    folder = tmp_path / 'ucfTrainTestlist'
    names = ['ApplyEyeMakeup', 'Archery', *(f'Class{k}' for k in range(99))]
    label_map = write(
        folder / 'classInd.txt', ''.join(f'{k} {name}\n' for k, name in enumerate(names, 1))
    )
    train = write(folder / 'trainlist02.txt', 'ApplyEyeMakeup/v_A_g08.avi 1\n')
    val = write(folder / 'testlist02.txt', 'Archery/v_B_g01.avi\n')
    assert read_both('ucf101', tmp_path, train, val, label_map) == ([0], [1])
    chosen = {'train_subset': 'train2', 'val_subset': 'test2'}
    assert read_both('ucf101', tmp_path, folder, folder, **chosen) == ([0], [1])
    with pytest.raises(ValueError, match=r"train1' \(data\.train_subset\).*is one split"):
        read_both('ucf101', tmp_path, train, val, label_map, train_subset='train1')


def test_hmdb51_as_the_folder_of_split_files(place, tmp_path):
    place('videos/brush_hair/a.avi', 'videos/brush_hair/b.avi', 'videos/class_7/c.avi')
    splits = tmp_path / 'splits'
    for k in range(50):
        write(splits / f'class_{k}_test_split1.txt', 'c.avi 0\n' if k != 7 else 'c.avi 1\n')
    write(splits / 'brush_hair_test_split1.txt', 'a.avi 1\nb.avi 2\n')
    names = names_file(tmp_path, 51, ('brush_hair', *(f'class_{k}' for k in range(50))))
    root = tmp_path / 'videos'
    chosen = {'train_subset': 'train1', 'val_subset': 'test1'}
    assert read_both('hmdb51', root, splits, splits, names, **chosen) == ([0, 8], [0])
    assert read_both('hmdb51', root, splits, splits, names) == ([0, 8], [0])


def test_epic_kitchens_with_two_label_maps(place, tmp_path):
    place('P01/videos/P01_01.MP4')
    maps = [
        write(tmp_path / f'{what}.csv', 'id,key\n' + ''.join(f'{k},{what}{k}\n' for k in range(n)))
        for what, n in (('verb', 97), ('noun', 300))
    ]
    lists = [
        write(
            tmp_path / f'EPIC_100_{split}.csv',
            'narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb_class,'
            f'noun_class\nP01_01_0,P01,P01_01,00:00:00.00,00:00:00.20,3,{noun}\n',
        )
        for split, noun in (('train', 10), ('validation', 11))
    ]
    found = read_both('epic_kitchens', tmp_path, *lists, ','.join(map(str, maps)))
    assert found == ([(3, 10)], [(3, 11)])


def test_imagenet_folders(tmp_path):
    for split in ('train', 'val'):
        for k in range(1000):
            (tmp_path / split / f'n{k:08d}').mkdir(parents=True)
        cv2.imwrite(str(tmp_path / split / 'n00000007/x.JPEG'), pictures(1)[0])
    found = read_both('imagenet1k', '', tmp_path / 'train', tmp_path / 'val')
    assert found == ([7], [7])


def test_custom_lists_of_all_kinds(place, tmp_path):
    place('a.mp4', 'sub/b.mp4', 'folders/run/c.mp4', 'folders/jump/d.3gp')
    entries = [{'path': 'a.mp4', 'label': 0}, {'path': 'sub/b.mp4', 'label': 1}]
    for name, text in {
        'list.txt': 'a.mp4 0\nsub/b.mp4 1\n',
        'list.csv': 'a.mp4,0\nsub/b.mp4,1\n',
        'header.csv': 'path,num_frames,label\na.mp4,8,0\nsub/b.mp4,8,1\n',
        'list.json': json.dumps(entries),
        'list.jsonl': '\n'.join(map(json.dumps, entries)),
    }.items():
        path = write(tmp_path / name, text)
        assert read_both('custom', tmp_path, path, path) == ([0, 1], [0, 1])
    folder = tmp_path / 'folders'
    assert read_both('custom', '', folder, folder) == ([0, 1], [0, 1])
    splits = write(tmp_path / 'all.csv', 'path,label,split\na.mp4,0,train\nsub/b.mp4,0,val\n')
    assert read_both('custom', tmp_path, splits, splits) == ([0], [0])


def test_class_folders_with_files_of_many_containers(tmp_path):
    codecs = {'wmv': 'wmv2', '3gp': 'libx264', 'mts': 'libx264', 'VOB': 'mpeg2video'}
    codecs |= {'f4v': 'libx264', 'mxf': 'mpeg2video', 'm2v': 'mpeg2video', 'nut': 'mpeg4'}
    folder = tmp_path / 'videos'
    (folder / 'run').mkdir(parents=True)
    for suffix, codec in codecs.items():
        write_video(folder / 'run' / f'a.{suffix}', pictures(8), codec)
    assert read_both('custom', '', folder, folder) == ([0] * len(codecs), [0] * len(codecs))


def test_the_format_may_be_set(place, tmp_path):
    place('Run/a.avi')
    names = write(tmp_path / 'classInd.txt', '1 Run\n')
    path = write(tmp_path / 'list.txt', 'Run/a.avi 1\n')
    found = read_both('custom', tmp_path, path, path, names, list_format='ucf101')
    assert found == ([0], [0])


def test_a_built_set_without_a_named_split(video, tmp_path):
    write(tmp_path / 'train.txt', f'{video} 0\n')
    write(tmp_path / 'test.txt', f'{video} 1\n')
    write(tmp_path / 'names.txt', 'run\njump\n')
    words = ['custom', '--list', f'train={tmp_path}/train.txt', f'test={tmp_path}/test.txt']
    words += ['--label_map', f'{tmp_path}/names.txt', '--videos', str(video.parent)]
    assert build.main([*words, '--out', f'{tmp_path}/built', '--workers', '0']) == 0
    assert len(BuiltSplit(tmp_path / 'built', 'train')) == 1
    built = tmp_path / 'built'
    assert read_both('custom', '', built, built) == ([0], [1])
