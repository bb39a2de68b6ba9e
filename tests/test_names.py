"""Names as disks hold them, from class folders through a run to its lists and reports."""

import json
import os
import shutil

import pytest

from dist_jax import main
from input_pipeline import motion_clips
from input_pipeline.sources import open_source

CLASSES = [b'caf\xe9', b'a\\[/b] :smile:', b'=1+1', b'\x1b[31m$x^2$']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Class folders train and val; one video of val cannot be read."""
    root = tmp_path_factory.mktemp('names')
    motion_clips.generate(root / 'clips', num_train=8, num_val=4, size=48, num_frames=8)
    for split in ('train', 'val'):
        source = open_source(root / f'clips/{split}.txt', label_map=root / 'clips/labels.txt')
        for i in range(len(source)):
            name = CLASSES[i % 4].replace(b'/', b'')
            target = os.path.join(os.fsencode(root / split), name)
            os.makedirs(target, exist_ok=True)
            shutil.copy(source[i].path, os.path.join(target, b'\xff[red]%d.mp4' % i))
    with open(os.path.join(target, b'bro\xe9ken.mp4'), 'wb') as file:
        file.write(b'no video')
    return root


def test_any_name_goes_through_training_evaluation_and_prediction(folder, capfd):
    run = f'--workdir={folder}/run'
    assert (
        main.main(
            [
                'train',
                run,
                '--config=configs/frame_mean.py:demo',
                '--config.data.name=custom',
                f'--config.data.train_list={folder}/train',
                f'--config.data.val_list={folder}/val',
                '--config.data.num_frames=4',
                '--config.batch_size=8',
                '--config.eval.batch_size=8',
                '--config.num_steps=1',
                '--config.eval.allow_bad_videos=true',
            ]
        )
        == 0
    )
    assert main.main(['evaluate', run, f'--output={folder}/result']) == 0
    arguments = [f'--output={folder}/pictures', f'--json={folder}/top5.json', f'{folder}/val']
    assert main.main(['predict', run, *arguments]) == 1  # one is unreadable
    assert main.main(['check', f'--list={folder}/val', f'--report={folder}/bad.jsonl']) == 1

    said = ''.join(capfd.readouterr())
    assert r'caf\xe9' in said and r'bro\xe9ken.mp4' in said and r'\xff[red]' in said
    assert '\x1b' not in said
    for page in ('run/report.html', 'result/evaluation.html', 'result/per_class.csv'):
        text = (folder / page).read_bytes().decode()
        assert r'caf\xe9' in text and '\x1b' not in text
    # JSON gives back names that open the files.
    figures = json.loads((folder / 'result/evaluation.json').read_bytes())
    names = {row['name'] for row in figures['per_class'][0]}
    assert names == {os.fsdecode(name.replace(b'/', b'')) for name in CLASSES}
    rows = json.loads((folder / 'top5.json').read_bytes())
    assert len(rows) == 5 and all(os.path.exists(row['path']) for row in rows)
    assert sum(os.path.exists(row['picture']) for row in rows) == 4
    (bad,) = map(json.loads, (folder / 'bad.jsonl').read_bytes().splitlines())
    assert os.path.exists(bad['path'])


def test_any_name_goes_into_a_built_data_set(folder, capfd):
    from dist_jax.dataset import build, inspect
    from input_pipeline.records import BuiltSplit

    out = folder / 'built'
    words = ['custom', '--list', f'train={folder}/val', '--videos', '/', '--out', str(out)]
    assert build.main([*words, '--workers', '0']) == 0
    assert inspect.main([str(out), '--videos', '1']) == 0
    assert '\x1b' not in ''.join(capfd.readouterr())
    assert r'bro\xe9ken.mp4' in (out / 'report.txt').read_text()
    built, listed = BuiltSplit(out, 'train'), open_source(folder / 'train')
    assert built.class_names == listed.class_names
    assert len(list((out / 'inspection/train').iterdir())) == 4
