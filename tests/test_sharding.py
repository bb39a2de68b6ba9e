"""Rules, meshes and parts of a batch, without devices: shapes and names only."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dist_jax import sharding, step, train
from dist_jax.configs import dist, evl, frame_mean
from dist_jax.models import converted
from dist_jax.plan import compiling
from dist_jax.sharding import ShardingRule, check_replicated_share, place

ROWS = [
    (file, name)
    for file in (dist, evl, frame_mean)
    for name in file.VARIANTS
    if name not in ('demo', 'world')  # too small to be split
]


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def shapes(file, name):
    """Model, state and frozen tree of a row, as shapes."""
    config = file.get_config(name)
    parts = compiling.assemble(config)
    model, frozen = parts.model, parts.abstract_frozen()
    settings = train.optimizer_settings(config, train.make_plan(config, 1000))
    initialise = train.state_initialiser(config, model, parts.task, parts.train_shape, settings)
    return model, jax.eval_shape(initialise, frozen), frozen


def specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(('file', 'name'), ROWS, ids=[f'{f.__name__}-{n}' for f, n in ROWS])
def test_rules_split_nearly_all_of_every_row(file, name):
    model, state, frozen = shapes(file, name)
    mesh = mesh_of(4, 16, 2)
    placed = step.place_state(model, state, mesh)
    check_replicated_share(placed.params, mesh, 'parameters', small_bytes=0)
    frozen = model.frozen.place(frozen, mesh)
    check_replicated_share(frozen, mesh, 'weights', ('fsdp', 'tensor'), small_bytes=0)
    raw = model.frozen.backbone.abstract_params()
    raw = raw if model.frozen.reads_classes else {'visual': raw['visual']}
    check_replicated_share(
        place(raw, model.frozen.rules, mesh), mesh, 'weights', ('fsdp',), small_bytes=0
    )
    # Moments lie as their parameters, and a layer of a stack is whole on one device.
    moments = [part for part in placed.opt_state if isinstance(part, optax.ScaleByAdamState)]
    assert len(moments) == 1
    assert specs(moments[0].mu) == specs(moments[0].nu) == specs(placed.params)
    assert moments[0].count.sharding.spec == placed.step.sharding.spec == PartitionSpec()
    for path, where in (specs(placed.params) | specs(frozen)).items():
        if path.split('/')[0] == 'layers' or '/blocks/' in path:
            assert not where or where[0] is None, path


def test_every_rule_is_used():
    known, used = set(), set()
    for file, name in ((dist, 'b16_8+16f_k400'), (evl, 'b16_8f_k400'), (frame_mean, 'b16_8f_k400')):
        model, state, frozen = shapes(file, name)
        for tree, rules in (
            (state.params, model.sharding_rules),
            (frozen, model.frozen.rules),
            (model.frozen.backbone.abstract_params(), model.frozen.rules),
        ):
            known.update(rules)
            for path in specs(place(tree, rules, mesh_of())):
                used.add(next(rule for rule in rules if re.search(rule.pattern, path)))
    assert used == known


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


RULES = (
    ShardingRule(r'mlp/kernel$', ('fsdp', 'tensor')),
    ShardingRule(r'kernel$', (None, 'fsdp')),
    ShardingRule(r'bias$'),
)


def test_first_rule_counts_from_the_last_dimension():
    tree = {'mlp': {'kernel': leaf(12, 8, 6), 'bias': leaf(12, 8)}, 'kernel': leaf(8, 8)}
    found = specs(place(tree, RULES, mesh_of(2, 4, 2)))
    assert found == {
        'mlp/kernel': PartitionSpec(None, 'fsdp', 'tensor'),
        'mlp/bias': PartitionSpec(),
        'kernel': PartitionSpec(None, 'fsdp'),
    }


def test_what_does_not_divide_stays_whole():
    tree = {'mlp': {'kernel': leaf(6, 8)}}
    assert specs(place(tree, RULES, mesh_of(1, 4, 4)))['mlp/kernel'] == PartitionSpec(
        None, 'tensor'
    )
    assert specs(place(tree, RULES, mesh_of(1, 4, 3)))['mlp/kernel'] == PartitionSpec()
    # Axes of size 1 leave no trace, so that a mesh of one device has one sharding.
    assert specs(place(tree, RULES, mesh_of(8, 1, 1)))['mlp/kernel'] == PartitionSpec()


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule matches 'mlp/table'"):
        place({'mlp': {'table': leaf(4, 4)}}, RULES, mesh_of())
    with pytest.raises(ValueError, match=r"'mlp/kernel' .* fewer dimensions"):
        place({'mlp': {'kernel': leaf(4)}}, RULES, mesh_of())


def test_a_mesh_that_leaves_weights_whole_is_refused():
    tree = {'mlp': {'kernel': leaf(6, 8)}, 'kernel': leaf(8, 8)}
    mesh = mesh_of(1, 4, 1)
    placed = place(tree, RULES, mesh)
    assert sharding.replicated_bytes(placed, 'fsdp') == (4 * 48, 4 * 112)
    with pytest.raises(ValueError, match=r'mesh.fsdp=4 .* 43 % of the weights .*mlp/kernel \(6, 8'):
        check_replicated_share(placed, mesh, 'weights', small_bytes=0)
    check_replicated_share(placed, mesh, 'weights', most=0.5, small_bytes=0)
    check_replicated_share(placed, mesh, 'weights')  # too small to be worth it
    # Twelve heads do not split into eight parts.
    model, _, frozen = shapes(dist, 'b16_8+16f_k400')
    with pytest.raises(ValueError, match=r'mesh.tensor=8 .*qkv/kernel \(12, 768, 3, 12, 64'):
        model.frozen.place(frozen, mesh_of(1, 1, 8))


def test_optimizer_leaves_follow_the_parameter_they_end_in():
    params = {'mlp': {'kernel': leaf(8, 8)}, 'kernel': leaf(8, 8)}
    mesh = mesh_of(1, 2, 2)
    placed = place(params, RULES, mesh)
    factored = {'mlp': {'kernel': leaf(8)}, 'kernel': leaf(8, 8)}  # another shape: no parameter's
    state = optax.MultiSteps(optax.adam(1e-3), 2).init(
        jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    )
    found = specs(sharding.place_like({'inner': state, 'rows': factored}, placed, mesh))
    for path, where in found.items():
        if path == 'rows/mlp/kernel' or not path.endswith('kernel'):
            assert where == PartitionSpec(), path
        else:
            own = 'mlp/kernel' if path.endswith('mlp/kernel') else 'kernel'
            assert where == specs(placed)[own], path
    assert sum(where != PartitionSpec() for where in found.values()) == 2 * 3 + 1


def test_without_a_mesh_nothing_is_asked_for():
    tree = {'mlp': {'kernel': jnp.ones((4, 4))}}
    text = str(
        jax.make_jaxpr(lambda t: sharding.gather_params(sharding.split_batch(t), RULES))(tree)
    )
    assert 'sharding_constraint' not in text
    on_mesh = sharding.on_mesh(mesh_of(2, 2, 1), lambda t: sharding.gather_params(t, RULES))
    assert 'sharding_constraint' in str(jax.make_jaxpr(on_mesh)(tree))


def test_only_split_weights_on_tpus_arrive_beside_the_core():
    def options(platform, fsdp):
        devices = np.array([types.SimpleNamespace(platform=platform)] * fsdp)
        return sharding.compiler_options(
            types.SimpleNamespace(shape={'fsdp': fsdp}, devices=devices)
        )

    assert options('tpu', 1) is None and options('cpu', 2) is None
    assert list(options('tpu', 2)) == ['xla_enable_async_all_gather']


@pytest.mark.parametrize(
    ('sizes', 'text'),
    [
        ({'fsdp': 3}, r'mesh.data=-1 x mesh.fsdp=3 x mesh.tensor=1 does not make 1 devices'),
        ({'data': 2}, r'mesh.data=2 .* does not make 1 devices'),
        ({'tensor': 0}, r'mesh.tensor=0 must be at least 1'),
    ],
)
def test_sizes_that_do_not_make_the_devices_are_an_error(sizes, text):
    with pytest.raises(ValueError, match=text):
        sharding.make_mesh(jax.devices()[:1], **sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the placement of devices looks at."""

    id: int
    process_index: int
    slice_index: int
    platform: str = 'cpu'
    device_kind: str = 'cpu'


def test_only_data_crosses_slices(monkeypatch):
    chips = [Chip(i, i // 2, i % 2) for i in range(8)]  # slices take turns in the list
    monkeypatch.setattr(sharding, 'Mesh', lambda grid, *_, **__: types.SimpleNamespace(grid=grid))
    grid = sharding.make_mesh(chips, fsdp=2).grid
    assert grid.shape == (4, 2, 1)
    slices = np.vectorize(lambda chip: chip.slice_index)(grid)
    assert slices[:2].tolist() == [[[0], [0]]] * 2 and slices[2:].tolist() == [[[1], [1]]] * 2
    with pytest.raises(ValueError, match=r'mesh.data=1 is not a multiple of 2 slices'):
        sharding.make_mesh(chips, fsdp=8)


def feeds(monkeypatch, hosts, fsdp, tensor):
    """What every host reads, for devices whose hosts are listed in the order of the mesh."""
    devices = np.array([types.SimpleNamespace(process_index=host) for host in hosts])
    devices = devices.reshape(-1, fsdp, tensor)
    shape = dict(zip(sharding.AXES, devices.shape))
    mesh = types.SimpleNamespace(devices=devices, shape=shape)
    found = []
    for host in range(max(hosts) + 1):
        monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
        found.append(dataclasses.astuple(sharding.feed(mesh)))
    return found


def test_hosts_read_the_parts_that_they_hold(monkeypatch):
    own = [(0, 2, True), (1, 2, True)]
    assert feeds(monkeypatch, [0, 0, 1, 1], 1, 1) == own
    assert feeds(monkeypatch, [0, 0, 1, 1], 2, 2) == own
    assert feeds(monkeypatch, [0, 1, 0, 1], 2, 1) == own  # interleaved along a torus
    assert feeds(monkeypatch, [1, 1, 0, 0], 1, 1) == own[::-1]


def test_hosts_that_share_clips_read_the_same_part(monkeypatch):
    assert feeds(monkeypatch, [0, 0, 1, 1, 2, 2, 3, 3], 1, 4) == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]
    with pytest.raises(ValueError, match=r'mesh\.tensor=3'):
        feeds(monkeypatch, [0, 0, 1, 1, 2, 2], 1, 3)


def test_weights_are_stored_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(converted, 'CHUNK_BYTES', 4096)
    params = {'blocks': {'kernel': np.arange(3 * 32 * 64, dtype=np.float32).reshape(3, 32, 64)}}
    metadata = dict.fromkeys(converted.REQUIRED, '')
    converted.save_converted(tmp_path / 'weights', params, metadata)
    stored = ocp.PyTreeCheckpointHandler().metadata(tmp_path / 'weights' / 'params').tree
    chunk = stored['blocks']['kernel'].storage.chunk_shape
    assert np.prod(chunk) * 4 <= 4096
    found = converted.load_params(tmp_path / 'weights', as_numpy=True)
    np.testing.assert_array_equal(found['blocks']['kernel'], params['blocks']['kernel'])
