"""The demo from start to end at a tiny size: figures, pictures, and that it goes on."""

import json
import shutil

import cv2
import pytest

from dist_jax import backbones, demo, filmstrips, train
from dist_jax.metric_writer import read_metrics
from dist_jax.reports import console, page

STEPS = 2
# Fields of a demo that is done at once.
SMALL = {
    'backbone.name': 'tiny',
    'data.num_frames': 4,
    'batch_size': 4,
    'eval.batch_size': 10,
    'log.tensorboard': False,
}
# The end of the baseline's run.
BASELINE = {'interrupted': False, 'val_top1': 0.25, 'seconds': 1.0, 'num_classes': [8]}


class Killed(BaseException):
    """Nothing catches it."""


def die(*_):
    raise Killed


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
    """(workdir, summary) of a demo that died before its last picture and was started again."""
    workdir = tmp_path_factory.mktemp('demo') / 'run'
    shutil.copytree(clips, workdir / 'data')
    backbone = str(workdir / 'backbone')
    backbones.write_random(backbone, 'tiny')
    with pytest.MonkeyPatch.context() as patch:
        for fields in (demo.MOTION, demo.LOOKS):
            for name, value in (SMALL | {'backbone.checkpoint': backbone}).items():
                patch.setitem(fields, name, value)
        patch.setitem(demo.LOOKS_FILES, 'num_val', 10)
        patch.setitem(demo.DIST, 'model.selected_layers', ())
        # It is trained as DiST is, and pages have tests of their own.
        patch.setattr(
            demo, 'train', lambda c, w, *rest: train.train(c, w, *rest) if rest else BASELINE
        )
        patch.setattr(page, 'png', lambda *_: b'')
        patch.setattr(page, 'write_evaluation', lambda *_: None)
        with patch.context() as again, pytest.raises(Killed):
            again.setattr(filmstrips, 'tell', die)
            demo.run_demo(str(workdir), STEPS)
        assert not (workdir / 'report.html').exists()
        return workdir, demo.run_demo(str(workdir), STEPS)


def test_summary_has_what_was_compared(finished):
    workdir, summary = finished
    stored = json.loads((workdir / 'summary.json').read_text())
    assert stored == json.loads(json.dumps(summary))
    assert stored['step'] == stored['total_steps'] == STEPS and not stored['interrupted']
    assert stored['frame_only_top1'] == BASELINE['val_top1']
    assert all(0 <= stored[name] <= 1 for name in ('val_top1', 'zero_shot_top1'))
    assert stored['chance'] == 1 / 8 and stored['zero_shot_chance'] == 1 / 30
    assert stored['seconds'] > 0
    alone = json.loads((workdir / 'zero_shot' / 'evaluation.json').read_text())
    assert alone['top1'] == stored['zero_shot_top1']


def test_what_was_done_before_a_kill_is_not_done_again(finished):
    workdir, _ = finished
    steps = [row['step'] for row in read_metrics(workdir / 'metrics.jsonl') if 'loss' in row]
    assert steps == list(range(1, STEPS + 1))
    assert json.loads((workdir / 'config.json').read_text())['model']['head'] == 'text'


def test_strips_are_a_file_and_in_the_report(finished):
    workdir, _ = finished
    sheet = cv2.imread(str(workdir / demo.FILMSTRIPS))
    assert sheet.shape[1] > 1000 and sheet.std() > 5
    report = (workdir / 'report.html').read_text()
    assert 'What DiST says of six clips' in report and 'true: moves right, then down' in report


def test_console_compares_and_says_where_the_pictures_are(finished, capsys):
    workdir, summary = finished
    console.print_comparison(workdir, summary, demo.comparison(summary), demo.FILES)
    out = capsys.readouterr().out
    assert all(f'{workdir / name}  ' in out for name in demo.FILES)
    for words in ('DiST', 'frame-only', 'zero-shot', '12.50 %'):
        assert words in out
    stopped = summary | {'interrupted': True}
    console.print_comparison(workdir, stopped, demo.comparison(stopped), demo.FILES)
    out = capsys.readouterr().out
    assert 'The same command continues' in out and 'DiST' not in out
