"""Which products a step asks to be exact: those of float32, on every kind of device."""

import collections
import importlib
import re

import jax
import pytest

from dist_jax.plan import compiling
from dist_jax.sharding import make_mesh

PRODUCT = re.compile(r'stablehlo\.(?:dot_general|convolution).* : \((.*?)\) ->')


def products(family, dtype, head):
    """(dtypes of the factors, whether more than the quick product is asked) -> how many."""
    config = importlib.import_module(f'dist_jax.configs.{family}').get_config('demo')
    config.model.dtype, config.model.unroll, config.model.head = dtype, False, head
    one = compiling.train_step(config, make_mesh(jax.devices()[:1]))
    lowered = one.function.trace(*one.arguments.values()).lower(lowering_platforms=('cuda',))
    found = collections.Counter()
    for line in lowered.as_text().splitlines():
        if product := PRODUCT.search(line):
            kinds = frozenset(re.findall(r'x([a-z]\w*)>', product[1]))
            found[kinds, 'HIGHEST' in line] += 1
    return found


@pytest.mark.parametrize(
    ('family', 'head'), [('dist', 'text'), ('dist', 'linear'), ('evl', 'linear')]
)
def test_products_are_exact_where_they_are_float32(family, head):
    found = products(family, 'bfloat16', head)
    exact = {kinds for kinds, highest in found if highest}
    quick = {kinds for kinds, highest in found if not highest}
    assert exact == {frozenset({'f32'})}
    assert frozenset({'bf16'}) in quick and not quick & exact


def test_all_products_are_exact_in_float32():
    assert set(products('dist', 'float32', 'text')) == {(frozenset({'f32'}), True)}
