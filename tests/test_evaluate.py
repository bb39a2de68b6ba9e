"""Evaluation: exact figures, views together, and what a run needs to be evaluated elsewhere."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dist_jax import (
    backbones,
    checkpoint,
    config_arguments,
    evaluate,
    main,
    recipe,
    sharding,
    step,
    train,
    trained,
)
from dist_jax.configs import base
from dist_jax.configs import dist as dist_config
from dist_jax.evaluate import BadVideosError
from dist_jax.metrics import NonFiniteScoresError
from dist_jax.sharding import gather_rows, make_mesh, to_global
from dist_jax.views import EvalProtocol, Views
from input_pipeline import pipeline
from input_pipeline.sources import open_source

NUM_VIDEOS = 10
VIEWS = 2


def shaken(*_):
    """A train step that learns nothing and moves everything: a trained model for tests, at once."""

    def train_step(state, frozen, batch):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jnp.asarray(x + rng.normal(0, 0.1, x.shape), x.dtype), state.params
        )
        names = ('loss', 'grad_norm', 'learning_rate', 'clips', 'finite')
        return state.replace(step=state.step + 1, params=params), dict.fromkeys(names, 1.0)

    return train_step


@pytest.fixture(scope='module')
def make_run(clips, tmp_path_factory):
    """Makes a run with a head; its training data is gone, and the run has moved."""

    def make(head):
        folder = tmp_path_factory.mktemp(head)
        data = shutil.copytree(clips, folder / 'data')
        config = dist_config.get_config('demo')
        config.update(batch_size=4, num_steps=1)
        config.data.update(
            root=str(data),
            train_list='train.txt',
            label_map='labels.txt',
            num_frames=4,
            image_size=48,
        )
        config.model.update(temporal_dim=8, head=head, unroll=False)
        config.eval.update(num_clips=VIEWS, batch_size=4)
        config.log.tensorboard = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.step, 'make_train_step', shaken)
            patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
            train.train(config, str(folder / 'first'))
        shutil.rmtree(data)
        return shutil.move(folder / 'first', folder / 'moved')

    return make


@pytest.fixture(scope='module')
def text_run(make_run):
    return make_run('text')


@dataclasses.dataclass
class Scorer:
    """A trained model with one compiled eval step."""

    config: object
    trained: trained.Trained
    eval_step: object

    def views(self, source, batch_size=4, max_bad_share=0.0, **options):
        reader, readers = recipe.eval_reader(self.config), pipeline.Readers(num_threads=1)
        return Views(
            self.eval_step,
            self.trained.variables,
            self.trained.frozen,
            source,
            EvalProtocol(reader, batch_size, readers, max_bad_share),
            make_mesh(jax.devices()[:1]),
            **options,
        )

    def rows(self, source, **options):
        return gather_rows(list(self.views(source, **options)))

    def __call__(self, source, **options):
        return evaluate.evaluate(self.views(source, **options), self.trained.task, None)


@pytest.fixture(scope='module')
def score(text_run):
    config = trained.saved_config(str(text_run))
    found = trained.load_trained(config, str(text_run), None)
    mesh = make_mesh(jax.devices()[:1])
    return Scorer(config, found, step.make_eval_step(found.model, found.task, mesh))


def open_list(folder):
    return open_source(folder / 'val.txt', 'kinetics', root=folder, label_map=folder / 'labels.txt')


@pytest.fixture(scope='module')
def scored(score, clips):
    return score(open_list(clips))


@pytest.fixture(scope='module')
def rows(score, clips):
    return score.rows(open_list(clips))


@pytest.mark.slow
def test_a_partial_last_batch_counts_exactly(score, scored, rows, clips):
    alone = score(open_list(clips), batch_size=1)
    for result in (scored, alone):
        assert result.num_videos == NUM_VIDEOS and result.bad_videos == ()
    assert rows.keys() == {'index', 'label', 'scores'}  # no texts: hosts gather arrays
    rows_alone = score.rows(open_list(clips), batch_size=1)
    for found in (rows, rows_alone):
        np.testing.assert_array_equal(found['index'], np.arange(NUM_VIDEOS))
    (scores,), (scores_alone,) = rows['scores'], rows_alone['scores']
    np.testing.assert_allclose(scores, scores_alone, atol=1e-6)
    figures = scored.figures.scalars
    assert figures == alone.figures.scalars
    assert np.ptp(scores, axis=0).max() > 1e-3  # the model tells videos apart

    labels = np.array([open_list(clips)[i].label for i in range(NUM_VIDEOS)])
    np.testing.assert_array_equal(rows['label'], labels)
    ranks = np.argsort(-scores, axis=1)
    right = ranks[:, 0] == labels
    assert figures['top1'] == pytest.approx(right.mean())
    assert figures['top5'] == pytest.approx((ranks[:, :5] == labels[:, None]).any(1).mean())
    present = np.unique(labels)
    per_class = [right[labels == label].mean() for label in present]
    assert figures['mean_class_accuracy'] == pytest.approx(np.mean(per_class))


@pytest.mark.slow
def test_the_views_of_a_video_stay_together(score, rows, clips):
    batch = next(
        pipeline.eval_batches(
            open_list(clips),
            recipe.eval_reader(score.config),
            batch_size=4,
            readers=pipeline.Readers(num_threads=0),
        )
    )
    assert batch['video'].shape[:2] == (4, VIEWS)
    assert (batch['video'][:, 0] != batch['video'][:, 1]).any()
    each = []
    for view in range(VIEWS):
        # The same program, fed with one view several times.
        video = np.repeat(batch['video'][:, view : view + 1], VIEWS, axis=1)
        placed = to_global({'video': video}, make_mesh(jax.devices()[:1]))
        found = score.eval_step(score.trained.variables, score.trained.frozen, placed)
        each.append(np.asarray(found['scores'][0]))
    np.testing.assert_allclose(np.mean(each, axis=0), rows['scores'][0][:4], atol=1e-6)
    np.testing.assert_allclose(rows['scores'][0].sum(1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_bad_video_is_an_error_unless_allowed(score, rows, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / 'clips')
    bad = open_list(folder)[3].path
    with open(bad, 'wb') as file:
        file.write(b'no video')
    with pytest.raises(BadVideosError) as error:
        score(open_list(folder))
    message = str(error.value)
    assert f'1 of {NUM_VIDEOS} videos' in message and str(bad) in message
    assert 'eval.allow_bad_videos' in message

    progress = []
    result = score(open_list(folder), max_bad_share=0.1, on_batch=progress.append)
    assert progress == [1, 2, 3]
    ((path, reason),) = result.bad_videos
    assert path == str(bad) and reason
    others = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    figures = result.figures
    assert result.num_videos == 9 and figures.scalars['num_bad_videos'] == 1
    assert figures.sections[-1].rows == result.bad_videos
    found = score.rows(open_list(folder))
    np.testing.assert_array_equal(found['index'], others)
    np.testing.assert_allclose(found['scores'][0], rows['scores'][0][others], atol=1e-6)
    labels = np.array([open_list(folder)[i].label for i in others])
    right = found['scores'][0].argmax(1) == labels
    assert figures.scalars['top1'] == pytest.approx(right.mean())


@pytest.mark.slow
def test_a_list_without_a_readable_video_has_no_accuracy(score, tmp_path):
    (tmp_path / 'val.txt').write_text('a.mp4 0\nb.mp4 1\n')
    (tmp_path / 'labels.txt').write_text(''.join(f'class {i}\n' for i in range(8)))
    for name in ('a.mp4', 'b.mp4'):
        (tmp_path / name).write_bytes(b'no video')
    with pytest.raises(BadVideosError, match='none of the 2 videos can be read'):
        score(open_list(tmp_path), max_bad_share=1.0)


@pytest.mark.slow
def test_scores_that_are_no_numbers_are_an_error_that_names_the_videos(score, clips):
    source = open_list(clips)

    def spoiled(*arguments):
        (scores,) = score.eval_step(*arguments)['scores']
        return {'scores': (scores.at[1, 3].set(jnp.nan),)}

    with pytest.raises(NonFiniteScoresError) as error:
        dataclasses.replace(score, eval_step=spoiled)(source)
    message = str(error.value)
    assert f'3 of {NUM_VIDEOS} videos' in message and 'damaged weights' in message
    assert all(str(source[i].path) in message for i in (1, 5, 9))
    assert str(source[0].path) not in message


@pytest.mark.slow
@pytest.mark.parametrize('fusion', [0.0, 0.5])
def test_a_damaged_backbone_has_no_accuracy(
    text_run, score, clips, tmp_path, capsys, monkeypatch, fusion
):
    visual = score.trained.frozen['visual']
    visual = visual | {'conv1': jax.tree.map(lambda x: x.at[...].set(jnp.nan), visual['conv1'])}
    damaged = score.trained.frozen | {'visual': visual}
    task = dataclasses.replace(score.trained.task, fusion=fusion)
    spoiled = dataclasses.replace(score.trained, frozen=damaged, task=task)
    monkeypatch.setattr(evaluate, 'load_trained', lambda *_: spoiled)
    arguments = [f'--workdir={text_run}', f'--output={tmp_path}', f'--config.data.root={clips}']
    arguments += ['--config.data.val_list=val.txt', f'--config.eval.fusion={fusion}']
    assert evaluate_command(*arguments) == 1
    message = capsys.readouterr().err
    assert f'{NUM_VIDEOS} of {NUM_VIDEOS} videos' in message and 'backbone' in message
    assert 'val/' in message or '.mp4' in message
    assert not (tmp_path / 'evaluation.json').exists()


def test_unreadable_videos_of_all_hosts_are_named(monkeypatch):
    """Two hosts in one process: what one of them sends comes back with the other's."""
    found = [[[4, 'b.mp4', 'cut'], [0, 'ä.mp4', 'no video']], [[2, 'c.mp4', 'no video']]]
    texts = [np.frombuffer(json.dumps(values).encode(), np.uint8) for values in found]
    longest = max(map(len, texts))

    def process_allgather(value):
        if value.ndim == 0:
            return np.array([len(text) for text in texts], np.int32)
        assert value.shape == (longest,)
        return np.stack([np.pad(text, (0, longest - len(text))) for text in texts])

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, 'process_allgather', process_allgather)
    for values in found:
        assert sharding.gather_values(values) == found[0] + found[1]


def evaluate_command(*arguments):
    return main.main(['evaluate', *map(str, arguments)])


@pytest.mark.slow
def test_the_command_needs_the_run_and_its_backbone_only(text_run, scored, clips, tmp_path, capsys):
    data = [f'--config.data.root={clips}', '--config.data.val_list=val.txt']
    assert evaluate_command(f'--workdir={text_run}', *data) == 0
    found = json.loads((text_run / 'evaluation.json').read_text())
    assert found['top1'] == pytest.approx(scored.figures.scalars['top1'])
    assert found['top5'] == pytest.approx(scored.figures.scalars['top5'])
    assert (found['num_videos'], found['num_bad_videos']) == (NUM_VIDEOS, 0)
    assert (found['views'], found['step'], found['list']) == (VIEWS, 1, 'val.txt')
    (table,) = found['per_class']
    assert sum(row['videos'] for row in table) == NUM_VIDEOS
    assert [row['name'] for row in table] == list(score_names(text_run))
    page = (text_run / 'evaluation.html').read_text()
    assert '</html>' in page and table[0]['name'] in page
    assert f'{found["top1"]:.2%}'.removesuffix('%') in ''.join(capsys.readouterr())


def score_names(workdir):
    return checkpoint.read_metadata(checkpoint.find_checkpoint(workdir))['class_names'][0]


@pytest.mark.slow
def test_zero_shot_on_another_label_set_fused_with_the_backbone(text_run, clips, tmp_path):
    (tmp_path / 'labels.txt').write_text('sideways\nup\ndown\n')
    paths = [line.rsplit(maxsplit=1)[0] for line in (clips / 'val.txt').open()][:4]
    rows = ''.join(f'{path} {i % 3}\n' for i, path in enumerate(paths))
    (tmp_path / 'val.txt').write_text(rows)
    arguments = [
        f'--workdir={text_run}',
        f'--output={tmp_path / "zero-shot"}',
        '--config.data.name=custom',
        f'--config.data.root={clips}',
        f'--config.data.val_list={tmp_path / "val.txt"}',
        f'--config.data.label_map={tmp_path / "labels.txt"}',
        '--config.eval.fusion=0.5',
    ]
    assert evaluate_command(*arguments) == 0
    found = json.loads((tmp_path / 'zero-shot' / 'evaluation.json').read_text())
    assert found['num_videos'] == 4 and found['fusion'] == 0.5 and found['top5'] == 1
    assert [row['name'] for row in found['per_class'][0]] == ['sideways', 'up', 'down']
    assert [row['videos'] for row in found['per_class'][0]] == [2, 1, 1]


@pytest.mark.slow
def test_another_test_size_is_as_if_it_were_the_size_of_training(text_run, rows, clips, tmp_path):
    found = []
    for field in ('eval.image_size', 'data.image_size'):
        config = trained.saved_config(str(text_run))
        config.update_from_flattened_dict({field: 64})
        model = trained.load_trained(config, str(text_run), None)
        eval_step = step.make_eval_step(model.model, model.task, make_mesh(jax.devices()[:1]))
        found.append(Scorer(config, model, eval_step).rows(open_list(clips)))
    jax.tree.map(np.testing.assert_array_equal, *(part['scores'] for part in found))
    assert np.abs(found[0]['scores'][0] - rows['scores'][0]).max() > 1e-4
    data = [f'--config.data.root={clips}', '--config.data.val_list=val.txt']
    arguments = [f'--workdir={text_run}', f'--output={tmp_path}', *data]
    assert evaluate_command(*arguments, '--config.eval.image_size=64') == 0
    right = found[0]['scores'][0].argmax(1) == found[0]['label']
    stored = json.loads((tmp_path / 'evaluation.json').read_text())
    assert stored['top1'] == pytest.approx(right.mean())


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said(text_run, make_run, clips, tmp_path, capsys):
    data = [f'--config.data.root={clips}', '--config.data.val_list=val.txt']
    before = sorted(text_run.iterdir())

    def refused(workdir, *arguments):
        assert evaluate_command(f'--workdir={workdir}', *arguments) == 2
        return capsys.readouterr().err

    other = str(tmp_path / 'other')
    backbones.write_random(other, 'tiny', seed=1)
    message = refused(text_run, *data, f'--config.backbone.checkpoint={other}')
    assert other in message and 'tiny-random' in message and '--config.backbone' in message
    message = refused(text_run, *data, '--step=7')
    assert 'no checkpoint of step 7' in message and '[1]' in message
    assert 'data.val_list' in refused(text_run)
    message = refused(text_run, *data, '--config.eval.image_size=50')
    assert 'eval.image_size' in message and '50 is not a multiple of patch_size=8' in message
    assert 'none.txt' in refused(text_run, data[0], '--config.data.val_list=none.txt')

    linear = make_run('linear')
    message = refused(linear, *data, '--config.eval.fusion=0.5')
    assert 'eval.fusion=0.5' in message and 'model.head=text' in message
    labels = tmp_path / 'labels.txt'
    labels.write_text(''.join(f'class {i}\n' for i in range(8)))
    message = refused(linear, *data, f'--config.data.label_map={labels}')
    assert 'only model.head=text can take another' in message
    assert sorted(text_run.iterdir()) == before


def test_a_run_from_before_a_field_existed_gets_its_default(monkeypatch):
    saved = dist_config.get_config('demo').to_dict()
    saved['data']['num_frames'] = 4
    del saved['mesh'], saved['data']['crop_rounding'], saved['data']['split_names']
    monkeypatch.setattr(checkpoint, 'find_checkpoint', lambda workdir, step: workdir)
    monkeypatch.setattr(checkpoint, 'read_metadata', lambda folder: {'config': saved})
    config = trained.saved_config('anywhere')
    assert (config.mesh.fsdp, config.data.crop_rounding) == (1, 'nearest')
    assert not config.data.split_names  # its text features are those of the names as they were
    assert (
        config.data.num_frames == 4 and config.model.temporal_dim == saved['model']['temporal_dim']
    )
    with pytest.raises(AttributeError):
        config.data.crop_roundin = 'down'


def test_tuples_of_a_saved_run_can_be_set(monkeypatch):
    config = dist_config.get_config('b16_8+16f_ssv2')
    saved = {'config': json.loads(json.dumps(base.plain(config)))}
    monkeypatch.setattr(checkpoint, 'find_checkpoint', lambda workdir, step: workdir)
    monkeypatch.setattr(checkpoint, 'read_metadata', lambda folder: saved)
    found = trained.saved_config('anywhere')
    assert found.to_dict() == config.to_dict()
    fields = ['eval.resize=(256,)', 'data.crop_area=(0.5, 1.0)', 'data.resize=(240, 320)']
    fields += ['model.selected_layers=(1, 2)']
    config_arguments.read_config([f'--config.{field}' for field in fields], found)
    assert found.eval.resize == (256,) and found.data.crop_area == (0.5, 1.0)
    assert found.data.resize == (240, 320) and found.model.selected_layers == (1, 2)
    assert base.plain(found)['eval']['resize'] == [256]
