"""The wheel: what it installs, and that configs are found by name away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder with what the wheel holds."""
    room = tmp_path_factory.mktemp('wheel')
    source = room / 'source'
    source.mkdir()
    for name in ('dist_jax', 'configs', 'input_pipeline'):
        left_out = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '--dist-dir', str(room)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = room.glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        file.extractall(room / 'site')
    return room / 'site'


def test_nothing_of_a_common_name_is_installed(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith('.dist-info')}
    assert names == {'dist_jax', 'input_pipeline'}


def test_it_has_every_module_and_the_weights(installed):
    def files(root):
        found = (path.relative_to(root) for path in root.rglob('*') if path.suffix != '.pyc')
        return {str(path) for path in found if path.suffix and path.is_relative_to('.')}

    for package in ('dist_jax', 'input_pipeline'):
        own = {p for p in files(ROOT / package) if not p.startswith('configs')}
        assert own <= files(installed / package)
    assert files(ROOT / 'configs') == files(installed / 'dist_jax' / 'configs')


def test_configs_are_found_by_name_and_by_path(installed, tmp_path):
    script = (
        'import dist_jax, sys\n'
        'from dist_jax.config_arguments import read_config\n'
        'for name in ("dist:b16_8+16f_k400", "configs/dist.py:b16_8+16f_k400"):\n'
        '    assert read_config([f"--config={name}"]).data.name == "kinetics400"\n'
        'print(dist_jax.__file__)\n'
    )
    found = subprocess.run(
        [sys.executable, '-P', '-c', script],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(installed / 'dist_jax' / '__init__.py')
