"""An index that a trained retrieval run makes: the vectors and scores of its evaluation."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from dist_jax import checkpoint, main, recipe, step, train, trained
from dist_jax.configs import frame_mean, side4video_retrieval
from dist_jax.models import clip
from dist_jax.search import index_file, index_model
from dist_jax.sharding import gather_rows, make_mesh
from dist_jax.similarity import Texts, Videos, similarity
from dist_jax.views import Views
from input_pipeline import motion_captions
from input_pipeline.captions import token_rows

SENTENCE = 'a red bar moves left'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of one step that learned nothing; two clips are its test protocol."""

    def make_train_step(*_):
        names = ('loss', 'grad_norm', 'learning_rate', 'clips', 'finite')
        return lambda state, *_: (state.replace(step=state.step + 1), dict.fromkeys(names, 1.0))

    folder = tmp_path_factory.mktemp('retrieval')
    data = folder / 'data'
    motion_captions.generate(data, num_train=8, num_val=5, size=48, num_frames=8)
    config = side4video_retrieval.get_config('demo')
    config.update(batch_size=4, num_steps=1)
    config.data.update(root=str(data), train_list='train.jsonl', num_frames=3, image_size=48)
    config.model.update(unroll=False)
    config.eval.update(num_clips=2, batch_size=4)
    config.log.tensorboard = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, 'make_train_step', make_train_step)
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        train.train(config, str(folder / 'run'))
    return folder / 'run'


@pytest.fixture(scope='module')
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp('made') / 'my.index'
    command = ['index', str(run.parent / 'data' / 'val'), f'--out={out}', f'--workdir={run}']
    assert main.main([*command, '--window=0', '--batch_size=2']) == 0
    return out


def evaluated(run):
    """(model and weights, rows of an evaluation with one view of each video)."""
    config = trained.saved_config(str(run))
    with config.unlocked():
        config.data.val_list = 'val.jsonl'
        config.eval.num_clips = 1
    found = trained.load_trained(config, str(run), None)
    mesh = make_mesh()
    source = recipe.open_split(config, 'val')
    eval_step = step.make_eval_step(found.model, found.task, mesh)
    protocol = recipe.eval_protocol(config)
    views = Views(eval_step, found.variables, found.frozen, source, protocol, mesh)
    return found, gather_rows(list(views))


def test_the_index_and_its_scores_are_those_of_the_evaluation(made, run, tmp_path, capfd):
    found, rows = evaluated(run)
    opened = index_file.read(made)
    frames = np.asarray(rows['frames'])
    expected = frames / np.linalg.norm(frames, axis=-1, keepdims=True)
    assert opened.vectors.shape == (5, 3, 64) and opened.weights.shape == (5, 3)
    np.testing.assert_allclose(opened.vectors, expected, atol=2e-3)
    np.testing.assert_allclose(opened.weights, jax.nn.softmax(rows['frame_logits']), atol=1e-3)
    np.testing.assert_array_equal(opened.spans, [(0, 0.5)] * 5)
    assert opened.settings['model']['interaction'] == 'wti'

    words, _ = token_rows([SENTENCE], 32)
    query_step = step.make_query_step(found.model, found.task, make_mesh())
    outputs = query_step(found.variables, found.frozen, words)
    texts = Texts(outputs['words'], words['word_mask'], outputs['word_logits'], outputs['pooled'])
    videos = Videos(frames, np.ones(frames.shape[:2]), rows['frame_logits'])
    scores = np.asarray(similarity(texts, videos))[0]
    capfd.readouterr()
    options = [f'--output={tmp_path}/a.png', f'--json={tmp_path}/a.json']
    assert main.main(['search', str(made), SENTENCE, *options]) == 0
    assert 'loading the backbone' not in capfd.readouterr().err
    hits = json.loads((tmp_path / 'a.json').read_bytes())['hits']
    order = np.argsort(-scores)  # of as many videos as hits are shown
    assert [hit['path'] for hit in hits] == [f'{number:06d}.mp4' for number in order]
    np.testing.assert_allclose([hit['score'] for hit in hits], scores[order], atol=1e-3)


def test_one_vector_a_window_where_the_run_compares_means(run):
    config = trained.saved_config(str(run))
    with config.unlocked():
        config.task.interaction = 'meanP'
    model = index_model.of_run(config, str(run), None)
    frames = np.random.default_rng(0).standard_normal((7, 3, 64), np.float32)
    rows = index_model.mean_of_frames({'frames': frames})
    found = model.score_of_sentence(SENTENCE)(rows)
    stored = checkpoint.read_host_variables(model.folder)['params']['text']
    tokens, _ = token_rows([SENTENCE], 32)
    pooled = clip.KIND.encode_text(stored, tokens['tokens'], clip.SPECS['tiny'])
    texts = Texts(np.zeros((1, 1, 64)), np.ones((1, 1)), np.zeros((1, 1)), pooled)
    videos = Videos(frames, np.ones((7, 3)), np.zeros((7, 3)))
    np.testing.assert_allclose(found, similarity(texts, videos, 'meanP')[0], atol=1e-3)
    np.testing.assert_allclose(model.score_of_rows(rows)(rows), 1, atol=1e-5)


def test_a_run_that_moved_is_named_and_another_video_is_compared(made, run, tmp_path, capfd):
    video = run.parent / 'data' / 'val' / '000003.mp4'
    options = [f'--output={tmp_path}/a.png', f'--json={tmp_path}/a.json', '--top=1']
    moved = shutil.copytree(run, tmp_path / 'moved')
    command = ['search', str(made), f'--video={video}', f'--workdir={moved}']
    assert main.main([*command, f'--backbone={run}/backbone', *options]) == 0
    (hit,) = json.loads((tmp_path / 'a.json').read_bytes())['hits']
    assert hit['path'] == '000003.mp4'
    # Another checkpoint in its place is another model.
    (step_folder,) = (moved / 'checkpoints').iterdir()
    assert main.main(['search', str(made), 'words', f'--workdir={run}/backbone']) == 2
    step_folder.rename(step_folder.with_name('7'))
    assert main.main(['search', str(made), 'words', f'--workdir={moved}']) == 2
    assert '7' in capfd.readouterr().err


def test_only_retrieval_runs_make_an_index(run, tmp_path, capfd):
    with pytest.raises(ValueError, match="'classify', and only"):
        index_model.Trained(frame_mean.get_config('demo'), 'runs/mean', epath.Path('7'))
    command = ['index', str(run.parent / 'data' / 'val'), f'--out={tmp_path}/x']
    for options in (['--num_frames=3'], [f'--backbone={run}/backbone'], ['--dtype=float32']):
        assert main.main([*command, f'--workdir={run}', *options]) == 2
    said = capfd.readouterr().err
    assert 'a run has its own' in said and 'pass --workdir=RUN for a retrieval run, or' in said
    assert not list(tmp_path.iterdir())
