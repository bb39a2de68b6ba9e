"""The comparison with PyTorch but for PyTorch: what it is told, what is shown, what may fail."""

import io
import json
import sys

import pytest
from rich.console import Console

from tools import compare_gpu

STEP = {'device': 'gpu', 'version': 'x 1', 'parameters': 1000, 'peak_bytes': 2**31}


def shown(found):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compare_gpu.table(found))
    return console.export_text()


def test_pytorch_is_told_the_sizes_of_the_row():
    size = compare_gpu.size_of(compare_gpu.config_of('dist:b16_8+16f_k400', 32), 5)
    assert (size['width'], size['depth'], size['heads'], size['patch_size']) == (768, 12, 12, 16)
    assert (size['num_frames'], size['num_classes'], size['batch_size']) == (16, 400, 32)
    assert size['options']['alpha'] == 2 and json.loads(json.dumps(size))['steps'] == 5
    with pytest.raises(ValueError, match='--rows sts:x3d_s_k400: PyTorch has rows of dist and evl'):
        compare_gpu.config_of('sts:x3d_s_k400', 2)


def test_a_side_that_fails_is_said_and_the_other_shown(tmp_path):
    found = compare_gpu.run([sys.executable, '-c', 'raise MemoryError("too large")'])
    assert found == {'error': 'ended with 1: MemoryError: too large'}
    said = compare_gpu.run([sys.executable, '-c', 'print("hello"); print(\'{"a": 1}\')'])
    assert said == {'a': 1}
    rows = [
        {'row': 'r', 'batch': 32, 'side': 'torch', 'step_seconds': 0.5, **STEP},
        {'row': 'r', 'batch': 32, 'side': 'ours', 'step_seconds': 0.25, **STEP},
        {'row': 'r', 'batch': 64, 'side': 'torch', **found},
        {'row': 'r', 'batch': 64, 'side': 'ours', 'step_seconds': 0.5, **STEP},
    ]
    text = shown(rows)
    assert '64.0' in text and '128.0' in text and '2.00' in text and 'too large' in text
