"""`dist_jax plan`: what it prints, writes and draws; once with the real compiler."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from programs import NESTED

from dist_jax import main
from dist_jax.plan import cache, command, compiling, topology

DEMO = 'configs/frame_mean.py:demo'
GIB = 2**30
ROOT = Path(main.__file__).parents[1]


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that answers at once: memory of a GiB a clip, a program of 605 cycles."""
    asked = []

    def compile_lowered(lowered):
        leaves = jax.tree.leaves(lowered.args_info)
        clips = leaves[-1].shape[0] if len(leaves) > 2 else 0
        asked.append(clips)
        if clips > 29:
            return compiling.Compiled('', {}, False, (1 + clips) * GIB, 30 * GIB)
        memory = {'temporaries': clips * GIB, 'program': GIB // 2}
        memory |= {'arguments': GIB // 2, 'outputs': 100, 'aliased': 100}
        return compiling.Compiled(NESTED, memory, limit_bytes=30 * GIB, seconds=1.0)

    monkeypatch.setattr(compiling, 'compile_lowered', compile_lowered)
    monkeypatch.setattr(command, 'devices', lambda _: jax.devices()[:1])
    monkeypatch.setattr(topology, 'prepare_environment', lambda: None)
    return asked


def run(*arguments):
    """Exit code of the command."""
    try:
        return main.main(['plan', '--topology=v5e:1x1', '--cache=', *arguments])
    except SystemExit as exit:
        return exit.code


def test_a_plan_is_printed_written_and_drawn(compiler, tmp_path, capsys):
    files = ['--json', str(tmp_path / 'a' / 'plan.json'), '--plot', str(tmp_path / 'plan.png')]
    settings = ['--config.batch_size=8', '--config.eval.batch_size=4']
    assert run(f'--config={DEMO}', *settings, *files) == 0
    assert compiler == [0, 8, 4]
    out = capsys.readouterr().out
    for text in (
        'frame_mean demo on v5e:1x1',
        'temporaries',
        '8 clips a chip',
        'calibration',
        'inner',
    ):
        assert text in out
    plan = json.loads((tmp_path / 'a' / 'plan.json').read_text())
    assert plan['temp_bytes'] == plan['hbm_bytes_per_chip']['temporaries'] == 8 * GIB
    assert plan['fits'] is True and plan['clips_per_chip'] == 8
    assert plan['estimated_cycles'] == 605
    assert plan['estimated_seconds'] == pytest.approx(605 / 1.5e9)
    assert plan['clips_per_second_per_chip'] == pytest.approx(8 / (605 / 1.5e9))
    assert plan['estimated_mfu'] == pytest.approx(
        plan['model_flops'] / plan['estimated_seconds'] / 197e12
    )
    assert plan['collective_bytes'] == {}
    assert plan['eval']['clips_per_chip'] == 4
    assert plan['eval']['model_flops_per_clip'] < plan['model_flops_per_clip']
    assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


def test_what_does_not_fit_is_a_plan_too(compiler, tmp_path, capsys):
    file = tmp_path / 'plan.json'
    picture = tmp_path / 'plan.png'
    arguments = ['--config.batch_size=100', '--no_eval', f'--json={file}', f'--plot={picture}']
    assert run(f'--config={DEMO}', *arguments) == 0
    assert 'NO' in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan['fits'] is False and plan['hbm_bytes_needed'] == pytest.approx(101 * GIB, rel=1e-3)
    assert sum(plan['hbm_bytes_per_chip'].values()) == pytest.approx(plan['hbm_bytes_needed'])
    assert plan['hbm_bytes_per_chip']['trainable'] > 0
    assert plan['estimated_seconds'] is None and plan['model_flops'] > 0
    assert picture.stat().st_size > 0


def test_batches_that_are_sent_ahead_count(compiler, tmp_path):
    """Three batches are on a chip while it trains; two while it evaluates, and one of training."""
    file = tmp_path / 'plan.json'
    settings = ['--config.batch_size=100', '--config.eval.batch_size=40']
    assert run(f'--config={DEMO}', *settings, f'--json={file}') == 0
    plan = json.loads(file.read_text())
    train, evaluation = plan['hbm_bytes_per_chip'], plan['eval']['hbm_bytes_per_chip']
    assert train['batch'] == 100 * (8 * 48 * 48 * 3 + 4 + 4)  # pixels, label, mask
    assert train['batches_ahead'] == 2 * train['batch']
    assert plan['hbm_bytes_needed'] == 101 * GIB + 2 * train['batch']
    assert evaluation['batches_ahead'] == evaluation['batch'] > 0
    assert evaluation['held_for_training'] == train['optimizer'] + train['batch'] + 4  # the step


def test_the_largest_batch_is_searched(compiler, tmp_path, capsys):
    file = tmp_path / 'plan.json'
    arguments = ['--search_batch', '--no_eval', '--config.batch_size=4', f'--json={file}']
    assert run(f'--config={DEMO}', *arguments) == 0
    found = json.loads(file.read_text())['search']
    assert found['largest_clips_per_chip'] in (28, 29)
    assert found['smallest_that_does_not_fit'] in (None, 30)
    assert f'{found["largest_clips_per_chip"]:g} clips a chip' in capsys.readouterr().out
    assert len(found['trials']) == len(set(compiler)) - 1  # and the calibration


def test_configs_are_compared(compiler, tmp_path, capsys):
    file, picture = tmp_path / 'plans.json', tmp_path / 'plans.png'
    common = ['--config.batch_size=4', f'--json={file}', f'--plot={picture}']
    own = f'{DEMO} config.batch_size=40 gradients=full'
    assert run('--compare', DEMO, own, 'configs/dist.py:demo', *common) == 0
    written = json.loads(file.read_text())
    assert written['topology'] == 'v5e:1x1'
    labels = [plan['label'] for plan in written['plans']]
    assert labels == ['frame_mean demo', 'frame_mean demo batch_size=40 full', 'dist demo']
    assert [plan['clips_per_chip'] for plan in written['plans']] == [4, 40, 4]
    assert [plan['fits'] for plan in written['plans']] == [True, False, True]
    assert [plan['eval'] for plan in written['plans']] == [None] * 3
    out = capsys.readouterr().out
    assert all(label in out.replace('\n', ' ') for label in ('dist demo', 'frame_mean demo'))
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_ways_of_training_are_compared(compiler, tmp_path):
    file = tmp_path / 'plans.json'
    arguments = ['--config.batch_size=4', '--gradients', 'frozen', 'full', f'--json={file}']
    assert run(f'--config={DEMO}', *arguments) == 0
    frozen, full = json.loads(file.read_text())['plans']
    assert (frozen['gradients'], full['gradients']) == ('frozen', 'full')
    assert full['model_flops'] > frozen['model_flops']


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ([], '--config=FILE:VARIANT'),
        ([f'--config={DEMO}', '--compare', DEMO], 'not both'),
        (['--compare', f'{DEMO} remat=1'], 'config.FIELD=VALUE'),
        (['--compare', f'{DEMO} config.model.unrol=1'], 'unrol'),
        ([f'--config={DEMO}', '--gradients', 'half'], 'through_backbone, full'),
        ([f'--config={DEMO}', '--topology=v4:2x2'], 'v4:2x2x1'),
        ([f'--config={DEMO}', '--config.backbone.name=vit'], 'vit_b16'),
    ],
)
def test_wrong_usage_is_explained(arguments, expected, compiler, capsys):
    assert run(*arguments) == 2
    assert expected in capsys.readouterr().err
    assert len(compiler) <= 1  # the calibration


def test_a_batch_that_does_not_divide_stops_evaluation_only(compiler, monkeypatch, capsys):
    monkeypatch.setattr(compiling, 'eval_step', lambda *_: (_ for _ in ()).throw(ValueError('odd')))
    assert run(f'--config={DEMO}', '--config.batch_size=4') == 0
    assert 'eval step: odd' in capsys.readouterr().out


def test_programs_are_kept_and_damage_is_compiled_again(compiler, tmp_path):
    arguments = [f'--config={DEMO}', '--config.batch_size=4', '--no_eval', f'--cache={tmp_path}']
    assert run(*arguments) == 0
    assert run(*arguments) == 0
    assert compiler == [0, 4]
    for file in tmp_path.iterdir():
        file.write_bytes(b'damaged')
    assert run(*arguments) == 0
    assert compiler == [0, 4, 0, 4]


def test_another_compiler_is_asked_again(compiler, tmp_path, monkeypatch):
    """What is loaded decides, not which package is installed."""
    arguments = [f'--config={DEMO}', '--config.batch_size=4', '--no_eval', f'--cache={tmp_path}']
    file = tmp_path / 'plan.json'
    loaded = SimpleNamespace(platform_version='Built on Monday cl/1')
    devices = [SimpleNamespace(client=loaded)]
    monkeypatch.setattr(command, 'versions', lambda _: topology.versions(devices))
    assert run(*arguments) == 0
    assert run(*arguments) == 0
    assert compiler == [0, 4]
    loaded.platform_version = 'Built on Tuesday cl/2'
    assert run(*arguments, f'--json={file}') == 0
    assert compiler == [0, 4, 0, 4]
    versions = json.loads(file.read_text())['versions']
    assert versions['compiler'] == 'Built on Tuesday cl/2' and versions['jax'] == jax.__version__


def test_a_named_library_stands_for_the_package(monkeypatch, tmp_path):
    library = tmp_path / 'libtpu.so'
    monkeypatch.setenv('TPU_LIBRARY_PATH', str(library))
    assert topology.versions(jax.devices())['libtpu'] != str(library)  # not there: not loaded
    library.touch()
    assert topology.versions(jax.devices())['libtpu'] == str(library)
    # What jax itself names where nobody does.
    package = tmp_path / 'libtpu' / '__init__.py'
    monkeypatch.setattr(
        topology.importlib.util, 'find_spec', lambda _: SimpleNamespace(origin=str(package))
    )
    monkeypatch.setattr(topology.importlib.metadata, 'version', lambda _: '0.0.1')
    (tmp_path / 'libtpu').mkdir()
    library = library.rename(tmp_path / 'libtpu' / 'libtpu.so')
    monkeypatch.setenv('TPU_LIBRARY_PATH', str(library))
    assert topology.versions(jax.devices())['libtpu'] == '0.0.1'


def test_what_decides_the_program_names_it(monkeypatch):
    loaded = {'compiler': 'cl/1'}
    name = cache.key('module', 'v4:2x2x1', loaded)
    assert name == cache.key('module', 'v4:2x2x1', dict(loaded))
    others = (
        ('other', 'v4:2x2x1', loaded),
        ('module', 'v4:2x2x2', loaded),
        ('module', 'v4:2x2x1', {'compiler': 'cl/2'}),
    )
    assert len({name, *(cache.key(*other) for other in others)}) == 4
    monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_something=1')
    assert cache.key('module', 'v4:2x2x1', loaded) != name


@pytest.mark.slow
@pytest.mark.skipif(find_spec('libtpu') is None, reason='the TPU compiler is not installed')
def test_a_step_is_really_compiled_for_a_tpu(tmp_path):
    """In a process of its own: libtpu wants its environment before jax starts."""
    file, picture = tmp_path / 'plan.json', tmp_path / 'plan.png'
    environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    found = subprocess.run(
        [
            *(sys.executable, '-m', 'dist_jax.main', 'plan', '--topology=v4:2x2x1'),
            *('--config=configs/frame_mean.py:demo', '--config.model.unroll=false'),
            '--config.mesh.fsdp=2',
            *('--no_eval', f'--json={file}', f'--plot={picture}', f'--cache={tmp_path}'),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert found.returncode == 0, found.stderr
    assert 'WARNING' not in found.stderr and 'Traceback' not in found.stderr
    plan = json.loads(file.read_text())
    assert plan['chips'] == 4 and plan['clips_per_chip'] == 8 and plan['fits']
    assert 'TPU v4' in plan['versions']['compiler']
    # The same product that is known from outside.
    assert plan['calibration']['cycles'] == pytest.approx(4.52e6, rel=0.02)
    assert plan['estimated_cycles'] > plan['collective_cycles'] > 0
    assert plan['hbm_bytes_per_chip']['batch'] >= 8 * 8 * 48 * 48 * 3
    # The program multiplies what the model says, up to what the compiler saves.
    assert plan['compiled_flops'] == pytest.approx(plan['model_flops'], rel=0.05)
    assert any(row['name'].startswith('image_tower/') for row in plan['groups'])
    # Weights arrive while the chip computes.
    gathers = [row for row in plan['collectives'] if row['kind'] == 'all-gather']
    assert any(row['asynchronous'] and row['between_cycles'] > 0 for row in gathers)
    assert picture.read_bytes().startswith(b'\x89PNG')
