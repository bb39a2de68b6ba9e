"""Files of `tools.measure_convert` are checkpoints like those that they stand for."""

import numpy as np
import pytest

from dist_jax import convert
from dist_jax.models.naming import Options
from dist_jax.models.source_files import open_source
from tools import measure_convert


@pytest.mark.parametrize(
    ('name', 'table', 'kind', 'activation'),
    [
        ('tiny', 'dist_jax.models.clip_params:openai_rows', 'openclip', 'gelu'),
        ('eva_tiny', 'dist_jax.models.eva_params:baai_rows', 'eva', None),
    ],
)
def test_both_formats_hold_one_network(tmp_path, name, table, kind, activation):
    found = []
    for file in ('net.pt', 'net.safetensors'):
        size = measure_convert.make_file(tmp_path / file, name, {'depth': '3'}, table)
        assert size == (tmp_path / file).stat().st_size
        found.append(open_source(tmp_path / file))
    torch, safe = (source.tensors for source in found)
    assert torch.keys() == safe.keys()
    for key, tensor in torch.items():
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(tensor, safe[key])
    plan, _ = convert.read_params(found[0], kind, Options(activation, 2, 2))
    assert plan.spec['depth'] == 3
