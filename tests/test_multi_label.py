"""Any number of classes a video: loss, mean average precision, runs, and what they say."""

import csv
import json

import classified
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dist_jax
from dist_jax import (
    evaluate,
    experiment,
    losses,
    metrics,
    mixup,
    predict,
    recipe,
    step,
    train,
    trained,
)
from dist_jax.configs import (
    attentive_probe,
    dist,
    evl,
    fine_tune,
    frame_mean,
    side4video,
    sts,
    zero_shot,
)
from dist_jax.reports import console, page
from dist_jax.sharding import make_mesh
from dist_jax.tasks.multi_label import MultiLabel
from dist_jax.tasks.multi_label_figures import multi_label_figures
from input_pipeline import motion_world
from input_pipeline.sources import open_source

NAMES = ('a', 'b', 'c', 'd')
TASK = MultiLabel((NAMES,), label_smoothing=0.1)


def formula(x, y):
    """Binary cross entropy with logits, as it is defined, and its gradient; float64."""
    p = 1 / (1 + np.exp(-x))
    return -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean(-1), (p - y) / x.shape[-1]


def test_loss_and_gradient_are_the_formula():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 2, (6, 4)), jnp.uint8)
    logits = rng.normal(0, 5, (6, 4))
    (targets,) = TASK.targets({'label': labels})
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets, 0.9 * np.asarray(labels) + 0.1 / 4, rtol=1e-6)
    with jax.enable_x64(True):
        wide, targets = jnp.asarray(logits), jnp.asarray(targets, jnp.float64)
        loss = lambda x: TASK.loss({'logits': (x,)}, (targets,), jnp.ones(6))  # noqa: E731
        found, gradient = loss(wide), jax.grad(lambda x: loss(x).sum())(wide)
        expected, expected_gradient = formula(logits, np.asarray(targets))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-15)
    narrow = TASK.loss({'logits': (jnp.asarray(logits, jnp.float32),)}, (targets,), jnp.ones(6))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_sure_logits_have_finite_losses(dtype):
    logits = jnp.array([[1e4, -1e4, 200.0, -200.0]], dtype)
    targets = (jnp.array([[0.0, 1.0, 1.0, 0.0]]),)
    loss = lambda x: TASK.loss({'logits': (x,)}, targets, jnp.ones(1))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(logits)
    assert 4000 < value < 6000 and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_mixed_clips_have_the_classes_of_both():
    labels = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], jnp.uint8)
    task = MultiLabel((NAMES,))
    targets = task.targets({'label': labels})
    video = jnp.zeros((4, 1, 8, 8, 3), jnp.uint8).at[2].set(200)
    for alphas in ((0.8, 0.0), (0.0, 1.0)):
        mask = jnp.array([1.0, 1.0, 1.0, 0.0])
        mixing = mixup.Mixing(*alphas)
        mixed, (found,) = mixup.mix(jax.random.key(1), video, targets, mask, mixing)
        share = float(mixed[1].mean()) / 200
        assert 0 < share < 1
        np.testing.assert_allclose(found[1], share * np.asarray(targets[0][2]), atol=1e-5)
        np.testing.assert_allclose(found[0], targets[0][0])  # its partner is not real


def by_definition(scores, labels):
    """The sum over thresholds of precision times recall gained."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        hits = (taken & labels).sum()
        total += hits / taken.sum() * (hits / labels.sum() - recall)
        recall = hits / labels.sum()
    return total


@pytest.mark.parametrize('levels', [0, 1, 2, 5])
def test_average_precision_is_its_definition(levels):
    rng = np.random.default_rng(levels)
    for size in (1, 2, 7, 40):
        scores = rng.integers(0, levels, size) if levels else rng.random(size)
        for share in (0.05, 0.4, 1.0):
            labels = rng.random(size) < share
            labels[rng.integers(size)] = True
            found = metrics.average_precision(scores.astype(np.float32), labels)
            assert found == pytest.approx(by_definition(scores.astype(np.float32), labels))
    assert np.isnan(metrics.average_precision(np.ones(3), np.zeros(3)))


def test_mean_average_precision_is_that_of_scikit_learn():
    """Recorded of average_precision_score of scikit-learn 1.9.1, macro and micro."""
    rng = np.random.default_rng(7)
    labels = np.arange(48).reshape(12, 4) % np.array([2, 3, 5, 7]) == 0
    for scores, per_class, macro, micro in (
        (
            rng.random((12, 4)),
            [1.0, 0.2784090909090909, 0.1625, 0.225],
            0.41647727272727275,
            0.39812928339332654,
        ),
        (
            rng.integers(0, 4, (12, 4)) / 4,
            [1.0, 0.30627705627705626, 0.3333333333333333, 0.20833333333333331],
            0.4619859307359307,
            0.42903656762352416,
        ),
    ):
        found = metrics.multi_label(scores, labels)
        np.testing.assert_allclose(found['per_class_average_precision'], per_class, rtol=1e-12)
        assert found['map'] == pytest.approx(macro, rel=1e-12)
        assert found['micro_map'] == pytest.approx(micro, rel=1e-12)
        constant = metrics.multi_label(np.zeros_like(scores), labels)
        assert constant['map'] == pytest.approx(found['chance'])


def test_classes_without_videos_are_left_out():
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = metrics.multi_label(np.eye(3), labels)
    assert found['map'] == 1 and np.isnan(found['per_class_average_precision'][2])
    assert found['chance'] == pytest.approx(1 / 3) and found['per_class_count'].tolist() == [
        1,
        1,
        0,
    ]
    for scores, labels, message in (
        (np.eye(3), np.zeros((3, 3)), 'none of the 3 videos has a class'),
        (np.full((3, 3), np.nan), np.eye(3), '3 of 3 videos have scores'),
    ):
        with pytest.raises(metrics.NonFiniteScoresError, match=message):
            metrics.multi_label(scores, labels)


@pytest.mark.parametrize('size', [3, 60])
def test_evaluation_has_page_picture_and_a_row_for_every_class(tmp_path, size, capsys):
    rng = np.random.default_rng(0)
    names = ('<script>x</script>', '=1+1', '$a$ [b]', *(f'class {k}' for k in range(size)))
    labels = rng.random((50, len(names))) < 0.2
    labels[:, 2] = False
    found = metrics.multi_label(rng.random(labels.shape), labels)
    figures = evaluate.with_videos(multi_label_figures(found, names, 50), 50, ())
    stored = classified.stored(figures)
    page.write_evaluation(tmp_path, stored, figures)
    assert cv2.imread(str(tmp_path / 'average_precision.png')).std() > 5
    text = (tmp_path / 'evaluation.html').read_text()
    assert '<script' not in text and '&lt;script&gt;' in text
    assert f'{100 * found["map"]:.2f} %' in text and 'mAP' in text
    with (tmp_path / 'per_class.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['name'] for row in rows][1] == "'=1+1" and len(rows) == len(names)
    for k, row in enumerate(rows):
        assert int(row['videos']) == found['per_class_count'][k]
        own = found['per_class_average_precision'][k]
        assert row['average_precision'] == ('' if k == 2 else f'{own:.6f}')
        detail = figures.details['per_class'][0][k]
        assert detail['videos'] == int(row['videos']) and detail['name'] == names[k]
    assert json.loads(json.dumps(figures.details))['per_class'][0][2]['average_precision'] is None
    console.print_evaluation(stored, figures)
    out = capsys.readouterr().out
    assert 'mAP' in out and 'weakest classes' in out and 'top-1' not in out
    assert '$a$ [b]' not in [row[0] for row in figures.brief[0].rows]  # without a video: not weak


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """Few clips of the built-in world."""
    folder = tmp_path_factory.mktemp('world') / 'clips'
    motion_world.generate(
        folder, num_train=16, num_val=6, num_test=1, num_new_looks=1, num_new_motions=1
    )
    return folder


def make_config(family, clips, **fields):
    config = family.get_config('world')
    config.update_from_flattened_dict(
        {
            'task.name': 'multi_label',
            'data.name': 'motion_world_attributes',
            'data.root': str(clips),
            'batch_size': 8,
            'num_steps': 2,
            'log.tensorboard': False,
        }
        | fields
    )
    return config


def test_the_built_in_list_says_all_that_is_true_of_a_clip(clips):
    source = open_source(clips / 'attributes_train.csv', label_map=clips / 'attributes_labels.txt')
    assert source.class_names == motion_world.ATTRIBUTES and len(set(source.class_names)) == 28
    looks = open_source(clips / 'looks_train.txt', label_map=clips / 'looks_labels.txt')
    motions = open_source(clips / 'motion_train.txt', label_map=clips / 'motion_labels.txt')
    for k in range(len(source)):
        own = {source.class_names[label] for label in source[k].label}
        assert own > set(looks.class_names[looks[k].label].split())
        words = motions.class_names[motions[k].label].removeprefix('moves ').split(', then ')
        assert all(any(name.endswith(word) for name in own) for word in words)
        assert len(own) == 3 + len(words) and source[k].path == motions[k].path
    (clips / 'attributes_val.csv').rename(clips / 'kept')
    arguments = {'num_train': 16, 'num_val': 6, 'num_test': 1}
    arguments |= {'num_new_looks': 1, 'num_new_motions': 1}
    assert not motion_world.generate(clips, **arguments)  # a folder of an earlier version
    assert (clips / 'attributes_val.csv').read_text() == (clips / 'kept').read_text()


FAMILIES = (attentive_probe, dist, evl, fine_tune, frame_mean, side4video, sts, zero_shot)


@pytest.mark.parametrize('family', FAMILIES, ids=lambda module: module.__name__.split('.')[-1])
def test_every_family_tells_any_number_of_classes(family):
    config = make_config(family, '')
    labels = (motion_world.ATTRIBUTES,)
    parts = experiment.assemble(config, labels, experiment.sized_backbone(config))
    batch = step.example_batch(parts.task, (2, *parts.train_shape))
    assert batch['label'].shape == (2, 28)
    variables = parts.abstract_variables()

    def loss(variables, frozen, batch):
        inputs = step.model_inputs(parts.model, parts.task, frozen, batch)
        outputs = parts.model.net.apply(variables, inputs)
        scores = parts.task.predict(outputs, 1)['scores'][0]
        return parts.task.loss(outputs, parts.task.targets(batch), batch['mask']), scores

    rows, scores = jax.eval_shape(loss, variables, parts.abstract_frozen(), batch)
    assert rows.shape == (2,) and scores.shape == (2, 28)


@pytest.fixture(scope='module')
def run(clips, tmp_path_factory):
    """(workdir, summary) of a few steps with a text head; one training video cannot be read."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    lines = (clips / 'attributes_train.csv').read_text().splitlines()
    (clips / 'train.csv').write_text('\n'.join([*lines, 'gone.mp4,red;disc', 'train/000000.mp4,']))
    config = make_config(
        attentive_probe,
        clips,
        **{
            'model.head': 'text',
            'data.train_list': 'train.csv',
            'data.val_list': 'attributes_val.csv',
            'data.label_map': 'attributes_labels.txt',
            'data.flip': True,
            'data.max_bad_share': 0.5,
            'mixing.probability': 1.0,
            'optimizer.label_smoothing': 0.1,
            'eval.batch_size': 4,
            'eval.num_clips': 2,
            'num_steps': 3,
        },
    )
    return workdir, train.train(config, str(workdir))


def test_a_run_is_judged_by_its_mean_average_precision(run, clips, tmp_path, capsys):
    workdir, summary = run
    assert summary['step'] == 3 and 'val_error' not in summary
    assert 0 < summary['val_map'] <= 1 and summary['best_val_map'] == summary['val_map']
    config = trained.saved_config(str(workdir))
    stored, _ = evaluate.run(config, str(workdir), 'best', str(tmp_path))
    for name in ('map', 'micro_map', 'chance'):
        assert stored[name] == summary[f'val_{name}']
    # The same of scores that were made one by one.
    model = dist_jax.load(workdir)
    source = recipe.open_split(config, 'val')
    scores = np.stack([model.score(source[k].path) for k in range(len(source))])
    labels = np.stack([np.isin(np.arange(28), list(source[k].label)) for k in range(len(source))])
    assert metrics.multi_label(scores, labels)['map'] == pytest.approx(stored['map'])
    outputs = jax.jit(model.apply)(model.variables, model.views(source[0].path))
    shares = jax.nn.sigmoid(outputs['logits'][0]).mean(0)  # each class by itself
    np.testing.assert_allclose(shares, scores[0], atol=1e-6)
    code = predict.run(config, str(workdir), None, [source[0].path], str(tmp_path))
    assert code == 0 and 'probability' in capsys.readouterr().out
    top = model.predict(source[0].path, most=28).top[0]
    assert [share for _, share in top] == sorted(scores[0].tolist(), reverse=True)


def test_a_class_has_its_score_whatever_others_there_are(run, clips):
    model = dist_jax.load(run[0])
    path = str(clips / 'val/000000.mp4')
    own = dict(zip(model.labels[0], model.score(path)))
    for labels in (['white', 'moves left'], ['moves left']):
        found = model.score(path, labels=labels)
        np.testing.assert_allclose(found, [own[name] for name in labels], atol=1e-5)


def test_a_text_head_starts_where_a_sigmoid_learns(clips):
    config = make_config(zero_shot, clips)
    recipe.prepare_builtin_data(config, '')
    labels = (motion_world.ATTRIBUTES,)
    found = trained.load_trained(config, '', None, labels, str(clips.parent))
    features = np.asarray(found.frozen['text'][0])
    model = dist_jax.VideoModel(found, config)
    scores = model.score(str(clips / 'val/000000.mp4'))
    assert 0.02 < np.median(scores) < 0.98 and len(set(scores.tolist())) > 20
    plain = make_config(zero_shot, clips, **{'task.name': 'classify'})
    unit = np.asarray(trained.load_trained(plain, '', None, labels).frozen['text'][0])
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    # All have lost the same.
    np.testing.assert_allclose(unit - features, np.tile((unit - features)[:1], (28, 1)), atol=1e-6)


def test_unreadable_videos_weigh_nothing():
    mask = jnp.array([1.0, 0.0])
    targets = TASK.targets({'label': jnp.array([[1, 0, 0, 1], [0, 0, 0, 0]], jnp.uint8)})

    def loss(logits):
        rows = TASK.loss({'logits': (logits,)}, targets, mask)
        return losses.masked_mean(rows, mask, mask.sum())

    value, gradient = jax.value_and_grad(loss)(jnp.ones((2, 4)))
    expected, slope = formula(np.ones((1, 4)), np.asarray(targets[0][:1], np.float64))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [slope[0], np.zeros(4)], rtol=1e-6)


@pytest.mark.parametrize(
    ('task', 'text', 'message'),
    [
        ('classify', 'path,labels\na.mp4,0;1\n', r'any number of classes.*multi_label'),
        ('retrieve', 'path,labels\na.mp4,0;1\n', 'has classes and no captions'),
        ('multi_label', 'path,caption\na.mp4,a cat\n', 'captions and no classes'),
        ('multi_label', 'path,label,label_2\na.mp4,0,1\n', 'a label for each of 2 heads'),
        ('multi_label', 'path,labels\na.mp4,\n', 'no video has a class'),
    ],
)
def test_lists_that_do_not_fit_the_task(tmp_path, task, text, message):
    (tmp_path / 'l.csv').write_text(text)
    config = frame_mean.get_config('demo')
    config.model.unroll = False
    config.task.name = task
    config.data.update(name='custom', train_list=str(tmp_path / 'l.csv'))
    with pytest.raises(ValueError, match=message):
        recipe.open_split(config, 'train')


def test_a_video_in_two_lines_is_said(tmp_path, caplog):
    (tmp_path / 'l.csv').write_text('path,labels\na.mp4,0\nb.mp4,0;1\na.mp4,1\n')
    assert len(open_source(tmp_path / 'l.csv')) == 3
    assert "l.csv:2: 1 lines are of a video that another line has, too, as 'a.mp4'" in caplog.text
    (tmp_path / 'l.csv').write_text('path,labels\na.mp4,0,1\n')
    with pytest.raises(ValueError, match=r'l\.csv:2: 3 fields, the header has 2.* in quotes'):
        open_source(tmp_path / 'l.csv')


def test_a_list_without_any_class_is_refused(tmp_path, clips):
    (tmp_path / 'l.csv').write_text('path,labels\na.mp4,\n')
    source = open_source(tmp_path / 'l.csv', label_map=clips / 'attributes_labels.txt')
    with pytest.raises(ValueError, match=r'data\.val_list: none of its 1 videos has a class'):
        MultiLabel((motion_world.ATTRIBUTES,)).check_list(source, 'data.val_list')


def test_fields_that_it_does_not_have_are_refused(clips):
    config = make_config(evl, clips, **{'task.criterion': 'bce'})
    with pytest.raises(ValueError, match=r"task.name='multi_label' has no option task.criterion"):
        experiment.make_task(config, (NAMES,))
    with pytest.raises(ValueError, match='one head'):
        MultiLabel((NAMES, NAMES))
    experiment.check(make_config(evl, clips), make_mesh())
