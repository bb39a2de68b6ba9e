"""The conversion engine: both directions, complete on both sides, one error that names all."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_jax.models import digests, params, parts
from dist_jax.models.params import (
    ALL,
    ConversionError,
    Row,
    export_file,
    export_tree,
    import_tree,
    outgoing,
)
from dist_jax.models.parts import PartedArray

WIDTH, HEADS, DEPTH = 6, 2, 3


def _rows():
    rows = [
        Row('conv.weight', 'conv/kernel', 'o i t h w -> t h w i o'),
        Row('cls', 'cls', '1 1 c -> c'),
        Row('scale', 'scale'),
    ]
    for i in range(DEPTH):
        rows.append(Row(f'blocks.{i}.norm.weight', 'blocks/norm/scale', index=(i,)))
        for slot, letter in enumerate('qkv'):
            rows.append(
                Row(
                    f'blocks.{i}.{letter}.weight',
                    'blocks/qkv/kernel',
                    '(h d) w -> w h d',
                    (i, ALL, slot),
                    {'h': HEADS},
                )
            )
    return rows


def _abstract(dtype=jnp.float32):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        {
            'conv': {'kernel': (3, 2, 2, 4, 5)},
            'cls': (WIDTH,),
            'scale': (),
            'blocks': {
                'norm': {'scale': (DEPTH, WIDTH)},
                'qkv': {'kernel': (DEPTH, WIDTH, 3, HEADS, WIDTH // HEADS)},
            },
        },
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {'conv.weight': (5, 4, 3, 2, 2), 'cls': (1, 1, WIDTH), 'scale': ()}
    for i in range(DEPTH):
        shapes[f'blocks.{i}.norm.weight'] = (WIDTH,)
        shapes |= {f'blocks.{i}.{letter}.weight': (WIDTH, WIDTH) for letter in 'qkv'}
    return {name: np.asarray(rng.normal(size=s)).astype(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_equal(dtype):
    tensors = _tensors(dtype)
    tree = import_tree(tensors, _rows(), _abstract(dtype))
    back = export_tree(tree, _rows())
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], value)


def test_tensors_land_where_the_table_says():
    tensors = _tensors()
    tree = import_tree(tensors, _rows(), _abstract())
    np.testing.assert_array_equal(
        tree['conv']['kernel'], tensors['conv.weight'].transpose(2, 3, 4, 1, 0)
    )
    # Row h * d of a query weight is channel d of head h.
    kernel = tree['blocks']['qkv']['kernel']
    np.testing.assert_array_equal(kernel[2, :, 1, 1, 0], tensors['blocks.2.k.weight'][3])
    assert tree['scale'].shape == ()


def test_imported_leaves_are_copies():
    tensors = _tensors()
    tree = import_tree(tensors, _rows(), _abstract())
    tree['conv']['kernel'][:] = 0
    assert tensors['conv.weight'].any()


def test_dtype_is_that_of_the_target_or_kept():
    tensors = _tensors(np.float16) | {'blocks.1.q.weight': np.zeros((WIDTH, WIDTH), np.float32)}
    tree = import_tree(tensors, _rows(), _abstract(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(ml_dtypes.bfloat16)}
    tree = import_tree(tensors, _rows(), _abstract(), keep_dtype=True)
    assert tree['conv']['kernel'].dtype == np.float16
    assert tree['blocks']['qkv']['kernel'].dtype == np.float32  # The widest of the stack.


def test_one_error_names_everything_that_is_wrong():
    tensors = _tensors()
    del tensors['blocks.1.v.weight'], tensors['cls']
    tensors['extra'] = np.zeros(2)
    tensors['conv.weight'] = np.zeros((5, 4, 3, 7, 7), np.float32)
    tensors['scale'] = np.zeros((), np.int64)
    with pytest.raises(ConversionError) as caught:
        import_tree(tensors, _rows(), _abstract(), context='file.pt')
    error = caught.value
    assert error.unused == ['extra (2,)']
    assert sorted(error.unfilled) == [
        'blocks/qkv/kernel[1,:,2] (from blocks.1.v.weight)',
        'cls (6,) (from cls)',
    ]
    assert len(error.mismatched) == 2
    shapes = next(line for line in error.mismatched if 'conv' in line)
    assert '(5, 4, 3, 7, 7)' in shapes and '(3, 2, 2, 4, 5)' in shapes
    message = str(error)
    for part in ('file.pt', 'extra', 'blocks.1.v.weight', '(3, 7, 7, 4, 5)', 'int64'):
        assert part in message


def test_target_without_any_row_is_unfilled():
    with pytest.raises(ConversionError, match=r'blocks/norm/scale\[1\]'):
        import_tree(_tensors(), [r for r in _rows() if '1.norm' not in r.source_name], _abstract())
    with pytest.raises(ConversionError) as caught:
        import_tree({}, [], {'a': {'b': jax.ShapeDtypeStruct((2, 3), jnp.float32)}})
    assert caught.value.unfilled == ['a/b (2, 3)']


def test_duplicates_and_rows_that_point_nowhere():
    rows = [*_rows(), Row('scale', 'cls2'), Row('again', 'cls'), Row('far', 'cls', index=(99,))]
    with pytest.raises(ConversionError) as caught:
        import_tree(_tensors(), rows, _abstract())
    assert caught.value.duplicates == ['scale', 'cls (by again)']
    assert any('cls2' in line for line in caught.value.mismatched)
    assert any('cls[99]' in line for line in caught.value.mismatched)


def test_ignored_names_and_patterns():
    tensors = _tensors() | {'bn.num_batches_tracked': np.zeros(()), 'mask': np.zeros(3)}
    import_tree(tensors, _rows(), _abstract(), ignore=('mask', '*.num_batches_tracked'))
    with pytest.raises(ConversionError) as caught:
        import_tree(tensors, _rows(), _abstract(), ignore=('mas',))
    assert len(caught.value.unused) == 2


def test_constant_slots_for_what_a_format_leaves_out():
    """EVA-CLIP stores query and value biases only."""
    rows = [
        Row('q_bias', 'bias', '(h d) -> h d', (0,), {'h': 2}),
        Row(None, 'bias', index=(1,), fill=0.0),
        Row('v_bias', 'bias', '(h d) -> h d', (2,), {'h': 2}),
    ]
    tensors = {'q_bias': np.ones(4, np.float32), 'v_bias': np.full(4, 2, np.float32)}
    tree = import_tree(tensors, rows, {'bias': jax.ShapeDtypeStruct((3, 2, 2), jnp.float32)})
    np.testing.assert_array_equal(tree['bias'][:, 0, 0], [1, 0, 2])
    assert export_tree(tree, rows).keys() == tensors.keys()
    tree['bias'][1] = 3
    with pytest.raises(ConversionError, match='has no place in the file unless it is 0'):
        export_tree(tree, rows)


def test_float16_overflow_is_an_error():
    row, target = [Row('a', 'a')], {'a': jax.ShapeDtypeStruct((2,), jnp.float16)}
    with pytest.raises(ConversionError, match='overflows float16'):
        import_tree({'a': np.array([1, 1e6], np.float32)}, row, target)


def test_export_is_complete_too():
    tree = import_tree(_tensors(), _rows(), _abstract())
    tree['head'] = {'kernel': np.zeros((2, 2))}
    with pytest.raises(ConversionError, match=r'head/kernel \(2, 2\): no row'):
        export_tree(tree, _rows())
    del tree['head'], tree['cls']
    with pytest.raises(ConversionError, match='cls: the model has no such parameter'):
        export_tree(tree, _rows())


def test_precision_keeps_norms_and_logit_scale():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    tree = {
        'ln': {'scale': leaf(2), 'bias': leaf(2)},
        'linear': {'kernel': leaf(2, 2), 'bias': leaf(2)},
        'logit_scale': leaf(),
        'count': jax.ShapeDtypeStruct((), jnp.int32),
    }
    dtypes = {
        path: x.dtype for path, x in params.flatten(params.with_precision(tree, 'bfloat16')).items()
    }
    assert dtypes == {
        'count': jnp.int32,
        'linear/bias': jnp.bfloat16,
        'linear/kernel': jnp.bfloat16,
        'ln/bias': jnp.float32,
        'ln/scale': jnp.float32,
        'logit_scale': jnp.float32,
    }


def test_digest_sees_every_bit_and_no_order():
    tree = {'b': {'x': np.arange(3, dtype=np.float32)}, 'a': np.float16(1)}
    same = {'a': jnp.float16(1), 'b': {'x': jnp.arange(3, dtype=jnp.float32)}}
    digest = params.tree_sha256(tree)
    assert len(digest) == 64 and params.tree_sha256(same) == digest
    changed = [
        {'b': {'x': np.array([0, 1, 2.0000002], np.float32)}, 'a': np.float16(1)},
        {'b': {'y': np.arange(3, dtype=np.float32)}, 'a': np.float16(1)},
        {'b': {'x': np.arange(3, dtype=np.float32)[None]}, 'a': np.float16(1)},
        {'b': {'x': np.arange(3, dtype=np.int32)}, 'a': np.float16(1)},
        {'b': {'x': np.arange(3, dtype=np.float32)}, 'a': ml_dtypes.bfloat16(1)},
    ]
    assert len({digest, *map(params.tree_sha256, changed)}) == 6


def test_flatten_and_back():
    tree = {'b': {'d': 1, 'c': {'e': 2}}, 'a': 3}
    assert list(params.flatten(tree)) == ['a', 'b/c/e', 'b/d']
    assert params.unflatten(params.flatten(tree)) == tree


def test_hidden_ratio_survives_truncation():
    pairs = [(hidden, width) for width in (49, 96, 768) for hidden in range(1, 2000)]
    assert any(int(width * (hidden / width)) != hidden for hidden, width in pairs)
    assert all(int(width * params.hidden_ratio(hidden, width)) == hidden for hidden, width in pairs)


def test_a_block_that_is_missing_takes_no_memory():
    """A file of one block may claim a thousand: nothing is made before all of them are there."""
    rows = [Row(f'{k}', 'stack', index=(k,)) for k in range(1000)]
    target = {'stack': jax.ShapeDtypeStruct((1000, 1 << 30), jnp.float32)}
    tensor = np.broadcast_to(np.float32(1), (1 << 30,))
    with pytest.raises(ConversionError) as caught:
        import_tree({'0': tensor}, rows, target)
    assert len(caught.value.unfilled) == 999
    assert 'and 799 more' in str(caught.value)


def test_tensors_that_are_not_finite_are_named_after_the_cast():
    tensors = _tensors()
    tensors['cls'][0, 0, 2] = np.nan
    tensors['blocks.1.k.weight'] = np.full((WIDTH, WIDTH), 3.4e38, np.float32)
    tree = import_tree(tensors, _rows(), _abstract(jnp.bfloat16))
    assert params.non_finite(tree, _rows()) == ['cls', 'blocks.1.k.weight']
    assert params.non_finite(import_tree(tensors, _rows(), _abstract()), _rows()) == ['cls']


class Counting(dict):
    """Tensors that tell which of them were read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def _split_biases():
    """A stack of q, k, v biases of which the format leaves one out, and its tensors."""
    rows, tensors = [Row('scale', 'scale')], {'scale': np.float16(3)}
    for i in range(DEPTH):
        rows.append(Row(None, 'bias', index=(i, 1), fill=0.0))
        for slot, letter in ((0, 'q'), (2, 'v')):
            name = f'{i}.{letter}_bias'
            rows.append(Row(name, 'bias', '(h d) -> h d', (i, slot), {'h': HEADS}))
            tensors[name] = np.linspace(i, 9, WIDTH).astype(np.float16)
    shapes = {'scale': (), 'bias': (DEPTH, 3, HEADS, WIDTH // HEADS)}
    return rows, tensors, {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize('part_bytes', [1, 2 * 4 * WIDTH * 3 * WIDTH, 2**26])
@pytest.mark.parametrize(
    'table', [lambda: (_rows(), _tensors(np.float16), _abstract(jnp.bfloat16)), _split_biases]
)
def test_parts_are_the_tree(monkeypatch, table, part_bytes):
    monkeypatch.setattr(parts, 'PART_BYTES', part_bytes)
    rows, tensors, abstract = table()
    last = rows[-1].source_name
    tensors[last] = np.full_like(tensors[last], np.nan)
    tree = import_tree(tensors, rows, abstract)
    parted = import_tree(tensors, rows, abstract, parted=True)
    assert jax.tree.structure(tree) == jax.tree.structure(parted)
    for leaf, made in zip(jax.tree.leaves(tree), jax.tree.leaves(parted)):
        assert isinstance(made, PartedArray)
        assert (made.shape, made.dtype, made.nbytes) == (leaf.shape, leaf.dtype, leaf.nbytes)
        found = [part for part, _ in made.parts()]
        assert np.concatenate(found).tobytes() == leaf.tobytes() if leaf.ndim else len(found) == 1
    assert params.count(parted) == params.count(tree)
    assert params.tree_sha256(parted) == params.tree_sha256(tree)
    assert digests.digests(parted) == digests.digests(tree)
    assert (
        params.non_finite(parted, rows) == params.non_finite(tree, rows) == [rows[-1].source_name]
    )


def test_a_layer_is_made_of_its_own_tensors_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    tensors = Counting(_tensors())
    kernel = import_tree(tensors, _rows(), _abstract(), parted=True)['blocks']['qkv']['kernel']
    tensors.read.clear()  # shapes were compared
    for part, layer in kernel.parts():
        assert part.shape == (1, *kernel.shape[1:])
        assert tensors.read == [f'blocks.{layer}.{letter}.weight' for letter in 'qkv']
        tensors.read.clear()


def test_files_are_laid_out_as_the_library_does(tmp_path):
    tree = {
        'a': np.arange(6, dtype=np.float32).reshape(2, 3),
        'b': {'scale': np.ones(3, np.float16), 'x': np.array(2.5, jnp.bfloat16)},
        'c': np.zeros((0, 4), np.float64),
    }
    rows = [Row('z', 'a', 'i o -> o i'), *(Row(path, path) for path in ('b/scale', 'b/x', 'c'))]
    export_file(outgoing(tree, rows, 'net.'), tmp_path / 'ours')
    written = {f'net.{name}': value for name, value in export_tree(tree, rows).items()}
    save_file(written, tmp_path / 'theirs', metadata={'format': 'pt'})
    assert (tmp_path / 'ours').read_bytes() == (tmp_path / 'theirs').read_bytes()
    twice = outgoing(tree, rows) * 2
    with pytest.raises(ConversionError, match='would have names twice'):
        export_file(twice, tmp_path / 'twice')
    assert not (tmp_path / 'twice').exists()
