"""Bundles: what is exported gives the scores of the run, and what is damaged is refused."""

import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import text_run
from safetensors.numpy import load_file, save_file

import dist_jax
from dist_jax import experiment, main
from dist_jax.bundles import export, onnx_program, serve, verify
from dist_jax.trained import Trained
from dist_jax.video_model import VideoModel


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(clips, workdir)."""
    return text_run.train_in(tmp_path_factory.mktemp('export'), num_val=2, val_list='val.txt')


@pytest.fixture(scope='module')
def bundle(run, tmp_path_factory):
    """The bundle of a run, by the command."""
    folder = tmp_path_factory.mktemp('bundles') / 'mine'
    assert main.main(['export', f'--workdir={run[1]}', f'--out={folder}']) == 0
    return folder


@pytest.fixture
def copy(bundle, tmp_path):
    """One to damage; without the clutter that the other tests do not need."""
    return Path(shutil.copytree(bundle, tmp_path / 'copy'))


def manifest_of(folder):
    return json.loads((folder / 'bundle.json').read_text())


def relist(folder, change=lambda manifest: None):
    """Writes the manifest as whoever made the files would, then changed."""
    manifest = manifest_of(folder)
    for name, entry in manifest['files'].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(manifest)
    (folder / 'bundle.json').write_text(json.dumps(manifest))


def refused(folder, capsys):
    """What `dist_jax verify` says of a bundle that it refuses."""
    assert main.main(['verify', str(folder)]) == 1
    return capsys.readouterr().err


def test_a_bundle_gives_the_scores_of_the_run(run, bundle, capsys):
    data, workdir = run
    assert main.main(['verify', str(bundle)]) == 0
    assert 'the scores agree' in capsys.readouterr().out
    model = dist_jax.load(workdir)
    paths = sorted((data / 'val').glob('*.mp4'))
    views = np.stack([model.views(path) for path in paths])
    found = verify.read(bundle).load()(views)
    assert np.ptp(found['probabilities'], axis=0).max() > 1e-4
    for path, scores, vector in zip(paths, found['probabilities'], found['embedding']):
        np.testing.assert_allclose(scores, model.score(path), atol=1e-5)
        np.testing.assert_allclose(vector, model.embed(path), atol=1e-4)
    # As its README says, with any number of videos.
    program = jax.export.deserialize(bytearray((bundle / 'program.stablehlo').read_bytes()))
    weights = load_file(bundle / 'weights.safetensors')
    again = program.call(weights, np.concatenate([views, views[:1]]))
    np.testing.assert_allclose(again['probabilities'][2], found['probabilities'][0], atol=1e-5)
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    assert [tuple(head['classes']) for head in manifest_of(bundle)['heads']] == list(model.labels)


def test_nothing_says_where_it_was_made(run, bundle):
    for path in bundle.iterdir():
        data = path.read_bytes()
        assert bytes(Path(export.__file__).parent) not in data and run[1].encode() not in data


def test_verify_py_is_the_module_and_needs_nothing_of_this_package(bundle, copy):
    assert (bundle / 'verify.py').read_bytes() == Path(verify.__file__).read_bytes()
    code = (
        'import runpy, sys\n'
        'for name in ("dist_jax", "input_pipeline", "flax", "optax", "pickle5"):\n'
        '    sys.modules[name] = None\n'
        'sys.argv = ["verify.py"]\n'
        'runpy.run_path("verify.py", run_name="__main__")\n'
    )
    ran = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0 and 'the scores agree' in ran.stdout, ran.stderr
    ran = subprocess.run([sys.executable, 'verify.py', 'nothing'], cwd=copy, capture_output=True)
    assert ran.returncode == 2 and b'no folder nothing' in ran.stderr


def test_missing_and_changed_files_are_named(copy, capsys):
    (copy / 'golden.safetensors').unlink()
    with open(copy / 'weights.safetensors', 'r+b') as file:
        file.seek(-1, 2)
        file.write(b'\x77')
    (copy / 'README.md').write_text('mine')
    text = refused(copy, capsys)
    assert 'golden.safetensors is missing' in text
    assert 'weights.safetensors has changed: sha256' in text
    assert 'README.md has changed: 4 bytes' in text
    (copy / 'bundle.json').unlink()
    assert 'bundle.json is missing' in refused(copy, capsys)


def test_other_weights_and_scores_are_refused(copy, capsys):
    weights = load_file(copy / 'weights.safetensors')
    name = next(name for name in weights if name.endswith('temporal_stem/kernel'))
    for changed, text in (
        ({name: weights[name] + 0.5}, 'not those of the model'),
        ({name: weights[name] * np.float32(np.nan)}, 'not finite'),
        ({name: weights[name][..., :-1]}, f'{name} is float32'),
        ({name: weights[name].astype(np.float16)}, 'is float16 ('),
        ({'more': weights[name]}, 'more is not listed'),
    ):
        save_file({**weights, **changed}, copy / 'weights.safetensors')
        relist(copy)
        assert text in refused(copy, capsys)
    save_file({n: w for n, w in weights.items() if n != name}, copy / 'weights.safetensors')
    relist(copy)
    assert f'{name} is missing' in refused(copy, capsys)


def test_damaged_programs_and_clips_are_refused(bundle, copy, capsys):
    data = (bundle / 'program.stablehlo').read_bytes()
    other = jax.export.export(jax.jit(lambda x: x))(np.zeros(3, np.float32)).serialize()
    outside = jax.export.export(jax.jit(jax.numpy.linalg.cholesky))(np.eye(3, dtype=np.float32))
    for changed, text in (
        (data[: len(data) // 2], 'no program that jax can read'),
        (b'', 'no program that jax can read'),
        (bytes(other), 'does not take weights by name'),
        (bytes(outside.serialize()), 'does more than compute'),
    ):
        (copy / 'program.stablehlo').write_bytes(changed)
        relist(copy)
        assert text in refused(copy, capsys)
    (copy / 'program.stablehlo').write_bytes(data)
    golden = load_file(copy / 'golden.safetensors')
    scores = golden['probabilities']
    for changed, text in (
        (golden | {'probabilities': scores + np.float32(1e-3)}, 'not those of the model'),
        (golden | {'probabilities': scores * np.float32(np.inf)}, 'is not finite'),
        (golden | {'video': golden['video'][:1]}, 'video is uint8 (1, '),
    ):
        save_file(changed, copy / 'golden.safetensors')
        relist(copy)
        assert text in refused(copy, capsys)
    (copy / 'golden.safetensors').write_bytes(b'\xff' * 100)
    relist(copy)
    assert 'golden.safetensors: ' in refused(copy, capsys)


def set_in(*place):
    *path, name, value = place

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[name] = value

    return change


HUGE = [None, *[1 << 30] * 4, 3]


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (set_in('format_version', 2), 'format_version=2'),
        (set_in('format', 'zip'), 'format=zip'),
        (set_in('format_version', True), 'not a whole number'),
        (set_in('format_version', 10**30), 'format_version=1000'),
        (set_in('program', 'kind', 'pickle'), 'program.kind=pickle'),
        (set_in('program', 'dtype', ['float32']), 'not a text'),
        (set_in('program', []), 'not an object'),
        (set_in('weights', {}), 'not a list'),
        (set_in('weights', 0, 'shape', [None]), 'a weight of unknown size'),
        (set_in('weights', 0, 'shape', [1 << 40]), 'an axis of 1099511627776'),
        (set_in('weights', 0, 'shape', [1.5]), 'an axis of 1.5'),
        (set_in('weights', 0, 'name', '\x1b[31m'), r'\x1b[31m'),
        (set_in('video', 'shape', HUGE), 'too large'),
        (set_in('video', 'dtype', 'object'), 'dtype=object'),
        (set_in('golden', 'videos', -1), 'golden.videos=-1'),
        (set_in('heads', 0, 'classes', ['one']), '1 classes for the output probabilities'),
        (set_in('heads', 0, 'output', 'other'), 'not there'),
        (set_in('files', '../../../etc/passwd', {}), 'names no file here'),
        (set_in('files', '/etc/passwd', {}), 'names no file here'),
        (set_in('files', 'weights.safetensors', 'sha256', 7), 'not a text'),
        (set_in('files', {}), 'does not list'),
        (set_in('outputs', []), 'outputs has a name twice, or none'),
    ],
)
def test_manifests_that_lie_are_refused(copy, capsys, change, text):
    relist(copy, change)
    assert text in refused(copy, capsys)


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'[]',
        b'\xff\xfe',
        b'[' * 100_000,
        b'{"format": NaN}',
        b'{"format": ' + b'9' * 5000 + b'}',
        b'{"format": "dist_jax bundle"}',
    ],
)
def test_manifests_that_are_none_are_refused(copy, capsys, data):
    (copy / 'bundle.json').write_bytes(data)
    assert 'bundle.json' in refused(copy, capsys)


def test_files_that_are_none_are_refused(copy, capsys):
    (copy / 'README.md').unlink()
    (copy / 'README.md').symlink_to('/dev/zero')
    assert 'README.md is not a regular file' in refused(copy, capsys)


def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch, capsys):
    _, workdir = run
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'file').write_text('mine')
    command = ['export', f'--workdir={workdir}', f'--out={tmp_path}/taken']
    assert main.main(command) != 0
    assert 'choose another --out' in capsys.readouterr().err
    monkeypatch.setattr(verify, 'errors', lambda bundle: {'probabilities': 1.0})
    with pytest.raises(ValueError, match='other scores than the model'):
        export.run(dist_jax.load(workdir), tmp_path / 'new')
    assert [path.name for path in tmp_path.iterdir()] == ['taken']


def test_wrong_usage_says_what_to_pass(run, bundle, tmp_path, capsys):
    _, workdir = run
    out = f'--out={tmp_path}/out'
    for command, text in (
        ([out], 'pass one of --workdir'),
        ([out, f'--workdir={workdir}', '--config=dist:demo'], 'pass one of --workdir'),
        ([out, f'--workdir={workdir}', '--format=tflite'], '--format=tflite'),
        ([out, f'--workdir={workdir}', '--batch_size=-1'], '--batch_size=-1'),
        ([out, '--config=dist:demo', '--config.init_from=x'], 'pass --labels'),
        ([out, f'--workdir={workdir}', '--labels=none.txt'], 'no file none.txt'),
        (['--out=gs://bucket/x', f'--workdir={workdir}'], 'a local folder'),
    ):
        assert main.main(['export', *command]) == 2
        assert text in capsys.readouterr().err
    assert main.main(['verify', str(tmp_path / 'none')]) == 2
    assert not list(tmp_path.iterdir())


def test_a_backbone_with_class_names(run, tmp_path, capsys):
    data, workdir = run
    fields = {'data.num_frames': 3, 'eval.num_clips': 1, 'model.dtype': 'float32'}
    assert (
        main.main(
            [
                'export',
                f'--backbone={workdir}/backbone',
                f'--labels={data}/labels.txt',
                f'--out={tmp_path}/clip',
                '--batch_size=1',
                *(f'--config.{name}={value}' for name, value in fields.items()),
            ]
        )
        == 0
    )
    manifest = manifest_of(tmp_path / 'clip')
    assert manifest['video']['shape'] == [1, 1, 3, 48, 48, 3]
    assert manifest['outputs'][1] == {
        'name': 'probabilities',
        'shape': [1, len(manifest['heads'][0]['classes'])],
        'dtype': 'float32',
    }


def abstract(family, **fields):
    """A model of shapes, which is enough to trace it."""
    config = importlib.import_module(f'dist_jax.configs.{family}').get_config('demo')
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    parts = experiment.assemble(config, (('a', 'b'),), experiment.sized_backbone(config))
    frozen, variables = parts.abstract_frozen(True), parts.abstract_variables(True)
    return VideoModel(Trained(parts.task, parts.test_model, frozen, variables, -1), config)


@pytest.mark.parametrize(
    ('family', 'dtype', 'task'),
    [
        ('dist', 'bfloat16', 'classify'),
        ('evl', 'float32', 'classify'),
        ('side4video', 'bfloat16', 'classify'),
        ('side4video_retrieval', 'float32', 'retrieve'),
        ('sts', 'bfloat16', 'classify'),
        ('fine_tune', 'bfloat16', 'classify'),
        ('attentive_probe', 'float32', 'classify'),
        ('zero_shot', 'bfloat16', 'classify'),
        ('frame_mean', 'float32', 'multi_label'),
    ],
)
def test_every_family_is_a_program_for_all_platforms(family, dtype, task):
    """Of plain StableHLO: no kernel of TPUs, no layout, no batch size."""
    program = export.program_of(abstract(family, **{'model.dtype': dtype, 'task.name': task}))
    exported = jax.export.deserialize(bytearray(export.stablehlo(program, 0)))
    assert exported.platforms == export.PLATFORMS
    calls = re.findall(r'custom_call @"?(\w+)', exported.mlir_module())
    assert set(calls) <= {'shape_assertion'}
    assert not isinstance(exported.in_avals[-1].shape[0], int)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert set(outputs) == {'embedding'} | ({'probabilities'} if task != 'retrieve' else set())
    # A text tower that no video needs is not carried along.
    assert not any('params/text/' in name for name in program.weights)


def test_a_program_for_one_platform_has_no_choice_and_means_the_same():
    """As converters to ONNX take it: not even max-pooling has a window."""
    model = abstract('sts', **{'model.dtype': 'float32', 'data.image_size': 32})
    rng = np.random.default_rng(0)
    for_all, for_one = export.program_of(model), export.program_of(model, 'cpu')
    weights = {
        name: np.abs(rng.normal(0, 0.2, leaf.shape)).astype(leaf.dtype)
        for name, leaf in for_all.weights.items()
    }
    video = rng.integers(0, 256, (1, *for_all.video), np.uint8)
    wanted, found = (jax.jit(program.run)(weights, video) for program in (for_all, for_one))
    assert np.ptp(wanted['probabilities']) > 1e-4
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6)
    for program, some in ((for_all, True), (for_one, False)):
        text = str(jax.make_jaxpr(program.run)(*program.arguments(1)))
        for name in ('platform_index', 'reduce_window_max'):
            assert (name in text) == some


def test_onnx_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r'model\.dtype=float32'):
        onnx_program.check(jax.numpy.bfloat16)


def test_a_run_and_its_bundle_are_served_alike(run, bundle):
    data, workdir = run
    model = dist_jax.load(workdir)
    of_run, of_bundle = serve.of_model(model, workdir), serve.of_bundle(str(bundle))
    assert (of_run.name, of_bundle.name) == ('run', 'mine')
    assert of_run.reader == of_bundle.reader and of_run.heads == of_bundle.heads
    path = str(next((data / 'val').glob('*.mp4')))
    (wanted,) = model.predict(path, most=serve.TOP).top
    for served in (of_run, of_bundle):
        (top,) = served.top(model.views(path))
        assert [entry['label'] for entry in top] == [name for name, _ in wanted]
        shares = [entry['probability'] for entry in top]
        np.testing.assert_allclose(shares, [share for _, share in wanted], atol=1e-5)
