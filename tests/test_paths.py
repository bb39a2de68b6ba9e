"""What a command was given is looked for before jax is loaded."""

import pytest

from dist_jax import paths


def test_a_folder_stands_for_the_videos_in_it(tmp_path):
    for name in ('b/2.MP4', 'b/1.webm', 'a/3.avi', 'a/notes.txt', 'odd.bin', 'a/._3.avi'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'linked').symlink_to(tmp_path / 'a')  # the same folder: once
    odd = str(tmp_path / 'odd.bin')  # a file is taken whatever it is called
    found = [f'{tmp_path}/{name}' for name in ('a/3.avi', 'b/1.webm', 'b/2.MP4')]
    assert paths.find_videos([odd, str(tmp_path)]) == [odd, *found]
    (tmp_path / 'empty').mkdir()
    for name in ('empty/notes.txt', 'pictures/a.JPEG', 'pictures/b.txt', 'b/frame.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert paths.find_videos([f'{tmp_path}/pictures']) == [f'{tmp_path}/pictures/a.JPEG']
    assert paths.find_videos([f'{tmp_path}/b']) == found[1:]  # pictures beside videos are not meant
    with pytest.raises(ValueError, match='empty: no video and no picture in this folder'):
        paths.find_videos([str(tmp_path / 'empty')])
    with pytest.raises(ValueError, match=r'no file or folder x\.mp4, y'):
        paths.find_videos(['x.mp4', odd, 'y'])


def test_every_missing_input_is_named(tmp_path):
    (tmp_path / 'val.txt').touch()
    fields = {
        'data.root': str(tmp_path),
        'data.train_list': 'train.txt',
        'data.val_list': 'val.txt',
        'data.label_map': 'verbs.csv,val.txt',
        'backbone.checkpoint': 'gs://bucket/clip',
        'init_from': str(tmp_path / 'run'),
    }
    with pytest.raises(ValueError) as caught:
        paths.check_inputs(fields, ('train', 'val'))
    assert str(caught.value).splitlines() == [
        f'data.train_list: no file or folder {tmp_path}/train.txt',
        f'data.label_map: no file or folder {tmp_path}/verbs.csv',
        f'init_from: no file or folder {tmp_path}/run',
    ]
    # A list of an evaluation lies under the root of the saved run.
    paths.check_inputs({'data.val_list': 'val.txt'}, ('val',), str(tmp_path))


def test_what_is_no_run_is_said_with_the_way_out(tmp_path):
    (tmp_path / 'runs/mine/checkpoints').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    released = tmp_path / 'released'
    released.mkdir()
    for name in paths.RELEASE:
        (released / name).touch()
    for name in ('runs/mine', 'released', 'hf://me/mine', 'gs://bucket/run'):
        paths.check_model(name if '://' in name else str(tmp_path / name))
    for name, text in (
        ('none', f'no folder {tmp_path}/none; pass the folder of a run'),
        ('runs', f'runs is no run, .* did you mean {tmp_path}/runs/mine'),
        ('runs/mine/checkpoints', f'did you mean {tmp_path}/runs/mine'),
        ('empty', 'empty is no run, there are no checkpoints in it; pass the folder of a run'),
    ):
        for check in (paths.check_run, paths.check_model):
            with pytest.raises(ValueError, match=text):
                check(str(tmp_path / name))
    for name in (str(released), 'hf://me/mine'):
        with pytest.raises(ValueError, match=f'init_from: {name} is a release'):
            paths.check_inputs({'init_from': name}, ())
        with pytest.raises(ValueError, match='is a release, which evaluate, predict, export'):
            paths.check_run(name)


def test_built_in_clips_and_a_random_backbone_need_no_files():
    fields = {'data.name': 'motion_clips', 'data.train_list': '', 'data.val_list': ''}
    fields |= {'data.root': '/not/yet', 'backbone.checkpoint': 'random'}
    paths.check_training_inputs(fields)
