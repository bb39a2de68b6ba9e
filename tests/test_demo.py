"""The demo from start to end at a tiny size: figures, pictures, and that it goes on."""

import json
import shutil

import cv2
import pytest

from dist_jax import demo, filmstrips
from dist_jax.metric_writer import read_metrics
from dist_jax.reports import console, page

STEPS = 2


class Killed(BaseException):
    """Nothing catches it."""


def killed_at(workdir, *place):
    """Runs the demo up to the first call of a function; the rest of it never happens."""

    def die(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(Killed):
            demo.run_demo(str(workdir), STEPS)


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
    """(workdir, summary) of a demo that died in each of its parts and was started again."""
    workdir = tmp_path_factory.mktemp('demo') / 'run'
    shutil.copytree(clips, workdir / 'data')
    killed_at(workdir, page, 'write_report')  # the baseline is trained, and has no report
    killed_at(workdir, filmstrips, 'tell')  # DiST is trained, and has none
    killed_at(workdir, filmstrips, 'draw')
    return workdir, demo.run_demo(str(workdir), STEPS)


def test_summary_has_what_was_compared(finished):
    workdir, summary = finished
    stored = json.loads((workdir / 'summary.json').read_text())
    assert stored == json.loads(json.dumps(summary))
    assert stored['step'] == stored['total_steps'] == STEPS and not stored['interrupted']
    for name in ('val_top1', 'frame_only_top1'):
        assert 0 <= stored[name] <= 1
    assert stored['chance'] == 1 / 8 and stored['seconds'] > 0


def test_what_was_done_before_a_kill_is_not_done_again(finished):
    workdir, _ = finished
    for run in (workdir, workdir / 'frame_only'):
        steps = [row['step'] for row in read_metrics(run / 'metrics.jsonl') if 'loss' in row]
        assert steps == [STEPS]
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
