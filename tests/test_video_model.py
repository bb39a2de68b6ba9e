"""Models in Python: the numbers of the commands, from files and from arrays."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_run

import dist_jax
from dist_jax import convert, evaluate, trained
from dist_jax.configs import dist as dist_config
from input_pipeline.decode import DecodeError, VideoReader


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, videos, accuracy of the evaluation, labels of the videos)."""
    folder = tmp_path_factory.mktemp('video_model')
    data, workdir = text_run.train_in(folder, num_val=4, val_list='val.txt')
    lines = [line.split() for line in (data / 'val.txt').read_text().splitlines()]
    figures, _ = evaluate.run(trained.saved_config(workdir), workdir, None, str(folder))
    paths, labels = zip(*((str(data / name), int(label)) for name, label in lines))
    return workdir, paths, labels, figures


@pytest.fixture(scope='module')
def model(run):
    return dist_jax.load(run[0])


def frames_of(path):
    with VideoReader(path) as reader:
        return reader.frames(np.arange(reader.num_frames))


def test_files_and_frames_have_the_scores_of_the_evaluation(run, model):
    _, paths, labels, figures = run
    predictions = [model.predict(path, most=3) for path in paths]
    scores = np.stack([prediction.scores[0] for prediction in predictions])
    assert np.ptp(scores, axis=0).max() > 1e-4
    assert (scores.argmax(1) == labels).mean() == pytest.approx(figures['top1'])
    for prediction, score in zip(predictions, scores):
        (((best, share), *_),) = prediction.top
        assert len(prediction.top[0]) == 3
        assert (best, share) == (model.labels[0][score.argmax()], score.max())
    clips = np.stack([frames_of(path) for path in paths])
    np.testing.assert_allclose(model.score(clips), scores, atol=1e-6)
    np.testing.assert_allclose(model.score(clips[0]), scores[0], atol=1e-6)
    np.testing.assert_allclose(model.score(paths[0]), scores[0], atol=1e-6)
    assert model.predict(clips[1]).path == ''
    # As many frames as a clip has are the clip, larger ones are cut to its size.
    seen = model.views(np.pad(clips[0, :4], ((0, 0), (0, 0), (8, 8), (0, 0))))
    np.testing.assert_array_equal(seen, np.stack([clips[0, :4]] * 2))


def test_embeddings_are_those_that_the_head_reads(run, model):
    _, paths, *_ = run
    clips = np.stack([frames_of(path) for path in paths[:3]])
    found = model.embed(clips)
    assert found.shape == (3, model.embed(paths[0]).size) and found.dtype == np.float32
    np.testing.assert_allclose(model.embed(paths[2]), found[2], atol=1e-5)
    views = model.views(paths[0])
    assert views.shape == (2, model.num_frames, model.image_size, model.image_size, 3)
    outputs = jax.jit(model.apply)(model.variables, views)
    np.testing.assert_allclose(outputs['embedding'].mean(0), found[0], atol=1e-5)
    shares = jax.nn.softmax(outputs['logits'][0]).mean(0)
    np.testing.assert_allclose(shares, model.score(paths[0]), atol=1e-6)
    # Pixels may be of any dtype: gradients flow to them.
    total = lambda clips: model.apply(model.variables, clips)['embedding'].sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(jnp.asarray(views, jnp.float32))
    assert float(jnp.abs(gradient).max()) > 0


def test_a_text_head_takes_other_classes(run, model):
    _, paths, *_ = run
    own = list(model.labels[0])
    backwards = model.score(paths[0], labels=own[::-1])
    np.testing.assert_allclose(backwards[::-1], model.score(paths[0]), atol=1e-6)
    other = dist_jax.load(run[0], labels=['running', 'walking'])
    assert other.labels == (('running', 'walking'),)
    np.testing.assert_allclose(
        model.score(paths[0], labels=['running', 'walking']), other.score(paths[0]), atol=1e-6
    )
    assert model.labels == (tuple(own),)


def test_converted_networks_and_backbones(run, model, tmp_path):
    workdir, paths, *_ = run
    convert.export(workdir, tmp_path / 'dist.safetensors')
    convert.convert(tmp_path / 'dist.safetensors', tmp_path / 'dist')
    backbone = f'{workdir}/backbone'
    again = dist_jax.load(
        tmp_path / 'dist',
        config=trained.saved_config(workdir),
        backbone=backbone,
        labels=model.labels[0],
    )
    np.testing.assert_allclose(again.score(paths[0]), model.score(paths[0]), atol=1e-6)
    size = {'data.num_frames': 2, 'model.dtype': 'float32', 'eval.num_clips': 1}
    plain = dist_jax.load(backbone, overrides=size)
    vector = plain.embed(paths[0])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) and plain.labels == ()
    with pytest.raises(ValueError, match='labels='):
        plain.predict(paths[0])
    told = dist_jax.load(backbone, labels=['running', 'walking'], overrides=size)
    assert told.score(paths[0]).sum() == pytest.approx(1)


def test_wrong_calls_say_what_to_do(run, model, tmp_path):
    workdir, paths, *_ = run
    (tmp_path / 'broken.mp4').write_bytes(b'nothing')
    with pytest.raises(DecodeError, match='not a video'):
        model.predict(tmp_path / 'broken.mp4')
    good, bad = model.predict_all([paths[0], tmp_path / 'broken.mp4'])
    assert good.scores and 'not a video' in bad.error and json.dumps(bad.summary())
    for wrong, text in (
        (np.zeros((4, 48, 48, 3)), 'uint8 RGB, at least one; these are'),
        (np.zeros((4, 48, 48), np.uint8), r'these are \(4, 48, 48\)'),
        (np.zeros((0, 48, 48, 3), np.uint8), 'at least one'),
        (np.zeros((0, 4, 48, 48, 3), np.uint8), 'no video'),
    ):
        with pytest.raises(ValueError, match=text):
            model.embed(wrong)
    frames = np.zeros((9, 48, 48, 3), np.uint8)
    for fps in (0, -1.0, float('nan'), float('inf'), '30', None):
        with pytest.raises(ValueError, match=r'fps=.* must be frames a second'):
            model.score(frames, fps=fps)
    for most in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match=f'most={most} must be a whole number'):
            model.predict(frames, most)
        with pytest.raises(ValueError, match=f'most={most}'):
            model.predict_windows('nowhere.mp4', most=most)
    for labels, text in (
        ('running', 'pass a list'),
        ([], 'at least one'),
        (['a', 3], 'are texts'),
        (['a', 'b', 'a'], "'a' twice"),
    ):
        with pytest.raises(ValueError, match=text):
            model.score(paths[0], labels=labels)
    for call, text in (
        ({'config': dist_config.get_config('demo')}, 'own config'),
        (
            {'overrides': {'eval.num_clip': 2}},
            'no field .*num_clip.; did you mean eval.num_clips.*configs/base.py',
        ),
        ({'overrides': {'eval.num_clips': 'many'}}, 'many'),
        ({'step': 77}, '77'),
    ):
        with pytest.raises(ValueError, match=text):
            dist_jax.load(workdir, **call)
    with pytest.raises((ValueError, FileNotFoundError), match='none'):
        dist_jax.load(tmp_path / 'none')
    for near in (os.path.dirname(workdir), os.path.join(workdir, 'checkpoints')):
        with pytest.raises(ValueError, match=f'neither a run .* did you mean {workdir}'):
            dist_jax.load(near)


def test_import_is_light():
    code = 'import sys, dist_jax; dir(dist_jax); print(sorted({"jax", "numpy"} & set(sys.modules)))'
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == '[]'
