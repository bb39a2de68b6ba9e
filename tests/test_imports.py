"""Which package may import which: dependencies point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {'configs', 'input_pipeline', 'dist_jax', 'tools', 'tests'}
JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}

# Package -> what no file of it may import.
FORBIDDEN = {
    'configs': (OURS - {'configs'}) | JAX,
    'input_pipeline': (OURS - {'input_pipeline'}) | JAX,
    'dist_jax': {'tools', 'tests'},
    'tools': {'tests'},
}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, inside functions too; names that are imported
    from a package count as modules of it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}:{node.lineno}: write the whole name of the module'
            yield from ((node.lineno, f'{node.module}.{alias.name}') for alias in node.names)


def top(module: str) -> str:
    """The folder of a module; `configs` is installed inside of the package."""
    inside = module.startswith('dist_jax.configs')
    return module.split('.')[int(inside)]


@pytest.mark.parametrize('package', FORBIDDEN)
def test_no_package_imports_one_above_it(package):
    files = sorted((ROOT / package).rglob('*.py'))
    assert files
    wrong = [
        f'{path.relative_to(ROOT)}:{line} imports {module}'
        for path in files
        for line, module in imported(path)
        if top(module) in FORBIDDEN[package]
    ]
    assert not wrong, wrong


# Where families, tasks and pages are -> what they do not know.
APART = {
    'models': ('tasks', 'reports', 'plan', 'recipe', 'experiment', 'step', 'train', 'checkpoint'),
    'tasks': ('models', 'reports', 'plan', 'recipe', 'experiment', 'step', 'train', 'checkpoint'),
    'reports': ('models', 'plan', 'recipe', 'experiment', 'step', 'train', 'checkpoint'),
}


@pytest.mark.parametrize('folder', APART)
def test_families_tasks_and_pages_know_only_their_contracts(folder):
    wrong = [
        f'{path.relative_to(ROOT)}:{line} imports {module}'
        for path in sorted((ROOT / 'dist_jax' / folder).rglob('*.py'))
        for line, module in imported(path)
        if module.startswith('dist_jax.') and module.split('.')[1] in APART[folder]
    ]
    assert not wrong, wrong


def test_the_inside_of_jax_is_imported_in_one_place():
    found = {
        str(path.relative_to(ROOT))
        for package in OURS
        for path in (ROOT / package).rglob('*.py')
        for _, module in imported(path)
        if f'{module}.'.startswith('jax._src.')
    }
    assert found == {'dist_jax/jax_internals.py'}
