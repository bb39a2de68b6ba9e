"""What lies on disk is what was written, or it is noticed; and nothing sound is ever moved."""

import json
import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dist_jax import checkpoint, ending, init_from, main
from dist_jax.models import clip, converted, digests, parts
from dist_jax.models.backbone import Backbone
from dist_jax.models.parts import PartedArray
from dist_jax.step import TrainState
from tools import flip_bits


def make_state(step):
    params = {
        'kernel': jnp.arange(96, dtype=jnp.float32).reshape(8, 12) + step,
        'half': {'scale': jnp.full((6,), step, jnp.bfloat16)},
    }
    moments = {'mu': jax.tree.map(jnp.zeros_like, params), 'seen': jnp.array([True, False])}
    return TrainState(
        step=jnp.int32(step), params=params, collections={}, opt_state=(moments,), ema=params
    )


def abstract_state(state=None):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state or make_state(0)
    )


def metadata(step):
    return {'format_version': checkpoint.FORMAT_VERSION, 'step': step, 'names': ['a', 'b']}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Steps 1, 2 and 3; 1 is the best."""
    workdir = tmp_path_factory.mktemp('saved')
    checkpoints = checkpoint.Checkpoints(workdir, keep=3)
    for step, top1 in ((1, 0.75), (2, 0.5), (3, None)):
        checkpoints.save(make_state(step), metadata(step))
        if top1 is not None:
            checkpoints.add_score(step, 'top1', top1)
    checkpoints.close()
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'run')


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp('converted') / 'weights'
    tree = {
        'visual': {
            'kernel': np.arange(24, dtype=np.float32).reshape(4, 6),
            'norm': {'scale': np.linspace(0, 1, 5, dtype=np.float32)},
        },
        'logit_scale': np.float32(4.6),
        'counts': np.arange(3),
    }
    converted.save_converted(path, tree, dict.fromkeys(converted.REQUIRED, 'x'))
    return path


def restore(workdir, abstract=None, **options):
    """(step, Checkpoints) of what a run would continue from."""
    checkpoints = checkpoint.Checkpoints(workdir, keep=3, **options)
    try:
        found = checkpoints.restore_latest(abstract or abstract_state())
    finally:
        checkpoints.close()
    return found and int(found[0].step)


def steps_of(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def without_digests(folder):
    """Makes a checkpoint one of format 1."""
    file = folder / 'metadata' / 'metadata'
    values = json.loads(file.read_text())
    values = {k: v for k, v in values.items() if k not in (digests.DIGESTS, digests.SEAL)}
    file.write_text(json.dumps(values | {'format_version': 1}))


def test_a_digest_depends_on_every_bit_its_place_shape_and_dtype():
    base = np.zeros((5, 3), np.uint16)
    trees = [{'a': base}, {'a': base.reshape(3, 5)}, {'a': base.view(np.int16)}, {'b': base}]
    for place in range(8 * base.nbytes):
        other = base.copy()
        other.reshape(-1).view(np.uint8)[place // 8] ^= 1 << place % 8
        trees.append({'a': other})
    wide = np.arange(2**17, dtype=np.int64)  # of several pieces, two words each
    swapped = wide.copy()
    swapped[[3, 2**16]] = swapped[[2**16, 3]]
    trees += [{'a': wide}, {'a': swapped}, {'a': np.float32(0)}, {'a': np.float32(-0.0)}]
    found = {json.dumps(digests.digests(tree)) for tree in trees}
    assert len(found) == len(trees)
    assert digests.digests({'a': wide})['a'][0] == 'int64'


def test_no_flipped_bit_of_a_checkpoint_loads_as_another_value(saved):
    template = ocp.PyTreeCheckpointHandler().metadata(
        (saved / 'checkpoints' / '1' / 'state').resolve()
    )
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template.tree)
    counts = flip_bits.flip_many(
        saved / 'checkpoints' / '1',
        lambda folder: flip_bits.read_checkpoint(item, folder),
        120,
        random.Random(0),
    )
    assert counts[flip_bits.OTHER] == 0
    assert counts[flip_bits.DETECTED] > 15


def test_no_flipped_bit_of_a_backbone_loads_as_another_value(backbone):
    counts = flip_bits.flip_many(backbone, flip_bits.read_backbone, 120, random.Random(1))
    assert counts[flip_bits.OTHER] == 0
    assert counts[flip_bits.DETECTED] > 15


def test_a_flip_in_an_array_is_noticed_wherever_it_is_read_to(backbone, tmp_path, monkeypatch):
    path = shutil.copytree(backbone, tmp_path / 'weights')
    rows = converted.load_metadata(path)[digests.DIGESTS]
    rows['visual/kernel'][2] = '0' * 32  # as if its bits had changed
    values = converted.load_metadata(path) | {digests.DIGESTS: rows}
    values.pop(digests.SEAL)
    (path / 'metadata' / 'metadata').write_text(json.dumps(digests.seal(values)))
    for options in ({}, {'as_numpy': True}, {'dtype': jnp.bfloat16}):
        with pytest.raises(ValueError, match=r'1 of \d arrays .* visual/kernel$'):
            converted.load_params(path, ['visual'], **options)
        part = converted.load_params(path, ['visual/norm', 'logit_scale'], **options)
        assert part['logit_scale'] == np.float32(4.6)
    loaded = converted.load_params(path, ['visual'], verify=False)['visual']['kernel']
    np.testing.assert_array_equal(loaded, np.arange(24).reshape(4, 6))


@pytest.fixture(scope='module')
def stacks(tmp_path_factory):
    """Two stacks in pieces of two kinds: several layers each, and a layer in several."""
    values = np.random.default_rng(0).normal(size=(6, 64, 48)).astype(np.float32)
    parted = PartedArray(values.shape, values.dtype, lambda i, j: values[i:j].copy(), stacked=True)
    path = tmp_path_factory.mktemp('converted') / 'stacks'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted, 'CHUNK_BYTES', 2**14)
        patch.setattr(converted, 'LAYER_CHUNK_BYTES', 2**12)
        patch.setattr(parts, 'PART_BYTES', 3 * values[0].nbytes // 2)
        tree = {'whole': {'kernel': values}, 'parts': {'kernel': parted}, 'scale': values[0, 0]}
        stored = converted.save_converted(path, tree, dict.fromkeys(converted.REQUIRED, 'x'))
    assert stored[digests.DIGESTS]['whole/kernel'] == stored[digests.DIGESTS]['parts/kernel']
    return path, values


def test_a_stack_that_is_written_in_parts_is_cut_by_layers(stacks):
    path, values = stacks
    tree = ocp.PyTreeCheckpointHandler().metadata((path / 'params').resolve()).tree
    assert tree['parts']['kernel'].storage.chunk_shape[0] == 1
    assert tree['whole']['kernel'].storage.chunk_shape[0] > 1
    found = converted.load_params(path, as_numpy=True)
    for name in ('whole', 'parts'):
        np.testing.assert_array_equal(found[name]['kernel'], values)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('as_numpy', [False, True])
def test_a_large_array_is_compared_and_cast_in_slices(stacks, monkeypatch, dtype, as_numpy):
    path, values = stacks
    monkeypatch.setattr(converted, 'SLICE_BYTES', 2**15)
    sizes, add = [], digests.Digest.add

    def note(self, part, start):
        sizes.append(part.nbytes)
        add(self, part, start)

    monkeypatch.setattr(digests.Digest, 'add', note)
    found = converted.load_params(path, dtype=dtype, as_numpy=as_numpy)
    for name in ('whole', 'parts'):
        kernel = found[name]['kernel']
        assert isinstance(kernel, np.ndarray if as_numpy else jax.Array)
        assert kernel.dtype == dtype
        np.testing.assert_array_equal(kernel, values.astype(dtype))
    assert max(sizes) <= 2**15 and sum(sizes) == 2 * values.nbytes + 4 * 48
    rows = converted.load_metadata(path)[digests.DIGESTS]
    rows = {name: [*row[:2], '0' * 32] for name, row in rows.items()}
    with pytest.raises(ValueError, match=r'1 of 1 arrays .* parts/kernel$'):
        converted.read_tree(
            converted.absolute_path(path / 'params'),
            {'parts': {'kernel': jax.ShapeDtypeStruct(values.shape, dtype)}},
            rows,
            as_numpy=True,
        )


@pytest.mark.parametrize('box', [((0, 6), (0, 64)), ((2, 5), (8, 40)), ((1, 2), (3, 60))])
@pytest.mark.parametrize('pieces', [(1, 16), (6, 8), (2, 64)])
@pytest.mark.parametrize('most', [1, 500, 2**20])
def test_slices_cover_a_box_once_and_cut_no_piece(monkeypatch, box, pieces, most):
    monkeypatch.setattr(converted, 'SLICE_BYTES', most)
    seen = np.zeros((6, 64), int)
    for block in converted._slices(box, pieces, 4):
        seen[tuple(slice(*ends) for ends in block)] += 1
        for ends, whole, piece in zip(block, box, pieces):
            assert all(end % piece == 0 or end in whole for end in ends)
    inside = np.zeros((6, 64), int)
    inside[tuple(slice(*ends) for ends in box)] = 1
    np.testing.assert_array_equal(seen, inside)


@pytest.mark.parametrize('content', [b'', b'{"top1": 0.9}', b'\xff\x00', b'[1]'])
def test_an_unreadable_score_means_not_scored_and_nothing_else(run, content):
    (run / 'checkpoints' / '1' / checkpoint.SCORE).write_bytes(content)
    assert restore(run) == 3
    assert checkpoint.Checkpoints(run).best() == (2, 0.5)
    assert steps_of(run / 'checkpoints') == [1, 2, 3]
    assert not (run / 'checkpoints-broken').exists()


@pytest.mark.parametrize('content', ['', '{"val_', '{"val_top1": -1.0}', '{"val_top1": 0.625}'])
def test_a_checkpoint_of_format_1_loads_and_its_metrics_cannot_stop_it(run, caplog, content):
    for step in (1, 2, 3):
        folder = run / 'checkpoints' / str(step)
        without_digests(folder)
        (folder / checkpoint.SCORE).unlink(missing_ok=True)
        (folder / 'metrics').mkdir()
        (folder / 'metrics' / 'metrics').write_text(content)
    with caplog.at_level(logging.INFO, 'dist_jax'):
        assert restore(run) == 3
    assert caplog.text.count('has no digests') == 1
    assert steps_of(run / 'checkpoints') == [1, 2, 3]
    best = checkpoint.Checkpoints(run).best()
    assert best == ((3, 0.625) if '0.6' in content else None)
    with pytest.raises(ValueError, match='saved absent, now float32'):
        restore(run, abstract_state(make_state(0).replace(collections={'new': jnp.zeros(3)})))


def failing(monkeypatch, times, error):
    """Lets so many reads of arrays fail; returns how many were tried."""
    tried = []
    original = ocp.PyTreeCheckpointHandler.restore

    def read(self, *args, **kwargs):
        tried.append(1)
        if len(tried) <= times:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'restore', read)
    monkeypatch.setattr(converted, 'RETRY_SECONDS', (0, 0, 0))
    return tried


ERRORS = [
    OSError(5, 'Input/output error'),
    ValueError('UNAVAILABLE: connection reset by peer'),
    Exception('INTERNAL: Error reading "d/12": [OS error 116: ESTALE Stale file handle]'),
]


@pytest.mark.parametrize('error', ERRORS)
def test_a_read_error_that_passes_is_outlived(run, monkeypatch, error):
    tried = failing(monkeypatch, 2, error)
    assert restore(run) == 3 and len(tried) == 3
    assert not (run / 'checkpoints-broken').exists()


@pytest.mark.parametrize('error', ERRORS)
def test_a_read_error_that_stays_asks_for_a_restart_and_moves_nothing(
    run, backbone, monkeypatch, error
):
    tried = failing(monkeypatch, 10**6, error)
    with pytest.raises(ending.AgainError, match='Nothing was changed'):
        restore(run)
    assert len(tried) == 4
    assert steps_of(run / 'checkpoints') == [1, 2, 3]
    assert not (run / 'checkpoints-broken').exists()
    with pytest.raises(ending.AgainError):
        converted.load_params(backbone)


def test_a_restart_is_asked_for_by_the_exit_code(monkeypatch, capsys):
    def fail(argv):
        raise ending.AgainError('the disk is away')

    monkeypatch.setattr(main.COMMANDS['train'], 'run', fail)
    assert main.main(['train']) == ending.AGAIN == 75
    assert 'the disk is away' in capsys.readouterr().err


def test_another_state_is_an_error_that_lists_it_and_moves_nothing(run):
    other = make_state(0)
    other = other.replace(
        params={**other.params, 'kernel': jnp.zeros((8, 13))},
        ema=None,
        collections={'n': jnp.int32(0)},
    )
    with pytest.raises(ValueError) as error:
        restore(run, abstract_state(other))
    message = str(error.value)
    assert 'params/kernel: saved float32[8, 12], now float32[8, 13]' in message
    assert 'ema/half/scale: saved bfloat16[6], now absent' in message
    assert 'collections/n: saved absent, now int32[]' in message
    assert 'opt_state' not in message
    assert steps_of(run / 'checkpoints') == [1, 2, 3]
    assert not (run / 'checkpoints-broken').exists()


def test_damage_moves_no_step_before_an_older_one_was_read(run, monkeypatch):
    (run / 'checkpoints' / '3' / 'metadata' / 'metadata').write_text('{')
    failing(monkeypatch, 10**6, ERRORS[0])
    with pytest.raises(ending.AgainError):
        restore(run)
    assert steps_of(run / 'checkpoints') == [1, 2, 3]
    monkeypatch.undo()
    assert restore(run) == 2
    assert steps_of(run / 'checkpoints') == [1, 2]
    assert steps_of(run / 'checkpoints-broken') == [3]


def test_a_run_whose_checkpoints_are_all_broken_does_not_start_anew(run):
    for step in (1, 2, 3):
        (run / 'checkpoints' / str(step) / 'metadata' / 'metadata').write_text('')
    for _ in range(2):  # the second start finds an empty folder
        with pytest.raises(RuntimeError, match='checkpoints-broken'):
            restore(run)
    assert steps_of(run / 'checkpoints-broken') == [1, 2, 3]


def test_the_comparison_can_be_left_out(run):
    file = run / 'checkpoints' / '3' / 'metadata' / 'metadata'
    values = json.loads(file.read_text())
    values.pop(digests.SEAL)
    values[digests.DIGESTS]['params/kernel'][2] = '0' * 32
    file.write_text(json.dumps(digests.seal(values)))
    assert restore(run, verify=False) == 3
    assert restore(run) == 2


def test_the_best_step_is_found_by_name(run):
    assert checkpoint.find_checkpoint(run, 'best').name == '1'
    assert checkpoint.find_checkpoint(run, '2').name == '2'
    assert checkpoint.find_checkpoint(run).name == '3'
    for step in (1, 2):
        (run / 'checkpoints' / str(step) / checkpoint.SCORE).unlink()
    with pytest.raises(ValueError, match=r'no checkpoint .* validation score; .* \[1, 2, 3\]'):
        checkpoint.find_checkpoint(run, 'best')
    with pytest.raises(ValueError, match='no checkpoint of step bets'):
        checkpoint.find_checkpoint(run, 'bets')


def test_starting_from_a_run_on_another_backbone_is_said(tmp_path, caplog):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    of_run = {'name': 'vit_b16', 'params_sha256': 'a' * 64}
    checkpoints.save(make_state(1), metadata(1) | {'backbone': of_run})
    checkpoints.close()
    for sha256 in ('a' * 64, 'b' * 64):
        own = Backbone(clip.KIND, clip.SPECS['tiny'], 'path', 'own', sha256)
        init_from.compare_backbones(str(tmp_path), own)
    (record,) = caplog.records
    assert 'weights aaaaaaaaaaaa of vit_b16' in record.getMessage()
    assert 'weights bbbbbbbbbbbb of own' in record.getMessage()
