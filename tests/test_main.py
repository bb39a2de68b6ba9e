"""The console command: help, messages, config fields, folders."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_jax import main, train
from dist_jax.commands import dataset
from dist_jax.configs.inputs import INPUTS
from dist_jax.dataset.augmentations import flags

DIST = '--config=configs/dist.py:demo'


@pytest.fixture
def asked(monkeypatch):
    """Calls of `train.train` as (config, workdir), instead of training."""
    calls = []

    def record(config, workdir):
        calls.append((config, workdir))
        return {}

    monkeypatch.setattr(train, 'train', record)
    monkeypatch.setattr('dist_jax.reports.console.print_summary', lambda *_: None)
    return calls


def run(*arguments):
    """Exit code of a command."""
    try:
        return main.main(list(arguments))
    except SystemExit as exit:
        return exit.code


@pytest.mark.parametrize('command', main.COMMANDS)
def test_every_command_explains_itself_with_examples(command, capsys):
    assert run(command, '--help') == 0
    out = capsys.readouterr().out
    assert 'example' in out.lower()
    assert f'dist_jax {command} ' in out.partition('xample')[2]
    assert 'Traceback' not in out and len(out.splitlines()) < 80


@pytest.mark.parametrize('arguments', [['--help'], ['-h'], ['help']])
def test_the_overview_names_every_command(arguments, capsys):
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    for command in main.COMMANDS:
        assert f'\n  {command} ' in out
    assert 'examples:\n  dist_jax demo\n' in out


@pytest.mark.parametrize('command', ['train', 'check'])
def test_help_of_a_command_is_its_own(command, capsys):
    assert run('help', command) == 0
    said = capsys.readouterr().out
    assert run(command, '--help') == 0
    assert capsys.readouterr().out == said


def test_the_version_names_what_a_report_needs(capsys):
    assert run('--version') == 0
    assert re.match(r'dist_jax \S+, jax [\d.]+, libtpu .+, Python 3', capsys.readouterr().out)


def test_no_command_is_wrong_usage(capsys):
    assert run() == 2
    assert 'usage: dist_jax COMMAND' in ''.join(capsys.readouterr())


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['trian'], ["no command 'trian'", "Did you mean 'train'", 'evaluate, predict']),
        (['xyz'], ["no command 'xyz'", 'demo, train']),
        (['train'], ['--workdir']),
        (['train', '--workdir=w'], ['--config=FILE:VARIANT', '--config=dist:']),
        (
            ['train', '--workdir=w', '--config=configs/dist.py:b16_8+16f_k40'],
            ["no variant 'b16_8+16f_k40'", "did you mean 'b16_8+16f_k400'", 'demo'],
        ),
        (
            ['train', '--workdir=w', '--config=configs/dits.py:demo'],
            ['no file configs/dits.py; did you mean dist?'],
        ),
        (['train', '--workdir=w', '--config=base'], ['no file base', 'there are', 'dist, evl']),
        (
            ['train', '--workdir=w', DIST, '--config.optimizer.peak_rl=1'],
            ['no field', 'peak_rl', 'peak_lr', 'configs/base.py'],
        ),
        (['train', '--workdir=w', DIST, '--config.optimiser.peak_lr=1'], ['optimi']),
        (['train', '--workdir=w', DIST, '--config.batch_size=many'], ['many', 'batch_size']),
        (['train', '--workdir=w', DIST, '--config.data.flip=perhaps'], ['perhaps', 'flip']),
        (['train', '--workdir=w', DIST, '--config.optimizer=3'], ['optimizer']),
        (['train', '--workdir=w', DIST, '--num_steps=3'], ['--num_steps=3']),
        (['train', '--workdir=w', DIST, 'config.num_steps=3'], ['config.num_steps=3']),
        (
            ['train', '--workdir=w', DIST, '--config.num_steps'],
            ['num_steps needs a value', 'whole'],
        ),
        (
            ['train', '--workdir=w', DIST, '--config.batchsize=3'],
            ["no field 'batchsize'; did you mean --config.batch_size?"],
        ),
        (
            ['train', '--workdir=w', DIST, '--config.optimizer.lr'],
            ["no field 'optimizer.lr'", '--config.optimizer.peak_lr'],
        ),
        (
            ['train', '--workdir=w', DIST, '--config.num_frames=8'],
            ['did you mean --config.data.num_frames?'],
        ),
        (
            ['train', '--workdir=w', DIST, '--config.data.num_samples=2'],
            ['--config.data.num_samples is now called --config.data.repeats'],
        ),
        (
            ['train', '--workdir=w', DIST, '--config.batch_size=abc'],
            ['--config.batch_size=abc: expected a whole number, such as 32 '],
        ),
        (['train', '--workdir=w', DIST, '--config.seed', '--skip_checks'], ['seed needs a value']),
        (['train', '--workdir=w', DIST, '--config.num_epochs=nan'], ['expected a number']),
        (['train', '--workdir=w', DIST, '--config.data.resize=abc'], ['numbers in brackets']),
        (['train', '--workdir=w', DIST, '--config.data=3'], ['is a group', '--config.data.root']),
        (['train', '--workdir=w', DIST, '--config.data.root.x=3'], ['mean --config.data.root?']),
        (
            ['train', '--workdir=w', DIST, '--config.data.train_list=no', '--config.init_from=ne'],
            ['data.train_list: no file or folder no\n', 'init_from: no file or folder ne\n'],
        ),
        (['train', '--workdir=w', DIST, '--batch_size=3'], ['mean --config.batch_size?']),
        (['train', '--workdir=w', DIST, '--lr', '3'], ['--config.optimizer.peak_lr']),
        (['train', '--workdirs=w', DIST, '--workdir=w'], ['--workdirs=w; did you mean --workdir?']),
        (
            ['train', '--workdir=w', DIST, '--config.backbone.checkpoint=no'],
            ['backbone.checkpoint: no file or folder no (`dist_jax convert` makes one from CLIP)'],
        ),
        (['evaluate', '--config=configs/dist.py:demo', '--config.data.val_list=no'], ['val_list']),
        (['help', 'trian'], ["no command 'trian'", "Did you mean 'train'"]),
        (['evaluate'], ['--config=FILE:VARIANT']),
        (['evaluate', '--workdir=nowhere'], ['no folder nowhere', '--workdir']),
        (['predict', '--workdir=nowhere', 'a.mp4'], ['no folder nowhere']),
        (['predict', '--workdir=nowhere'], ['VIDEO']),
    ],
)
def test_wrong_usage_is_explained(arguments, expected, asked, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    for text in expected:
        assert text in error
    assert 'Traceback' not in error and '\\' not in error and len(error.splitlines()) < 20
    assert not asked and not list(tmp_path.iterdir())


def test_fields_are_set_in_both_forms(asked):
    arguments = ['--workdir', 'w', DIST, '--config.optimizer.peak_lr', '0.5', '--config.seed=3']
    assert run('train', *arguments, '--config.data.root', '/a b', '--config.data.flip=true') == 0
    assert run('train', '--config', 'configs/dist.py:demo', *arguments[:2]) == 0
    (first, workdir), (second, _) = asked
    assert workdir == 'w'
    assert (first.optimizer.peak_lr, first.seed, first.data.root) == (0.5, 3, '/a b')
    assert first.data.flip is True and second.data.flip is False
    assert second.seed == 0 and second.model.head == 'linear'
    assert first.is_locked


def test_tuples_and_a_variant_with_a_plus_are_read(asked):
    arguments = ['--workdir=w', '--config=configs/dist.py:b16_8+16f_ssv2']
    arguments += ['--config.model.selected_layers=(1, 2, 3)', '--config.data.crop_area=(0.5, 1.0)']
    assert run('train', *arguments) == 0
    ((config, _),) = asked
    assert tuple(config.model.selected_layers) == (1, 2, 3)
    assert tuple(config.data.crop_area) == (0.5, 1.0)
    assert config.data.name == 'something_v2'


def test_the_recipes_of_the_documentation_can_be_pasted(asked):
    for name in INPUTS:
        pasted = shlex.split(flags(name).replace('\\\n', ' '))
        assert run('train', '--workdir=w', '--config=configs/dist.py:b16_8+16f_k400', *pasted) == 0
        config, _ = asked.pop()
        for field, value in INPUTS[name].items():
            group, field = field.split('.')
            assert config[group][field] == value, (name, field)


def test_any_working_directory_will_do(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('train', '--workdir=w', DIST) == 0
    # A file of one's own is taken first.
    (tmp_path / 'configs').mkdir()
    own = [
        'from dist_jax.configs import base',
        'def get_config(_):',
        '    return base.get_config()',
    ]
    (tmp_path / 'configs' / 'dist.py').write_text('\n'.join(own))
    assert run('train', '--workdir=w', DIST) == 0
    assert ['integration_dim' in config.model for config, _ in asked] == [True, False]


def test_errors_of_the_run_are_one_message(monkeypatch, capsys):
    def fail(error):
        def train_fails(*_):
            raise error

        monkeypatch.setattr(train, 'train', train_fails)
        return run('train', '--workdir=w', DIST), capsys.readouterr().err

    code, message = fail(ValueError('data.train_list is empty'))
    assert code == 2 and 'dist_jax train: data.train_list is empty' in message
    code, message = fail(RuntimeError('too many bad videos'))
    assert code == 1 and 'too many bad videos' in message and 'DIST_JAX_TRACEBACK' in message
    code, message = fail(RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.'))
    assert code == 1 and '9 bytes.\nTraining takes less with' in message
    code, message = fail(train.NonFiniteError('step 3: loss nan'))
    assert code == 1 and 'dist_jax train: step 3: loss nan' in message
    monkeypatch.setenv('DIST_JAX_TRACEBACK', '1')
    with pytest.raises(RuntimeError, match='everything'):
        fail(RuntimeError('everything'))


@pytest.mark.slow
def test_a_relative_workdir_is_a_folder_here(clips, tmp_path, monkeypatch, capsys):
    """Training, evaluation and a second start, from the folder that holds the run."""

    def make_train_step(*_):  # nothing is to be learnt here
        names = ('loss', 'grad_norm', 'learning_rate', 'clips', 'finite')
        return lambda state, *_: (state.replace(step=state.step + 1), dict.fromkeys(names, 1.0))

    monkeypatch.setattr(train.step, 'make_train_step', make_train_step)
    monkeypatch.setattr('dist_jax.reports.page.write_report', lambda *_: None)
    monkeypatch.chdir(tmp_path)
    command = [
        '--workdir=runs/here',
        DIST,
        f'--config.data.root={os.path.relpath(clips, tmp_path)}',
        '--config.data.train_list=train.txt',
        '--config.data.label_map=labels.txt',
        '--config.data.num_frames=4',
        '--config.batch_size=4',
        '--config.model.temporal_dim=8',
        '--config.model.unroll=false',
        '--config.log.tensorboard=false',
    ]
    assert run('train', *command, '--config.num_steps=2') == 0
    assert json.loads(Path('runs/here/summary.json').read_text())['step'] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['runs']
    capsys.readouterr()
    assert run('train', *command, '--config.num_steps=3') == 2
    assert 'num_steps: saved 2, now 3' in capsys.readouterr().err
    evaluate = ['evaluate', '--workdir=runs/here', '--config.data.val_list=val.txt']
    assert run(*evaluate, '--config.eval.batch_size=2', '--output=here') == 0
    assert json.loads(Path('here/evaluation.json').read_text())['num_videos'] == 10
    # From any other folder too.
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    evaluate = ['evaluate', f'--workdir={tmp_path}/runs/here', '--config.data.val_list=val.txt']
    assert run(*evaluate, '--config.eval.batch_size=2', '--output=there') == 0
    assert json.loads(Path('there/evaluation.json').read_text())['num_videos'] == 10


def test_the_module_starts_as_the_command_does(tmp_path):
    """Without loading jax, so that help, mistakes and wrong paths answer at once."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    config = '--config=configs/dist.py:b16_8+16f_k400'
    mistakes = [
        ['train', '--workdir=w', config, '--config.data.train_list=none'],
        ['train', '--workdir=w', config, '--config.backbone.checkpoint=none'],
        ['evaluate', '--workdir=none'],
        ['evaluate', '--workdir=run', '--config.data.val_list=none'],
        ['predict', '--workdir=none', 'a.mp4'],
        ['predict', '--workdir=run', 'none.mp4'],
        ['predict', '--workdir=run', 'empty'],
        ['index', 'none', '--out=x', '--workdir=run'],
        ['index', 'empty', '--out=x', '--workdir=run'],
        ['search', 'none', 'words'],
        ['check', '--list=none'],
        ['plan', '--topology=v4:2x2x1', '--config=none.py'],
        ['trian'],
    ]
    script = (
        'import sys; from dist_jax import main\n'
        f'for mistake in {mistakes}:\n'
        '    assert main.main(mistake) == 2, mistake\n'
        '    assert "jax" not in sys.modules, mistake\n'
        'sys.exit(2)'
    )
    environment = {'PYTHONPATH': str(Path(main.__file__).parents[1]), 'PATH': ''}
    module = [['-m', name, 'trian'] for name in ('dist_jax', 'dist_jax.main')]
    for arguments in (['-c', script], *module):
        found = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert found.returncode == 2 and "Did you mean 'train'" in found.stderr


@pytest.mark.parametrize('part', dataset.PARTS)
def test_every_part_of_dataset_explains_itself(part, capsys):
    for arguments in (['dataset', part, '--help'], ['help', 'dataset', part]):
        assert run(*arguments) == 0
        assert f'dist_jax dataset {part} ' in capsys.readouterr().out


def test_a_part_of_dataset_that_is_none_is_named(capsys):
    assert run('dataset', 'bild') == 2
    assert "did you mean 'build'" in capsys.readouterr().err
    assert run('dataset') == 2
    assert 'merge-kinetics' in capsys.readouterr().out
