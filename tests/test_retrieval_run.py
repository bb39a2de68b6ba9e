"""Retrieval through the commands: train, stop, continue, evaluate, export, convert."""

import json
import shutil
from pathlib import Path

import pytest

from dist_jax import main
from dist_jax.metric_writer import read_metrics
from input_pipeline import motion_captions

STEPS, VIDEOS, WORDINGS = 4, 6, motion_captions.NUM_WORDINGS
CONFIG = '--config=configs/side4video_retrieval.py:demo'


@pytest.fixture(scope='module', autouse=True)
def without_reports():
    """Other tests show those of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Clips with sentences; of the lists `broken_*.jsonl` one more video is no video."""
    folder = tmp_path_factory.mktemp('captions') / 'data'
    motion_captions.generate(folder, num_train=7, num_val=VIDEOS, size=48, num_frames=8)
    (folder / 'broken.mp4').write_bytes(b'no video')
    for split in ('train', 'val'):
        lines = (folder / f'{split}.jsonl').read_text().splitlines()
        more = {'path': 'broken.mp4', 'captions': ['a', 'broken', 'video', 'moves']}
        lines.insert(2, json.dumps(more))
        (folder / f'broken_{split}.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture(scope='module')
def arguments(data):
    """Of `train`, but for the workdir: an epoch is all steps, two evaluations."""
    fields = {
        'data.root': data,
        'data.train_list': 'broken_train.jsonl',
        'data.val_list': 'broken_val.jsonl',
        'data.num_frames': 3,
        'data.max_bad_share': 0.2,
        'model.unroll': False,
        'batch_size': 8,
        'num_steps': STEPS,
        'eval.batch_size': 4,
        'eval.every_epochs': 0.5,
        'checkpoint.every_steps': 0,
        'checkpoint.keep': 2,
        'log.every_steps': 1,
        'log.tensorboard': False,
    }
    return [CONFIG, *(f'--config.{name}={value}' for name, value in fields.items())]


@pytest.fixture(scope='module')
def run(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('retrieval') / 'run'
    assert main.main(['train', f'--workdir={workdir}', *arguments]) == 0
    return workdir


def read(path):
    return json.loads(path.read_text())


def evaluate(folder, *options):
    assert main.main(['evaluate', f'--output={folder}', *options]) == 0
    return read(folder / 'evaluation.json')


def recalls(figures, start=''):
    """What retrieval found, without counts."""
    names = ('r1', 'r5', 'r10', 'median_rank', 'mean_rank')
    return [figures[f'{start}{way}_{name}'] for way in ('t2v', 'v2t') for name in names]


def test_text_to_video_recall_selects_and_unreadable_videos_count_nowhere(run):
    summary, rows = read(run / 'summary.json'), read_metrics(run / 'metrics.jsonl')
    found = {row['step']: row['val_t2v_r1'] for row in rows if 'val_t2v_r1' in row}
    assert found.keys() == {STEPS // 2, STEPS}
    assert summary['val_t2v_r1'] == found[STEPS]
    assert summary['best_val_t2v_r1'] == max(found.values()) == found[summary['best_step']]
    assert (run / 'checkpoints' / str(summary['best_step'])).exists()
    assert summary['val_num_bad_videos'] == 1
    named = (run / 'bad_videos.jsonl').read_text().splitlines()
    assert {Path(json.loads(line)['path']).name for line in named} == {'broken.mp4'}
    assert summary['val_num_videos'] == VIDEOS
    assert summary['val_num_sentences'] == VIDEOS * WORDINGS
    assert summary['val_num_skipped_sentences'] == WORDINGS
    # An epoch has a sample for each sentence, those of the unreadable video masked.
    clips = [row['clips'] for row in rows if 'loss' in row]
    assert sum(clips) == STEPS * 8 - WORDINGS


def test_an_evaluation_is_that_of_the_run_without_the_unreadable(run, tmp_path):
    figures = evaluate(tmp_path, f'--workdir={run}', '--config.data.val_list=val.jsonl')
    assert recalls(figures) == recalls(read(run / 'summary.json'), 'val_')
    assert (figures['num_videos'], figures['num_sentences']) == (VIDEOS, VIDEOS * WORDINGS)
    assert figures['num_skipped_sentences'] == figures['num_bad_videos'] == 0
    page = (tmp_path / 'evaluation.html').read_text()
    assert all(part in page for part in ('Recall', 'by chance', 'video to text', 'Ranks'))
    assert (tmp_path / 'retrieval.png').stat().st_size > 10_000
    assert len((tmp_path / 'ranks.csv').read_text().splitlines()) == 1 + VIDEOS * WORDINGS


def test_a_killed_run_ends_with_the_same_parameters(run, arguments, tmp_path):
    killed = tmp_path / 'run'
    # What SIGKILL in the third step would have left.
    shutil.copytree(run, killed)
    shutil.rmtree(killed / 'checkpoints' / str(STEPS))
    (killed / 'summary.json').unlink()
    assert main.main(['train', f'--workdir={killed}', *arguments]) == 0
    before, after = (read(workdir / 'summary.json') for workdir in (run, killed))
    assert after['params_sha256'] == before['params_sha256']
    assert recalls(after, 'val_') == recalls(before, 'val_')


def test_it_goes_out_with_its_backbone_and_comes_back(run, arguments, tmp_path):
    out, again = tmp_path / 'retrieval.safetensors', tmp_path / 'converted'
    assert main.main(['convert', '--export', '--with_backbone', str(run), str(out)]) == 0
    assert main.main(['convert', str(out), str(again), '--backbone', f'{run}/backbone']) == 0
    start = [f'--config.init_from={again}', f'--config.backbone.checkpoint={run}/backbone']
    given = [*arguments, *start, '--config.data.val_list=val.jsonl']
    figures = evaluate(tmp_path / 'figures', *given)
    assert recalls(figures) == recalls(read(run / 'summary.json'), 'val_')


@pytest.mark.parametrize(
    ('family', 'fields', 'message'),
    [
        (
            'side4video_retrieval',
            {'data.name': 'custom', 'data.train_list': 'train.txt', 'data.label_map': 'labels.txt'},
            "train.txt: has classes and no captions, and task.name='retrieve'",
        ),
        (
            'side4video_retrieval',
            {'task.name': 'classify', 'data.name': 'motion_clips'},
            "task.name='classify' has no option task.cdcr",
        ),
        ('side4video_retrieval', {'model.family': 'side4video'}, 'no option model.gradient_world'),
        ('side4video', {'task.name': 'retrieve'}, "task.name='retrieve' matches"),
    ],
)
def test_what_does_not_fit_is_named(clips, data, tmp_path, capsys, family, fields, message):
    root = data if 'model.family' in fields else clips
    given = [f'--config.{name}={value}' for name, value in ({'data.root': root} | fields).items()]
    command = ['train', f'--workdir={tmp_path}', f'--config=configs/{family}.py:demo', *given]
    assert main.main(command) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert message in said, said
