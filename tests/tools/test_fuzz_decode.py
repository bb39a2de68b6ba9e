import json

import numpy as np
import pytest

from input_pipeline.decode import KINDS
from tools import fuzz_decode


def test_damaged_files_never_crash_or_hang_a_reader(tmp_path, capsys):
    report = tmp_path / 'figures.json'
    assert fuzz_decode.main(['--files', '180', '--json', str(report), '--timeout', '60']) == 0
    figures = json.loads(report.read_text())
    assert figures['files'] == sum(figures['kinds'].values()) == 180
    assert figures['restarts'] == 0
    assert 0 < figures['peak_mib'] < 500
    assert set(figures['kinds']) <= {'read', *KINDS}
    assert len(figures['kinds']) >= 4
    assert {sum(row.values()) for row in figures['kinds_by_damage'].values()} == {20}
    assert '180 files in' in capsys.readouterr().out


@pytest.mark.parametrize('name', fuzz_decode.MUTATIONS)
def test_every_damage_changes_a_file_and_is_the_same_for_a_seed(tmp_path, name):
    path = tmp_path / 'v.mp4'
    fuzz_decode.write_seed(path, *fuzz_decode.SEEDS['short.mp4'])
    data = path.read_bytes()
    damage = fuzz_decode.MUTATIONS[name]
    first, again, other = (damage(data, data[::-1], np.random.default_rng(k)) for k in (1, 1, 2))
    assert first == again != other
    assert first != data
