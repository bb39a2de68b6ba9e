"""The reader of PyTorch containers: what it reads, what it refuses, and that nothing runs."""

import ast
import contextlib
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_jax.models import torch_zip
from dist_jax.models.source_files import open_source
from dist_jax.models.torch_zip import (
    CheckpointFormatError,
    Module,
    UnsafeCheckpointError,
    flatten_tensors,
    read_torch_zip,
)
from tools.fuzzing.torch_files import (
    Build,
    Global,
    New,
    Pairs,
    Persistent,
    Raw,
    Reduce,
    Saver,
    Tensor,
    assemble,
    program,
    save_state_dict,
    write_zip,
)

GOLDEN = Path(__file__).parent.parent / 'golden'


# What is read.


@pytest.mark.parametrize(
    'dtype', ['float64', 'float32', 'float16', 'int64', 'int8', 'uint8', 'bool']
)
def test_every_dtype_comes_back_bit_equal(tmp_path, dtype):
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    path = save_state_dict(tmp_path / 'a.pt', {'w': array})
    read = read_torch_zip(path).root['w']
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_bfloat16(tmp_path):
    array = np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16)
    read = read_torch_zip(save_state_dict(tmp_path / 'a.pt', {'w': array})).root['w']
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, array)


def test_views_share_a_storage(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    views = {
        'whole': Tensor('0', 'float32', 24, 0, (4, 6), (6, 1)),
        'transposed': Tensor('0', 'float32', 24, 0, (6, 4), (1, 6)),
        'part': Tensor('0', 'float32', 24, 7, (2, 3), (6, 2)),
        'expanded': Tensor('0', 'float32', 24, 5, (3, 2), (0, 1)),
        'scalar': Tensor('0', 'float32', 24, 23),
        'empty': Tensor('0', 'float32', 24, 24, (0, 6), (6, 1)),
    }
    path = write_zip(tmp_path / 'a.pt', views, {'0': storage.tobytes()})
    read = read_torch_zip(path).root
    whole = storage.reshape(4, 6)
    np.testing.assert_array_equal(read['whole'], whole)
    np.testing.assert_array_equal(read['transposed'], whole.T)
    np.testing.assert_array_equal(read['part'], [[7, 9, 11], [13, 15, 17]])
    np.testing.assert_array_equal(read['expanded'], [[5, 6]] * 3)
    assert read['scalar'].shape == () and read['scalar'] == 23
    assert read['empty'].shape == (0, 6)


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    read = read_torch_zip(save_state_dict(tmp_path / 'a.pt', {'w': np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match='read-only'):
        read.root['w'][0] = 2


def test_training_checkpoint_with_parameters_and_metadata(tmp_path):
    saver = Saver()
    weight = saver.tensor(np.ones((2, 2), np.float32))
    ordered = Reduce(Global('collections', 'OrderedDict'), ())
    parameter = Reduce(Global('torch._utils', '_rebuild_parameter'), (weight, True, ordered))
    state = {'layer.weight': parameter, 'layer.bias': saver.tensor(np.zeros(2, np.float32))}
    state = Build(state, {'_metadata': {'layer': {'version': 1}}})
    value = {
        'epoch': 3,
        'state_dict': state,
        'optimizer': {
            'state': {0: {'step': 12, 'exp_avg': saver.tensor(np.ones(4, np.float32))}},
            'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.999), 'params': [0]}],
        },
        'args': Build(New(Global('argparse', 'Namespace')), {'lr': 0.005, 'data_dir': '/data'}),
        'big': 2**60,
        'dtype': Global('torch', 'float16'),
        'shape': Reduce(Global('torch', 'Size'), ((2, 3),)),
    }
    root = read_torch_zip(saver.save(tmp_path / 'a.pt', value)).root
    assert root['epoch'] == 3 and root['big'] == 2**60 and root['shape'] == (2, 3)
    assert root['optimizer']['param_groups'][0]['betas'] == (0.9, 0.999)
    assert root['args'].attributes == {'lr': 0.005, 'data_dir': '/data'}
    assert list(flatten_tensors(root['state_dict'])) == ['layer.weight', 'layer.bias']


def test_torchscript_archive_becomes_modules():
    file = read_torch_zip(GOLDEN / 'clip' / 'openai' / 'tiny.pt')
    assert file.is_torchscript and isinstance(file.root, Module)
    tensors = flatten_tensors(file.root)
    assert tensors['visual.conv1.weight'].dtype == np.float16
    assert tensors['visual.transformer.resblocks.1.ln_1.weight'].shape == (128,)
    assert tensors['input_resolution'] == 64


def test_python_pickle_module_writes_what_is_read(tmp_path):
    """Memo, long strings, framing and nested containers of newer protocols."""
    value = {'a': [1, 2.5, None, True, 'x' * 300, b'raw'], 'b': ({'c': -1},), 'd': {1, 2}}
    for protocol in (2, 3, 4, 5):
        path = write_zip(tmp_path / f'{protocol}.pt', pickle.dumps(value, protocol))
        # Protocols below 4 spell sets and bytes as calls of builtins, which are refused.
        if protocol < 4:
            with pytest.raises(UnsafeCheckpointError):
                read_torch_zip(path)
        else:
            assert read_torch_zip(path).root == value


# What is refused, and that it does not run.


def _attacks(command: str) -> dict[str, object]:
    """Name -> value whose pickle would run `command` if anything resolved it."""
    system = Reduce(Global('os', 'system'), (command,))
    evaluate = Reduce(Global('builtins', 'eval'), (f'__import__("os").system({command!r})',))
    getattr_chain = Reduce(
        Reduce(
            Global('builtins', 'getattr'),
            (Reduce(Global('builtins', '__import__'), ('os',)), 'system'),
        ),
        (command,),
    )
    rebuild = Global('torch._utils', '_rebuild_tensor_v2')
    node = Global('__torch__', 'Node')
    ordered = Global('collections', 'OrderedDict')
    popen_inst = b'(' + assemble(command) + b'iposix\nsystem\n'
    popen_obj = b'(' + assemble(Global('posix', 'system')) + assemble(command) + b'o'
    stack_global = (
        b'\x8c\x02os\x8c\x06system\x93' + assemble((command,)) + b'R'
    )  # SHORT_BINUNICODE twice, STACK_GLOBAL
    dotted = b'\x8c\x0ctorch._utils\x8c\x0bsys.modules\x93'
    return {
        'os.system': system,
        'posix.system': Reduce(Global('posix', 'system'), (command,)),
        'nt.system': Reduce(Global('nt', 'system'), (command,)),
        'subprocess': Reduce(Global('subprocess', 'getoutput'), (command,)),
        'eval': evaluate,
        'exec': Reduce(Global('builtins', 'exec'), (f'import os; os.system({command!r})',)),
        'python 2 builtins': Reduce(Global('__builtin__', 'eval'), ('1',)),
        'getattr chain': getattr_chain,
        'torch.load': Reduce(Global('torch', 'load'), (command,)),
        'torch hub': Reduce(Global('torch.hub', 'load'), (command, 'x')),
        'numpy reconstruct': Global('numpy.core.multiarray', '_reconstruct'),
        'functools.partial': Reduce(Global('functools', 'partial'), (Global('os', 'system'),)),
        'another class of argparse': New(Global('argparse', 'FileType')),
        'called argparse.Namespace': Reduce(Global('argparse', 'Namespace'), (command,)),
        'nested in a list': {'state_dict': {}, 'extra': [1, [system]]},
        'nested in a tuple': {'extra': (1, (system, 2))},
        'as a dict key': Pairs([(system, 1)]),
        'as a dict value': {'optimizer': {'state': {0: {'step': system}}}},
        'in tensor hooks': Reduce(rebuild, (None, 0, (), (), False, system)),
        'as a storage': Reduce(rebuild, (system, 0, (), (), False, None)),
        'in a persistent id': Persistent(('storage', system, '0', 'cpu', 1)),
        'as a persistent id': Persistent(system),
        'before the end': Raw(assemble(system) + b'0' + assemble({})),
        'argument of an allowed call': Reduce(ordered, (system,)),
        'state of a module': Build(New(node), {'weight': system}),
        'call of a module class': Reduce(node, (command,)),
        'call of a storage class': Reduce(Global('torch', 'FloatStorage'), (command,)),
        'call of a string': Reduce('os.system', (command,)),
        'call of a dict': Reduce({}, (command,)),
        'call of a module': Reduce(New(node), (command,)),
        'call with a list': Reduce(ordered, [command]),
        'too many arguments': Reduce(ordered, (1, 2, 3)),
        'new with arguments': New(node, (command,)),
        'new of a function': New(rebuild),
        'new of a dict': New(ordered),
        'setstate': Build(New(node), {'__setstate__': Global('os', 'system')}),
        'setstate on a dict': Build({}, {'__setstate__': command}),
        'class swap': Build(New(node), {'__class__': command}),
        'custom state': Build(New(node), (command,)),
        'two states': Build(New(node), ({}, {'weight': command})),
        'state of a list': Build([], {'append': command}),
        'state of a string': Build('x', {'a': 1}),
        'state of a function': Build(rebuild, {'__globals__': {}}),
        'append to a dict': Raw(b'}' + assemble(1) + b'a'),
        'items of a list': Raw(b'](' + assemble(1) + assemble(2) + b'u'),
        'items of a module': Raw(assemble(New(node)) + b'(' + assemble('a') + assemble(2) + b'u'),
        'INST': Raw(popen_inst),
        'OBJ': Raw(popen_obj),
        'EXT1': Raw(b'\x82\x01'),
        'PERSID': Raw(b'Pstorage\n'),
        'NEWOBJ_EX': Raw(assemble(Global('os', 'system')) + assemble((command,)) + b'}\x92'),
        'STACK_GLOBAL': Raw(stack_global),
        'dotted name': Raw(dotted),
        'global that is no string': Raw(assemble(1) + assemble(2) + b'\x93'),
        'name with a space': Global('os system', 'x y'),
        'looks like torch': Reduce(Global('torch._utilsx', '_rebuild_tensor_v2'), (command,)),
        'looks like torchscript': Reduce(Global('__torch__x', 'Node'), (command,)),
    }


@pytest.mark.parametrize('name', _attacks('true'))
def test_attack_is_refused_and_does_not_run(tmp_path, name):
    marker = tmp_path / 'pwned'
    path = write_zip(tmp_path / 'bad.pt', _attacks(f'touch {marker}')[name])
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_torch_zip(path)
    assert not marker.exists()
    assert 'bad.pt' in str(caught.value) and 'refused' in str(caught.value)
    assert 'safetensors' in str(caught.value)


@pytest.mark.parametrize('name', ['os.system', 'eval', 'getattr chain', 'INST', 'STACK_GLOBAL'])
def test_the_payload_is_real(tmp_path, name):
    """The same programs do run under `pickle`: the test above proves something."""
    marker = tmp_path / 'pwned'
    value = _attacks(f'touch {marker}')[name]
    pickle.loads(b'\x80\x04' + program(value)[2:])
    assert marker.exists()


def test_attack_among_real_tensors_names_every_global(tmp_path):
    marker = tmp_path / 'pwned'
    saver = Saver()
    value = {
        'model': {'w': saver.tensor(np.ones(3, np.float32))},
        'args': Build(New(Global('argparse', 'FileType')), {'lr': 0.1}),
        'best': Reduce(Global('numpy.core.multiarray', 'scalar'), (1, 2)),
        'hook': Reduce(Global('os', 'system'), (f'touch {marker}',)),
    }
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_torch_zip(saver.save(tmp_path / 'a.pt', value))
    for name in ('argparse.FileType', 'numpy.core.multiarray.scalar', 'os.system'):
        assert name in str(caught.value)
    assert not marker.exists()


def test_attack_in_files_that_are_not_read_does_not_matter(tmp_path):
    marker = tmp_path / 'pwned'
    attack = program(_attacks(f'touch {marker}')['os.system'])
    saver = Saver()
    value = {'w': saver.tensor(np.ones(1, np.float32))}
    extra = {'archive/constants.pkl': attack, 'archive/code/__torch__.py': b'import os'}
    root = read_torch_zip(saver.save(tmp_path / 'a.pt', value, extra=extra)).root
    assert list(root) == ['w'] and not marker.exists()


# Damaged, foreign and absurd files.


def _broken(tmp_path: Path, storages: dict[str, bytes], **tensor) -> Path:
    fields = {'key': '0', 'dtype': 'float32', 'numel': 4, 'size': (4,), 'stride': (1,)}
    return write_zip(tmp_path / 'a.pt', {'w': Tensor(**(fields | tensor))}, storages)


@pytest.mark.parametrize(
    ('tensor', 'message'),
    [
        ({'offset': 1}, 'outside its storage'),
        ({'size': (5,)}, 'outside its storage'),
        ({'stride': (2,)}, 'outside its storage'),
        ({'size': (2, 2), 'stride': (1,)}, 'which no network has'),
        ({'offset': -1}, 'which no network has'),
        ({'stride': (-1,)}, 'which no network has'),
        ({'size': (2**62, 2**62), 'stride': (1, 1)}, 'which no network has'),
        ({'size': (2**40,), 'stride': (0,)}, 'larger than the file'),
        ({'size': (2**20, 2**20), 'stride': (0, 0)}, 'larger than the file'),
        ({'size': (1,) * 40, 'stride': (1,) * 40}, 'which no network has'),
        ({'numel': 8}, 'is declared as'),
        ({'numel': 2**60}, 'is declared as'),
        ({'numel': -4}, 'is declared as'),
        ({'dtype': 'float64'}, 'is declared as'),
        ({'key': '7'}, 'is missing'),
    ],
)
def test_absurd_tensor_is_refused(tmp_path, tensor, message):
    path = _broken(tmp_path, {'0': np.ones(4, np.float32).tobytes()}, **tensor)
    with pytest.raises(CheckpointFormatError, match=message):
        read_torch_zip(path)


@pytest.mark.parametrize('key', ['../../etc/passwd', '/etc/passwd', '..', 'a/b', '', 'x' * 65])
def test_storage_key_cannot_leave_the_archive(tmp_path, key):
    with pytest.raises(UnsafeCheckpointError, match='a storage named'):
        read_torch_zip(_broken(tmp_path, {}, key=key))


@pytest.mark.parametrize('name', ['../evil', '/etc/evil', 'archive/../../evil', 'C:evil', 'a\\b'])
def test_entry_name_cannot_leave_the_archive(tmp_path, name):
    saver = Saver()
    value = {'w': saver.tensor(np.ones(1, np.float32))}
    path = saver.save(tmp_path / 'a.pt', value, extra={name: b'x'})
    with pytest.raises(UnsafeCheckpointError, match='an entry is named'):
        read_torch_zip(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'empty'),
        (b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.' + b'x' * 100, 'before 1.6'),
        (pickle.dumps({'a': 1}), 'bare pickle'),
        (b'\0' * 257 + b'ustar' + b'\0' * 300, 'tar archive'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        (b'<!DOCTYPE html><html>', 'web page'),
        (b'\x1f\x8b\x08\x00', 'gzip'),
        (b'\x89PNG\r\n', 'not a zip archive'),
        (b'PK\x03\x04' + b'\0' * 100, 'damaged zip'),
    ],
)
def test_other_formats_are_named_with_the_way_out(tmp_path, content, message):
    path = tmp_path / 'a.pt'
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=message):
        read_torch_zip(path)


def test_truncated_and_corrupt_files(tmp_path):
    path = save_state_dict(tmp_path / 'a.pt', {'w': np.ones(1000, np.float32)})
    good = path.read_bytes()
    for cut in (10, len(good) // 2, len(good) - 10):
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointFormatError, match=r'damaged|cut short'):
            read_torch_zip(path)
    middle = good.index(np.ones(1000, np.float32).tobytes()) + 2000
    path.write_bytes(good[:middle] + b'\xff' + good[middle + 1 :])
    with pytest.raises(CheckpointFormatError, match='checksum'):
        read_torch_zip(path)


def test_every_flipped_byte_of_a_program_is_an_error_or_a_value(tmp_path):
    """No input makes the interpreter raise anything but its two errors."""
    rng = np.random.default_rng(0)
    good = program({'epoch': 1, 'w': Tensor('0', 'float32', 2, 0, (2,), (1,)), 'l': [1, (2,)]})
    storage = {'0': np.ones(2, np.float32).tobytes()}
    for _ in range(300):
        bad = bytearray(good)
        for position in rng.integers(2, len(bad), size=2):
            bad[position] = rng.integers(256)
        path = write_zip(tmp_path / 'a.pt', bytes(bad), storage)
        with contextlib.suppress(CheckpointFormatError, UnsafeCheckpointError):
            read_torch_zip(path)


@pytest.mark.parametrize(
    'code',
    [b'', b'.', b'N', b'NN.', b'(N.', b'0.', b't.', b'h\x05.', b'R.', b'b.', b'\x85.', b'u.'],
)
def test_damaged_program(tmp_path, code):
    with pytest.raises((CheckpointFormatError, UnsafeCheckpointError)):
        read_torch_zip(write_zip(tmp_path / 'a.pt', b'\x80\x02' + code))


def test_zip_bombs_are_refused(tmp_path):
    zeros = bytes(64 << 20)
    path = write_zip(
        tmp_path / 'a.pt',
        {'w': Tensor('0', 'uint8', len(zeros), 0, (len(zeros),), (1,))},
        {'0': zeros},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointFormatError, match=r'declares|compressed'):
        read_torch_zip(path)
    small = write_zip(tmp_path / 'b.pt', {'a': 1}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointFormatError, match='compressed'):
        read_torch_zip(small)


def test_declared_size_beyond_the_file_is_refused(tmp_path):
    path = save_state_dict(tmp_path / 'a.pt', {'w': np.ones(4, np.float32)})
    data = bytearray(path.read_bytes())
    entry = data.index(b'PK\x01\x02', data.index(b'PK\x01\x02', data.index(b'PK\x01\x02') + 4) + 4)
    for offset in (20, 24):  # Compressed and uncompressed size of the storage.
        data[entry + offset : entry + offset + 4] = struct.pack('<I', 50 << 20)
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match='declares'):
        read_torch_zip(path)


def test_zip_of_something_else(tmp_path):
    path = tmp_path / 'a.pt'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointFormatError, match='not one of PyTorch'):
        read_torch_zip(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', program({}))
        archive.writestr('b/data.pkl', program({}))
    with pytest.raises(CheckpointFormatError, match='2 entries'):
        read_torch_zip(path)


def test_big_endian_is_refused(tmp_path):
    extra = {'archive/byteorder': b'big'}
    with pytest.raises(CheckpointFormatError, match='byte order'):
        read_torch_zip(write_zip(tmp_path / 'a.pt', {}, extra=extra))


def test_nesting_bombs_end_in_an_error(tmp_path):
    cycle = b'}q\x00' + assemble('self') + b'h\x00s'
    with pytest.raises(CheckpointFormatError, match='nested deeper'):
        flatten_tensors(read_torch_zip(write_zip(tmp_path / 'a.pt', Raw(cycle))).root)
    # Each level holds the one below twice: 2 ** 40 leaves in a few hundred bytes.
    doubling = b'}q\x00'
    for i in range(40):
        below, here = b'h' + bytes([i]), b'q' + bytes([i + 1])
        doubling += b'0}' + here + b'(' + assemble('a') + below + assemble('b') + below + b'u'
    root = read_torch_zip(write_zip(tmp_path / 'b.pt', Raw(doubling)))
    with pytest.raises(CheckpointFormatError, match='entries'):
        flatten_tensors(root.root)
    deep = b']' * 5000 + b'a' * 4999
    assert isinstance(read_torch_zip(write_zip(tmp_path / 'c.pt', Raw(deep))).root, list)


@pytest.mark.parametrize('key', ['model', 'state_dict', 'module'])
def test_dict_that_holds_itself_is_refused_by_name(tmp_path, key):
    path = write_zip(tmp_path / 'a.pt', Raw(b'}q\x00(' + assemble(key) + b'h\x00u'))
    with pytest.raises(ValueError, match=r'a\.pt: more than 8 dicts inside each other'):
        open_source(path)


def test_values_are_quoted_shortly_and_without_control_characters(tmp_path):
    name = '\x1b[2J' + 'x' * 100_000
    path = write_zip(tmp_path / 'a.pt', {'w': New(Global('os', name)), 'v': Global(name, 'a')})
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_torch_zip(path)
    assert len(str(caught.value)) < 2000 and '\x1b' not in str(caught.value)


def test_names_that_cannot_be_printed_are_no_tensors(tmp_path):
    for name in ('a\x1b[31m', 'a\n', 'x' * 1000):
        path = save_state_dict(tmp_path / 'a.pt', {name: np.ones(1, np.float32)})
        with pytest.raises(ValueError, match=r'a\.pt: a tensor is named'):
            open_source(path)
        save_file({name: np.ones(1, np.float32)}, tmp_path / 'a.safetensors')
        with pytest.raises(ValueError, match=r'a\.safetensors: a tensor is named'):
            open_source(tmp_path / 'a.safetensors')


def test_views_of_a_small_storage_do_not_add_up(tmp_path):
    views = {f'w{k}': Tensor('0', 'uint8', 1, 0, (1 << 20,), (0,)) for k in range(30)}
    with pytest.raises(ValueError, match='declares tensors of 31457280 bytes'):
        open_source(write_zip(tmp_path / 'a.pt', views, {'0': b'x'}))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_zip(tmp_path / 'none.pt')
    with pytest.raises(FileNotFoundError):
        read_torch_zip(tmp_path)


def test_reader_imports_neither_torch_nor_pickle():
    code = ast.walk(ast.parse(Path(torch_zip.__file__).read_text()))
    imported = {alias.name for node in code if isinstance(node, ast.Import) for alias in node.names}
    assert 'pickletools' in imported and not imported & {'torch', 'pickle', 'importlib'}
