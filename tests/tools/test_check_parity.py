"""The parity tool: recorded runs hold, and whatever does not hold fails."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tools import check_parity
from tools.parity import golden
from tools.parity.dist import _recorded_blocks

GOLDEN = Path(__file__).parent.parent / 'golden'


def _save(path, tensors, config, **metadata):
    metadata = {key: json.dumps(value) for key, value in (metadata | {'config': config}).items()}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize('name', ['hf', 'openai', 'openclip_gelu', 'openclip_pt'])
def test_clip_container_reproduces_its_recording(name):
    rows = check_parity.check(GOLDEN / 'clip' / name)
    recorded = [n for n in load_file(GOLDEN / 'clip' / name / 'expected.safetensors') if 'out' in n]
    assert sorted(row.name for row in rows) == sorted(recorded)
    assert all(row.ok for row in rows)
    # Far inside the bound: a wrong epsilon or activation shows at about 1e-6 and 1e-2.
    assert check_parity.worst(rows, 'forward').error < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize('family', ['dist', 'evl'])
def test_family_reproduces_its_recording(family, tmp_path, capsys):
    report = tmp_path / 'rows.json'
    path = GOLDEN / f'{family}_small.safetensors'
    assert check_parity.main([str(path), '--json', str(report)]) == 0
    rows = json.loads(report.read_text())
    recorded = [n for n in load_file(path) if n.startswith(('outputs/', 'grads/'))]
    assert sorted(row['name'] for row in rows) == sorted(recorded)
    assert all(row['ok'] and row['family'] == family for row in rows)
    assert max(row['error'] for row in rows if row['kind'] == 'forward') < 1e-5
    assert max(row['error'] for row in rows if row['kind'] == 'gradient') < 1e-4
    printed = capsys.readouterr().out
    assert 'worst gradient' in printed and 'all within bounds' in printed
    assert printed.count(' yes ') == len(recorded)


def test_deviation_and_unknown_tensor_fail(tmp_path, capsys):
    folder = tmp_path / 'gelu'
    shutil.copytree(GOLDEN / 'clip' / 'openclip_gelu', folder)
    recorded = golden.read_golden(folder)
    tensors = dict(recorded.tensors)
    tensors['outputs/image_embedding'] = tensors['outputs/image_embedding'].copy()
    tensors['outputs/image_embedding'][0, 0] += 1e-3
    tensors['outputs/something_else'] = np.ones(3, np.float32)
    tensors['outputs/text_embedding'] = tensors['outputs/text_embedding'][:2].copy()
    _save(folder / 'expected.safetensors', tensors, recorded.config)
    report = tmp_path / 'rows.json'
    assert check_parity.main([str(folder), '--json', str(report)]) == 1
    failed = {row['name']: row for row in json.loads(report.read_text()) if not row['ok']}
    assert failed.keys() == {f'outputs/{n}' for n in ('image_embedding', 'something_else', 'text_embedding')}  # fmt: skip  # noqa: E501
    assert failed['outputs/something_else']['note'] == 'not compared'
    assert 'shape' in failed['outputs/text_embedding']['note']
    assert '3 outside their bounds' in capsys.readouterr().out


def test_bounds_come_from_the_command_line():
    folder = str(GOLDEN / 'clip' / 'hf')
    assert check_parity.main([folder, '--forward_bound', '1e-9']) == 1


def test_recorded_activation_is_the_one_that_is_checked(tmp_path):
    """The wrong activation is a failure of many bounds, not a near miss."""
    folder = tmp_path / 'gelu'
    shutil.copytree(GOLDEN / 'clip' / 'openclip_gelu', folder)
    recorded = golden.read_golden(folder)
    config = recorded.config | {'activation': 'quick_gelu'}
    _save(folder / 'expected.safetensors', dict(recorded.tensors), config)
    rows = check_parity.check(folder)
    assert check_parity.worst(rows, 'forward').error > 1e-3
    assert rows[0] == check_parity.worst(rows, 'forward')  # Worst first.


def test_container_of_another_geometry_is_an_error(tmp_path, capsys):
    folder = tmp_path / 'hf'
    shutil.copytree(GOLDEN / 'clip' / 'hf', folder)
    recorded = golden.read_golden(folder)
    _save(folder / 'expected.safetensors', dict(recorded.tensors), recorded.config | {'depth': 3})
    assert check_parity.main([str(folder)]) == 2
    assert 'depth converts to 2, recorded is 3' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('recorded', 'ours', 'kwargs', 'error', 'ok'),
    [
        ([1.0, -4.0], [1.0, -4.00002], {}, 5e-6, True),
        ([1.0, -4.0], [1.0, -4.0002], {}, 5e-5, False),
        ([0.0, 0.0], [0.0, 1e-6], {}, 1e-6, True),
        ([0.0, 0.0], [0.0, 1e-4], {}, 1e-4, False),
        ([1.0], [math.nan], {}, None, False),
        ([1.0], [math.inf], {}, None, False),
        ([1.0], [[1.0]], {}, None, False),
        ([1.0], None, {}, None, False),
        ([3e-9], [-5e-7], {'zero_beside': 1.0}, 5e-7, True),
        ([3e-9], [2e-5], {'zero_beside': 1.0}, 2e-5, False),
        ([3e-9], [2e-5], {'zero_beside': 10.0}, 2e-6, True),
        ([3e-9], [5e-7], {'zero_beside': 1e-3}, 5e-4, False),
        ([0.0], [5e-7], {'zero_beside': 0.0}, 5e-7, True),
    ],
)
def test_error_is_relative_to_the_largest_recorded_value(recorded, ours, kwargs, error, ok):
    ours = None if ours is None else np.array(ours)
    row = check_parity.compare('outputs/x', np.array(recorded), ours, **kwargs)
    assert row.ok == ok
    assert row.error == (None if error is None else pytest.approx(error, rel=1e-2))


@pytest.mark.parametrize(
    ('name', 'bound'),
    [('outputs/x', 1e-5), ('grads/x', 1e-4), ('eval_grads/x', 1e-4), ('8x8/grads/run/x', 1e-4)],
)
def test_gradients_have_their_own_bound(name, bound):
    assert check_parity.compare(name, np.ones(1), np.ones(1)).bound == bound


def test_golden_reader_knows_the_other_families_encodings(tmp_path):
    """Scaled int8, strided gradients, gradients that are zero on paper, prefixed variants."""
    tensors = {
        'params/w': np.array([2, -4], np.int8),
        '8x8/params/w': np.zeros(1, np.float32),
        'outputs/train/buffers/mean': np.ones(1, np.float32),
        'grads/w': np.ones(2, np.float32),
    }
    path = _save(
        tmp_path / 'a.safetensors',
        tensors,
        {'arch': 'x', 'grads_that_are_analytically_zero': ['grads/a']},
        scales={'params/w': 0.5},
        analytic_zero_grads=['b'],
        source='plain text',
    )
    read = golden.read_golden(path)
    assert read.section('params')['w'].tolist() == [1.0, -2.0]
    assert set(read.recorded) == {'outputs/train/buffers/mean', 'grads/w'}
    assert read.zero_gradients == {'grads/a', 'grads/b', 'grads_norm/b'}
    with pytest.raises(ValueError, match='none of the families'):
        check_parity.check(path)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('scales', ['w'], '`scales` of its metadata is not an object of numbers'),
        ('scales', {'params/w': None}, '`scales` of its metadata is not'),
        ('scales', {'params/v': 0.5}, "scales 'params/v', which is no tensor"),
        ('grad_stride', None, '`grad_stride` of its metadata is not an object of whole numbers'),
        ('grad_stride', {'grads/w': 1.5}, '`grad_stride` of its metadata is not'),
        ('analytic_zero_grads', 'grads/w', '`analytic_zero_grads` of its metadata is not a list'),
    ],
)
def test_metadata_that_says_nothing(tmp_path, key, value, message, capsys):
    tensors = {'params/w': np.array([2, -4], np.int8)}
    path = _save(tmp_path / 'a.safetensors', tensors, {'arch': 'x'}, **{key: value})
    assert check_parity.main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_streams_are_numbered_by_block_or_by_selection():
    def numbered(*numbers):
        tensors = {f'outputs/mid_feat.{i}': np.zeros(1) for i in numbers}
        return golden.Golden(Path(), Path(), {}, {}, tensors)

    assert _recorded_blocks(numbered(0, 1, 2), (0, 2), 3) == {0: 0, 1: 1, 2: 2}
    assert _recorded_blocks(numbered(0, 2), (0, 2), 3) == {0: 0, 1: 1, 2: 2}
    assert _recorded_blocks(numbered(0, 1), (0, 2), 3) == {0: 0, 1: 2}


@pytest.mark.parametrize('content', [b'', b'hello', b'\0' * 100])
def test_files_that_are_no_golden(tmp_path, capsys, content):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(content)
    assert check_parity.main([str(path)]) == 2
    assert check_parity.main([str(tmp_path / 'none.safetensors')]) == 2
    save_file({'a': np.ones(1, np.float32)}, path)
    assert check_parity.main([str(path)]) == 2
    assert capsys.readouterr().err.count('error: ') == 3


def test_golden_without_anything_recorded(tmp_path):
    path = _save(
        tmp_path / 'a.safetensors', {'params/w': np.ones(1, np.float32)}, {'integration_dim': 64}
    )
    with pytest.raises(ValueError, match='nothing is recorded'):
        check_parity.check(path)
