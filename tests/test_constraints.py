"""The measured versions belong to the requirements, so that pip can install both."""

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def requirements():
    """Every requirement of setup.py, the extras' too."""
    tree = ast.parse((ROOT / 'setup.py').read_text())
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} - {'>=3.11'}
    return [Requirement(text) for text in texts if isinstance(text, str) and '>=' in text]


@pytest.fixture(scope='module')
def measured():
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pairs = (line.split('==') for line in lines if not line.startswith('#'))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_has_a_measured_version_that_it_allows(measured):
    found = requirements()
    assert len(found) > 25
    for one in found:
        version = measured.get(canonicalize_name(one.name))
        assert version and one.specifier.contains(version), f'{one}: measured {version}'


def test_the_compiler_of_the_figures_is_among_them(measured):
    assert {'jax', 'jaxlib', 'libtpu'} <= set(measured)
    assert measured['jax'] == measured['jaxlib']
