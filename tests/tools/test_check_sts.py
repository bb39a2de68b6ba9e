"""STS against the recordings: its convolutions, and a training step of each network in float64."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from tools import check_parity
from tools.parity import golden

GOLDEN = Path(__file__).parents[1] / 'golden'
# Network -> run of it; between them, of pictures and of clips, with STS and without.
RUNS = {
    'csn': 'v3d_t1_train',
    'r2plus1d': 'plain_train',
    'slowonly': 'sts_train',
    'slowfast': 'sts_train',
    'x3d': 'sts_train',
}


def test_convolutions_are_as_recorded():
    assert check_parity.main([str(GOLDEN / 'sts_conv.safetensors'), '--float64']) == 0


def _alone(network, run, path):
    """A golden file with one run of a network."""
    whole = golden.read_golden(GOLDEN / f'sts_{network}.safetensors')
    others = [f'/{name}/' for name in whole.config['runs'] if name != run]
    tensors = {
        name: value
        for name, value in whole.tensors.items()
        if not any(other in f'/{name}/' for other in others)
    }
    config = whole.config | {'runs': {run: whole.config['runs'][run]}}
    save_file(tensors, path, {'config': json.dumps(config)})
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize('network', RUNS)
def test_network_is_as_recorded(network, tmp_path):
    path, report = tmp_path / 'alone.safetensors', tmp_path / 'rows.json'
    tensors = _alone(network, RUNS[network], path)
    assert check_parity.main([str(path), '--float64', '--json', str(report)]) == 0
    rows = json.loads(report.read_text())
    recorded = [name for name in tensors if name.startswith(('outputs/', 'grads'))]
    assert sorted(row['name'] for row in rows) == sorted(recorded)
    assert any(row['name'].startswith('gradstats/') for row in rows)


def test_other_families_have_no_float64(capsys):
    path = GOLDEN / 'dist_small.safetensors'
    assert check_parity.main([str(path), '--float64']) == 2
    assert 'leave --float64 out' in capsys.readouterr().err
