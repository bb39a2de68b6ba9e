"""Predictions agree with the evaluation, and need the run and the backbone only."""

import dataclasses
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import text_run

from dist_jax import main, predict, recipe, step, trained
from dist_jax.sharding import gather_rows, make_mesh
from dist_jax.video_model import Prediction, VideoModel
from dist_jax.views import Views


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, videos, scores of the evaluation); the data folder that trained it is gone."""
    folder = tmp_path_factory.mktemp('predict')
    data, workdir = text_run.train_in(folder, num_val=3)

    mesh = make_mesh()
    saved = trained.saved_config(workdir)
    with saved.unlocked():
        saved.data.val_list = 'val.txt'
    source = recipe.open_split(saved, 'val')
    found = trained.load_trained(saved, workdir, None)
    eval_step = step.make_eval_step(found.model, found.task, mesh)
    protocol = recipe.eval_protocol(saved)
    views = Views(eval_step, found.variables, found.frozen, source, protocol, mesh)
    (scores,) = gather_rows(list(views))['scores']
    videos = folder / 'videos'
    videos.mkdir()
    paths = []
    for i in range(len(source)):
        paths.append(str(shutil.copy(source[i].path, videos / f'clip {i}.mp4')))
    shutil.rmtree(data)
    return workdir, paths, scores


@pytest.fixture
def console(monkeypatch):
    """Runs a command as the console does, where config flags look at the process's arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['dist_jax', *arguments])
        return main.main()

    return call


def test_scores_equal_those_of_the_evaluation(run):
    workdir, paths, scores = run
    config = trained.saved_config(workdir)
    model = trained.load_trained(config, workdir, None)
    found = list(VideoModel(model, config).predict_all(paths))
    assert [prediction.path for prediction in found] == paths
    for prediction, expected in zip(found, scores):
        np.testing.assert_allclose(prediction.scores[0], expected, atol=1e-6)
        assert prediction.video.shape == (2, 4, 48, 48, 3)
        (ranking,) = prediction.top
        assert ranking[0][0] == model.task.labels[0][int(expected.argmax())]
        shares = [share for _, share in ranking]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True)
    assert np.ptp(scores, axis=0).max() > 1e-4  # the videos are told apart at all


def test_command_goes_on_after_an_unreadable_video(run, tmp_path, console, capsys):
    workdir, paths, scores = run
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(b'nothing')
    report = tmp_path / 'new' / 'top5.json'
    output = tmp_path / 'pictures'
    arguments = [f'--workdir={workdir}', f'--output={output}', f'--json={report}']
    code = console('predict', *arguments, paths[0], str(broken), paths[1])
    assert code == 1
    out = capsys.readouterr().out
    assert 'cannot be read' in out and 'not a video' in out
    rows = json.loads(report.read_text())
    assert [bool(row['error']) for row in rows] == [False, True, False]
    assert rows[1]['top'] == [] and rows[1]['picture'] == ''
    for row, expected in ((rows[0], scores[0]), (rows[2], scores[1])):
        assert row['top'][0][0]['probability'] == pytest.approx(expected.max(), abs=1e-6)
        assert row['top'][0][0]['label'] in out
        sheet = cv2.imread(row['picture'])
        assert sheet.shape[1] > 800 and sheet.std() > 5
    assert sorted(file.name for file in output.iterdir()) == ['clip 0.png', 'clip 1.png']


def test_scores_that_are_no_numbers_are_an_error_of_the_video(
    run, tmp_path, console, capsys, monkeypatch
):
    workdir, paths, _ = run
    make_eval_step = step.make_eval_step

    def spoiled(*arguments):
        inner = make_eval_step(*arguments)
        calls = []

        def eval_step(*arguments):
            calls.append(1)
            scores = inner(*arguments)['scores']
            if len(calls) == 1:
                scores = tuple(np.full_like(s, np.nan) for s in scores)
            return {'scores': scores}

        return eval_step

    monkeypatch.setattr(step, 'make_eval_step', spoiled)
    report = tmp_path / 'top5.json'
    arguments = [f'--workdir={workdir}', f'--output={tmp_path}', f'--json={report}']
    assert console('predict', *arguments, *paths[:2]) == 1
    assert 'NaN' not in report.read_text()
    bad, good = json.loads(report.read_text())
    assert bad['path'] == paths[0] and bad['top'] == [] and bad['picture'] == ''
    assert 'not finite' in bad['error'] and 'damaged weights' in bad['error']
    assert not good['error'] and len(good['top'][0]) == 5
    assert 'not finite' in capsys.readouterr().out


def test_other_labels_can_be_asked_for(run, tmp_path, console):
    workdir, paths, _ = run
    labels, report = tmp_path / 'labels.txt', tmp_path / 'top.json'
    labels.write_text('running\nwalking\n')
    code = console(
        'predict',
        f'--workdir={workdir}',
        f'--labels={labels}',
        f'--json={report}',
        '--config.eval.num_clips=1',
        '--config.eval.fusion=0.5',
        paths[0],
    )
    assert code == 0
    (row,) = json.loads(report.read_text())
    assert row['picture'] == f'{workdir}/predictions/clip 0.png'
    (ranking,) = row['top']
    assert {entry['label'] for entry in ranking} == {'running', 'walking'}
    assert sum(entry['probability'] for entry in ranking) == pytest.approx(1)


def test_attention_is_of_the_frames_that_the_model_got(run):
    workdir, paths, scores = run
    config = trained.saved_config(workdir)
    own = trained.load_trained(config, workdir, None)
    found = list(VideoModel(own, config).predict_all(paths[:2], attention=True))
    assert all(prediction.attention.shape == (2, 2, 6, 6) for prediction in found)
    for prediction, expected in zip(found, scores):
        np.testing.assert_allclose(prediction.scores[0], expected, atol=1e-6)
        video = own.model.normalize(prediction.video)
        maps = own.model.attention(own.variables, own.model.inputs(own.frozen, {'video': video}))
        np.testing.assert_allclose(prediction.attention, maps, atol=1e-6)
        total = prediction.attention.sum((1, 2, 3))
        assert prediction.attention.min() >= 0 and 0.5 < total.min() <= total.max() <= 1
    blind = dataclasses.replace(own, model=dataclasses.replace(own.model, attention=None))
    with pytest.raises(ValueError, match='without --attention'):
        VideoModel(blind, config).predict_all(paths, attention=True)


def test_attention_is_drawn_as_a_sheet_and_an_animation(run, tmp_path, console, capsys):
    workdir, paths, _ = run
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(b'nothing')
    output, report = tmp_path / 'pictures', tmp_path / 'top.json'
    arguments = [f'--workdir={workdir}', f'--output={output}', f'--json={report}', '--attention']
    assert console('predict', *arguments, paths[0], str(broken), paths[1]) == 1
    out = capsys.readouterr().out
    assert f'{output}/*-attention.png' in out and f'{output}/*-attention.gif' in out
    first, unreadable, _ = json.loads(report.read_text())
    assert first['attention'] == f'{output}/clip 0-attention.png'
    assert first['attention_animation'] == f'{output}/clip 0-attention.gif'
    assert unreadable['attention'] == unreadable['attention_animation'] == ''
    endings = ('-attention.gif', '-attention.png', '.png')
    expected = sorted(f'clip {i}{ending}' for i in range(2) for ending in endings)
    assert sorted(file.name for file in output.iterdir()) == expected
    assert cv2.imread(first['attention']).shape[1] > 800


def test_missing_run_is_named(tmp_path, capsys):
    assert main.main(['predict', f'--workdir={tmp_path / "none"}', 'a.mp4']) in (1, 2)
    assert 'none' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('option', 'text'), [('--json=D', 'D is a folder; name a file'), ('--output=F', 'F is a file;')]
)
def test_places_that_cannot_be_written_are_said_before_the_work(
    option, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run/checkpoints').mkdir(parents=True)
    (tmp_path / 'D').mkdir()
    (tmp_path / 'F').touch()
    assert main.main(['predict', '--workdir=run', option, 'F']) == 2
    assert text in capsys.readouterr().err


def test_pictures_of_one_name_say_their_folder():
    paths = ['open/x.mp4', 'close/x.mp4', 'y.mp4', '/k/train/a/z.mp4', '/k/val/a/z.mp4']
    expected = ['open-x', 'close-x', 'y', 'train-a-z', 'val-a-z']
    assert predict.picture_stems(paths, ['.png']) == expected


def test_two_videos_of_one_name_in_one_folder_get_two_pictures():
    paths = ['x.mp4', 'x.avi', 'x-2.mp4']
    assert predict.picture_stems(paths, ['.png']) == ['x', 'x-2', 'x-2-2']
    # One video's second picture is not another's first.
    endings = ['.png', '-attention.png']
    stems = predict.picture_stems(['x.mp4', 'x-attention.mp4', 'x.avi'], endings)
    assert stems == ['x', 'x-attention-2', 'x-2']
    names = [stem + ending for stem in stems for ending in endings]
    assert len(set(names)) == len(names)


def test_sheet_takes_any_views_frames_and_heads(tmp_path):
    rng = np.random.default_rng(0)
    ranking = tuple((f'$label {i}$ ' + 'long ' * 30, 0.2) for i in range(5))
    for views, frames, columns in ((1, 1, 1), (3, 33, 2)):
        video = rng.integers(0, 255, (views, frames, 32, 32, 3), np.uint8)
        path = tmp_path / f'{frames}.png'
        predict.write_contact_sheet(path, Prediction('v.mp4', (ranking,) * columns, (), video))
        assert cv2.imread(str(path)).shape[1] > 800
