"""From Kinetics-710 to one of its sets: the classifier is put together by class name."""

import contextlib
import csv
import json
import logging
import shutil

import conv_family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinetics_tables import whole_tables, write_tables, youtube_id

from dist_jax import (
    backbones,
    checkpoint,
    evaluate,
    experiment,
    init_from,
    recipe,
    step,
    train,
)
from dist_jax.configs import dist
from dist_jax.dataset import build, merge_kinetics
from dist_jax.dataset.merging import kinetics
from dist_jax.dataset.merging.kinetics import SETS
from dist_jax.models import converted, heads
from dist_jax.sharding import make_mesh
from dist_jax.tasks.api import labels_of
from input_pipeline import class_names
from input_pipeline.kinetics import SYNONYMS, merged_key
from input_pipeline.sources import open_source

# Classes of the clips: renamed ones, common ones and one that k700 lacks.
CLASSES = {
    'k400': ('hugging', 'drinking', 'class 000', 'gone 1'),
    'k700': ('hugging (not baby)', 'class 000', 'class 600', 'smelling feet'),
}


@pytest.fixture(scope='module')
def merged(clips, tmp_path_factory):
    """Kinetics-710 out of whole tables, with a few videos that are there."""
    folder = tmp_path_factory.mktemp('merged')
    tables = whole_tables()
    videos = sorted((clips / 'train').rglob('*.mp4')) + sorted((clips / 'val').rglob('*.mp4'))
    for source in SETS:
        root = folder / source
        root.mkdir()
        for split, count in (('train', 2), ('val', 1)):
            for k, label in enumerate(CLASSES.get(source, ('class 001',))):
                for n in range(count):
                    name = f'{source}{split[0]}{k}x{n}'
                    tables[f'{source} {split}'].append((label, name, 0, 10))
                    file = root / f'{youtube_id(name)}_000000_000010.mp4'
                    shutil.copy(videos[(7 * k + n) % len(videos)], file)
    words = ['--k700_edition', '2020', '--out', str(folder / 'k710'), '--root', str(folder)]
    for source, inputs in write_tables(folder / 'tables', tables).items():
        words += [f'--{source}', f'videos={folder / source}']
        words += [f'{split}={getattr(inputs, split)[0]}' for split in ('train', 'val', 'test')]
    assert merge_kinetics.main(words) == 0
    return folder / 'k710'


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('backbone') / 'tiny')
    backbones.write_random(path, 'tiny')
    return path


@pytest.fixture(scope='module')
def make_config(merged, backbone):
    def make(data_set, head='linear', **fields):
        own = data_set.replace('kinetics', 'k')
        config = dist.get_config('demo')
        config.backbone.checkpoint = backbone
        config.data.update(name=data_set, num_frames=4, image_size=48, root=str(merged.parent))
        config.data.train_list = str(merged / 'train.txt')
        config.data.label_map = str(merged / 'names.txt')
        if own != 'k710':
            config.data.train_list = str(merged / f'train_{own}.txt')
            config.data.label_map = str(merged / f'names_{own}.txt')
        config.model.update(temporal_dim=8, head=head, unroll=False)
        config.update(batch_size=4, num_steps=2)
        config.optimizer.warmup_epochs = 0.0
        config.eval.update(batch_size=4, every_epochs=100.0)
        config.log.tensorboard = False
        config.update_from_flattened_dict(fields)
        return config

    return make


@pytest.fixture(scope='module')
def linear_run(make_config, tmp_path_factory):
    """A run on Kinetics-710 with a linear head, two real steps."""
    workdir = str(tmp_path_factory.mktemp('linear'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        train.train(make_config('kinetics710'), workdir)
    return workdir


def shaken(*_):
    """A train step that learns nothing and moves everything."""

    def train_step(state, frozen, batch):
        names = ('loss', 'grad_norm', 'learning_rate', 'clips', 'finite')
        return state.replace(step=state.step + 1, params=noise(state.params)), dict.fromkeys(
            names, 1.0
        )

    return train_step


def noise(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)


@pytest.fixture(scope='module')
def text_run(make_config, tmp_path_factory):
    """A run on Kinetics-710 with a text head."""
    workdir = str(tmp_path_factory.mktemp('text'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.step, 'make_train_step', shaken)
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        train.train(make_config('kinetics710', 'text', num_steps=1), workdir)
    return workdir


class Stop(Exception):
    pass


def begin(config, workdir, stop=False):
    """Trains: (state, frozen tree) before the first step; with `stop`, that is all it does."""
    found = []
    run = train._Loop.__call__

    def look(self, state):
        found.append((jax.device_get(state), jax.device_get(self.frozen)))
        if stop:
            raise Stop
        return run(self, state)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(train._Loop, '__call__', look)
        patch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
        train.train(config, str(workdir))
    return found[0]


def loaded(config):
    """What a run of this config would begin with: (its parameters, those it would have drawn)."""
    names = labels_of(recipe.open_split(config, 'train'))
    parts = experiment.assemble(config, names, experiment.sized_backbone(config))
    drawn = noise(parts.abstract_variables(), seed=1)
    found = init_from.load_variables(experiment.origin(config), parts.model, drawn, names)
    assert found.keys() == drawn.keys() == {'params'}
    return found['params'], drawn['params']


def stored(run):
    return checkpoint.read_host_variables(checkpoint.find_checkpoint(run))['params']


def classifier(params):
    return params['head']['column_0']['classifier']


def without_head(params):
    return {name: value for name, value in params.items() if name != 'head'}


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def names_of(path):
    return path.read_text().splitlines()


def index_of(merged, source):
    part = json.loads((merged / 'index.json').read_text())[source]
    assert part['names'] == names_of(merged / f'names_{source}.txt')
    return np.asarray(part['index'])


@pytest.mark.slow
def test_fine_tuning_begins_with_the_classifier_gathered_by_name(
    linear_run, make_config, merged, tmp_path, caplog
):
    before = stored(linear_run)
    config = make_config('kinetics400', init_from=linear_run, **{'optimizer.ema_decay': 0.5})
    with caplog.at_level(logging.INFO, 'dist_jax'):
        state, _ = begin(config, tmp_path)
    place = index_of(merged, 'k400')
    assert (np.diff(place) < 0).any()  # another order
    for part in ('kernel', 'bias'):
        assert classifier(before)[part].shape[-1] == 710
        np.testing.assert_array_equal(
            classifier(state.params)[part], classifier(before)[part][..., place]
        )
    assert np.ptp(classifier(state.params)['bias']) > 0  # they were trained
    assert_equal(without_head(state.params), without_head(before))
    assert_equal(state.ema, state.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    said = f'400 of 400 classes taken from {linear_run} by name (13 of them under another name)'
    assert said in caplog.text

    # It went on to the end as a run of its own.
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['num_classes'] == [400] and summary['num_bad_videos'] == 0
    metadata = checkpoint.read_metadata(checkpoint.find_checkpoint(tmp_path))
    assert metadata['class_names'] == [names_of(merged / 'names_k400.txt')]
    moved = np.abs(classifier(stored(tmp_path))['bias'] - classifier(state.params)['bias'])
    assert 0 < moved.max() < 0.01  # two steps away


@pytest.mark.slow
@pytest.mark.parametrize(('source', 'renamed'), [('k400', 13), ('k600', 3), ('k700', 0)])
def test_every_set_gets_its_classes(source, renamed, linear_run, make_config, merged, caplog):
    with caplog.at_level(logging.INFO, 'dist_jax'):
        params, _ = loaded(make_config(f'kinetics{source[1:]}', init_from=linear_run))
    before, place = stored(linear_run), index_of(merged, source)
    for part in ('kernel', 'bias'):
        np.testing.assert_array_equal(
            classifier(params)[part], classifier(before)[part][..., place]
        )
    assert f'({renamed} of them under another name), 0 start fresh' in caplog.text


@pytest.mark.slow
def test_a_text_head_takes_the_classes_of_the_list(text_run, make_config, merged, tmp_path):
    before = stored(text_run)
    assert 'head' not in before
    config = make_config('kinetics400', 'text', init_from=text_run)
    state, frozen = begin(config, tmp_path, stop=True)
    assert_equal(state.params, before)
    (texts,) = frozen['text']
    own, names = names_of(merged / 'names_k400.txt'), names_of(merged / 'names.txt')
    assert len(texts) == 400
    # Rows are those of the names of the list; nothing of the run is in them.
    config = make_config('kinetics710', 'text')
    backbone = experiment.find_backbone(config, '')
    parts = experiment.assemble(config, (tuple(names),), backbone)
    whole = parts.load_frozen(make_mesh(), verify=True)['text'][0]
    for name in ('class 000', 'gone 1'):
        np.testing.assert_allclose(
            texts[own.index(name)], whole[names.index(name)], atol=1e-5, err_msg=name
        )
    moved = texts[own.index('hugging')] - whole[names.index('hugging (not baby)')]
    assert np.abs(moved).max() > 1e-3


@pytest.mark.slow
def test_classes_that_are_not_there(linear_run, make_config, merged, tmp_path, caplog):
    names = names_of(merged / 'names_k400.txt')
    names[3:5] = ['clasps 003', 'a new class']
    label_map = tmp_path / 'names.txt'
    label_map.write_text('\n'.join(names))
    config = make_config('kinetics400', init_from=linear_run, **{'data.label_map': str(label_map)})
    with pytest.raises(ValueError) as error:
        loaded(config)
    message = str(error.value)
    assert '2 of the 400 classes of head 0:' in message
    assert "'clasps 003' (it has 'class 003')" in message and "'a new class'\n" in message
    assert '--config.init_missing=fresh' in message

    config.init_missing = 'fresh'
    with caplog.at_level(logging.INFO, 'dist_jax'):
        params, drawn = loaded(config)
    assert '398 of 400 classes' in caplog.text and '2 start fresh' in caplog.text
    place = index_of(merged, 'k400')
    for part in ('kernel', 'bias'):
        expected = np.array(classifier(stored(linear_run))[part][..., place])
        expected[..., 3:5] = classifier(drawn)[part][..., 3:5]
        np.testing.assert_array_equal(classifier(params)[part], expected)
    config.init_missing = 'ignore'
    with pytest.raises(ValueError, match="init_missing='ignore' is not one of"):
        loaded(config)


@pytest.mark.slow
def test_from_one_kind_of_head_to_the_other(linear_run, text_run, make_config, caplog):
    with pytest.raises(ValueError, match='no weights for 400 of the 400 classes'):
        loaded(make_config('kinetics400', init_from=text_run))
    params, drawn = loaded(make_config('kinetics400', init_from=text_run, init_missing='fresh'))
    assert_equal(params['head'], drawn['head'])
    assert_equal(without_head(params), stored(text_run))
    with caplog.at_level(logging.INFO, 'dist_jax'):
        params, _ = loaded(make_config('kinetics400', 'text', init_from=linear_run))
    assert 'is left out' in caplog.text
    assert_equal(params, without_head(stored(linear_run)))


@pytest.mark.slow
def test_another_network_is_refused_by_name(linear_run, make_config):
    config = make_config('kinetics400', init_from=linear_run, **{'model.temporal_dim': 4})
    with pytest.raises(ValueError, match=r'temporal_stem/kernel: stored .*, the model needs'):
        loaded(config)


@pytest.mark.slow
def test_a_converted_checkpoint_needs_its_names(linear_run, make_config, merged, tmp_path, caplog):
    metadata = {'family': 'dist', 'name': 'x', 'spec': {}, 'sources': [], 'source_sha256': ''}
    metadata |= {'precision': 'float32', 'ignored': []}
    path = str(tmp_path / 'weights')
    converted.save_converted(path, stored(linear_run), metadata)

    config = make_config('kinetics400', init_from=path)
    with pytest.raises(ValueError, match=r'has \(710,\) classes and does not name them.*label_map'):
        loaded(config)
    config.init_label_map = str(merged / 'names_k400.txt')
    with pytest.raises(ValueError, match=r'init_label_map names \(400,\) classes'):
        loaded(config)
    config.init_label_map = str(merged / 'names.txt')
    assert_equal(loaded(config)[0], loaded(make_config('kinetics400', init_from=linear_run))[0])
    # As many classes as the list: in the order of the list, and it is said.
    with caplog.at_level(logging.INFO, 'dist_jax'):
        params, _ = loaded(make_config('kinetics710', init_from=path))
    assert 'taken to be those of the list, in order' in caplog.text
    assert_equal(params, stored(linear_run))
    # A text head has no use for the classifier.
    params, _ = loaded(make_config('kinetics400', 'text', init_from=path))
    assert_equal(params, without_head(stored(linear_run)))


@pytest.mark.slow
def test_a_run_is_tested_on_one_of_the_sets(linear_run, make_config, merged, tmp_path):
    lists = {'data.val_list': str(merged / 'val_k400.txt')}
    config = make_config('kinetics400', init_from=linear_run, **lists)
    figures, _ = evaluate.run(config, '', None, str(tmp_path))
    names = names_of(merged / 'names_k400.txt')
    assert figures['num_videos'] == 4
    assert [row['name'] for row in figures['per_class'][0]] == names
    label_map = tmp_path / 'names.txt'
    label_map.write_text('\n'.join([*names[:-1], 'new']))
    lists |= {'data.label_map': str(label_map)}
    config = make_config('kinetics400', init_from=linear_run, init_missing='fresh', **lists)
    with pytest.raises(ValueError, match='lacks 1 classes, and nothing can be tested'):
        evaluate.run(config, '', None, str(tmp_path))


def form(**options):
    """A network of the test family, and variables as training draws them."""
    sizes = {'num_classes': (3,), 'num_frames': 2, 'dtype': jnp.float32, 'width': 4}
    model = conv_family.build(kernel_frames=3, **(sizes | options))
    inputs = {'video': jnp.zeros((1, 2, 8, 8, 3))}
    variables = jax.jit(model.net.init)(jax.random.key(1), inputs)
    return model, variables


def saved(variables, path, seed=2):
    """A converted checkpoint of such variables, with other values."""
    variables = noise(variables, seed)
    metadata = {'family': 'conv', 'name': 'x', 'spec': {}, 'sources': [], 'source_sha256': ''}
    metadata |= {'precision': 'float32', 'ignored': [], 'collections': ['batch_stats']}
    converted.save_converted(path, converted.stored_tree(variables), metadata)
    return variables


def taken(path, model, variables, **origin):
    return init_from.load_variables(
        init_from.Origin(str(path), **origin), model, variables, (('a', 'b', 'c'),)
    )


def shapes(variables):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables
    )


@pytest.mark.parametrize('num_classes', [3, 5])
def test_all_classes_may_start_anew(tmp_path, caplog, num_classes):
    before = saved(form(num_classes=(num_classes,))[1], tmp_path / 'x')
    model, drawn = form()
    with caplog.at_level(logging.INFO, 'dist_jax'):
        found = taken(tmp_path / 'x', model, drawn, missing='all_fresh')
    assert 'is left out, init_missing=all_fresh' in caplog.text
    assert 'classes taken' not in caplog.text and 'has no classifier' not in caplog.text
    assert_equal(found['params'].pop('head'), drawn['params']['head'])
    head = before['params'].pop('head')
    assert_equal(found, before)
    # A test has classes to take, or nothing to test.
    if num_classes == 3:
        tested = taken(tmp_path / 'x', model, shapes(drawn), missing='all_fresh')
        assert_equal(tested['params']['head'], head)
    else:
        with pytest.raises(ValueError, match=r'has \(5,\) classes and does not name them'):
            taken(tmp_path / 'x', model, shapes(drawn), missing='all_fresh')


def test_what_a_model_leaves_behind(tmp_path, caplog):
    image, video = form(shift=True), form()
    before = saved(image[1], tmp_path / 'image')
    with caplog.at_level(logging.INFO, 'dist_jax'):
        found = taken(tmp_path / 'image', *video)
    assert 'left behind: params/shift' in caplog.text
    del before['params']['shift']
    assert_equal(found, before)
    # A network that has a place for it takes it, and one that is tested must have one.
    assert 'shift' in taken(tmp_path / 'image', *image)['params']
    with pytest.raises(ValueError, match=r'params/shift: the model has no such parameter'):
        taken(tmp_path / 'image', video[0], shapes(video[1]))
    # Nothing else may be left over, and nothing may be missing.
    more = {**image[1], 'params': image[1]['params'] | {'other': {'bias': jnp.zeros(2)}}}
    saved(more, tmp_path / 'more')
    with pytest.raises(ValueError) as error:
        taken(tmp_path / 'more', *video)
    _, *lines = str(error.value).splitlines()
    assert lines == ['  params/other/bias: the model has no such parameter']
    saved(video[1], tmp_path / 'video')
    with pytest.raises(ValueError, match=r'  params/shift: not in the checkpoint$'):
        taken(tmp_path / 'video', *image)


def test_training_begins_with_what_a_model_makes_of_it(tmp_path):
    model, drawn = form(spread=True)
    before = saved(drawn, tmp_path / 'x')
    origin, labels = init_from.Origin(str(tmp_path / 'x')), (('a', 'b', 'c'),)
    params, stats = drawn['params'], {'batch_stats': drawn['batch_stats']}
    ema = step.fresh_average(drawn)
    state = train.start_from(step.TrainState(0, params, stats, (), ema), origin, model, labels)
    assert_equal(taken(tmp_path / 'x', model, drawn), before)  # and a test with what is there
    kernel = before['params']['conv']['kernel']
    before['params']['conv']['kernel'] = np.stack([kernel[1] / 4, kernel[1] / 2, kernel[1] / 4])
    assert_equal(state.variables, before)
    assert_equal(state.eval_variables, before)


def test_a_module_of_the_name_of_the_classifier_is_refused():
    with pytest.raises(ValueError, match='params/head holds kernel, bias where a classifier'):
        heads.classes_of({'head': {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}})


def test_equal_names_come_before_equal_keys():
    def match(origin, names, key=merged_key):
        return init_from.match_classes(origin, names, key, 'RUN').tolist()

    assert match(('a', 'hugging (not baby)'), ('hugging', 'A', 'b')) == [1, 0, -1]
    assert match(('hugging (not baby)', 'hugging'), ('hugging', 'b')) == [1, -1]
    assert match(('hugging', 'a'), ('hugging (not baby)',), class_names.key) == [-1]
    assert match((), ('0', '1')) == [-1, -1]
    assert match(('0', '1'), ('0', '1')) == [0, 1]
    with pytest.raises(ValueError, match="RUN: class 'Hugging' may be 'hugging' or 'hugging"):
        match(('hugging', 'hugging (not baby)'), ('Hugging',))
    with pytest.raises(ValueError, match=r'RUN have numbers .*init_label_map'):
        match(('0', '1'), ('a', 'b'))
    with pytest.raises(ValueError, match=r'the list have numbers .*data\.label_map'):
        match(('a', 'b'), ('0',))


def test_every_synonym_finds_its_class_in_either_direction():
    names = tuple(sorted(SYNONYMS.values()))
    for own in (tuple(SYNONYMS), names):
        assert sorted(init_from.match_classes(names, own, merged_key, '')) == list(range(15))
        assert sorted(init_from.match_classes(own, names, merged_key, '')) == list(range(15))


def test_each_head_has_its_own_classes():
    def head(*sizes):
        return {
            f'column_{i}': {
                'classifier': {
                    'kernel': jnp.arange(3 * n, dtype=jnp.float32).reshape(3, n) + 100 * i,
                    'bias': jnp.arange(n, dtype=jnp.float32) + 1000 * i,
                }
            }
            for i, n in enumerate(sizes)
        }

    source, fresh = head(4, 2), jax.tree.map(lambda x: -x, head(2, 3))
    assert heads.classes_of({'head': source}) == (4, 2) and heads.classes_of({}) == ()
    places = (np.array([2, 0]), np.array([1, -1, 0]))
    taken = heads.take_classes(source, places, fresh)
    np.testing.assert_array_equal(taken['column_0']['classifier']['bias'], [2, 0])
    np.testing.assert_array_equal(taken['column_0']['classifier']['kernel'][:, 0], [2, 6, 10])
    np.testing.assert_array_equal(taken['column_1']['classifier']['bias'], [1001, -1001, 1000])
    shapes = heads.with_classes(source, (7, 1))
    assert heads.classes_of({'head': shapes}) == (7, 1)
    assert shapes['column_0']['classifier']['kernel'].shape == (3, 7)


def test_the_lists_of_a_merge_carry_the_renamed_classes(merged):
    table = list(csv.DictReader((merged / 'train.csv').open()))
    assert {row['source'] for row in table} == set(SETS)
    assert {'hugging', 'drinking'} <= {row['native_label'] for row in table}
    names = names_of(merged / 'names.txt')
    assert len(names) == kinetics.NUM_CLASSES and not set(SYNONYMS) & set(names)


@pytest.mark.slow
def test_a_merge_goes_through_the_builder(merged, tmp_path):
    out = tmp_path / 'built'
    words = ['kinetics710', '--annotations', str(merged), '--videos', str(merged.parent)]
    words += ['--out', str(out), '--splits', 'train', 'validation', '--workers', '1']
    assert build.main(words) == 0
    names = tuple(names_of(merged / 'names.txt'))
    for split, name, count in (('train', 'train', 18), ('validation', 'val', 9)):
        built = open_source(out, 'built', subset=split)
        assert built.class_names == names and len(built) == count
        listed = open_source(
            merged / f'{name}.csv', 'csv', merged.parent, merged / 'names.txt', subset=name
        )
        pairs = [sorted((s[i].video_id, s[i].label) for i in range(count)) for s in (built, listed)]
        assert pairs[0] == pairs[1]
