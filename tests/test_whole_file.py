"""Folders that appear whole or not at all, whatever was killed before."""

import subprocess
import sys

import pytest

from dist_jax import ending
from dist_jax.whole_file import folder_appearing

HOLD = (
    'import sys, time\n'
    'from dist_jax.whole_file import folder_appearing\n'
    'with folder_appearing(sys.argv[1]) as folder:\n'
    '    (folder / "half").write_text("x")\n'
    '    print("there", flush=True)\n'
    '    time.sleep(60)\n'
)


def test_a_killed_writer_leaves_nothing_to_the_next_and_a_living_one_is_left_alone(tmp_path):
    out = tmp_path / 'out'
    other = subprocess.Popen([sys.executable, '-c', HOLD, str(out)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'there\n'
        busy = pytest.raises(ending.AgainError, match='out is being made by another process')
        with busy, folder_appearing(out):
            pass
        assert (tmp_path / '.out.partial/half').exists()
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / '.out.partial/half').exists() and not out.exists()
    with folder_appearing(out) as folder:
        assert not list(folder.iterdir())
        (folder / 'whole').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['out', 'whole']


def test_what_came_to_the_place_meanwhile_stays(tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(OSError), folder_appearing(out) as folder:
        (folder / 'mine').touch()
        out.mkdir()
        (out / 'precious').touch()
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['out', 'precious']
