"""The device mesh, the rules that place parameters on it, and host batches as global arrays.

A mesh has three axes; any may be 1:

    data     copies of the weights, each with its part of the batch; the only axis that crosses
             slices of a pod, which are joined by the slower data-centre network
    fsdp     batch and weights are split; the weights of a layer are gathered where they are used
    tensor   heads and hidden channels are split; every device sees the same clips

Model code names no devices. Under `on_mesh` it asks for placements by axis names, and the mesh is
`jax.sharding.get_abstract_mesh()`, which `jax.shard_map` finds by itself. Without a mesh these
requests do nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from input_pipeline.batches import HostPart

Tree = Any

DATA, FSDP, TENSOR = 'data', 'fsdp', 'tensor'
AXES = (DATA, FSDP, TENSOR)
BATCH = (DATA, FSDP)  # what clips are split over

# What may stay whole of a tree: a share of its bytes, or bytes that are not worth splitting.
MOST_REPLICATED = 0.05
SMALL_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """Where the parameters whose path matches `pattern` lie.

    A dimension that the size of its axis does not divide stays whole; `check_replicated_share`
    bounds how much may.

    Attributes:
      pattern: regular expression searched in 'a/b/kernel' paths; the first matching rule counts.
      spec: axis of the mesh, or None, for each of the last dimensions. Dimensions before them, such
        as the layers of a stack, are never split.
    """

    pattern: str
    spec: tuple[str | None, ...] = ()


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh of all these devices.

    On TPU neighbours on the inner axes are neighbours in the pod, and slices follow each other on
    `data`. Elsewhere devices keep their order.

    Args:
      devices: None for all of the program.
      data: size of the axis; -1 for what the others leave.
      fsdp: likewise, at least 1.
      tensor: likewise, at least 1.

    Raises:
      ValueError: the sizes do not make the number of devices, or of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in ((FSDP, fsdp), (TENSOR, tensor)):
        if size < 1:
            raise ValueError(f'mesh.{name}={size} must be at least 1')
    asked = f'mesh.{DATA}={data} x mesh.{FSDP}={fsdp} x mesh.{TENSOR}={tensor}'
    if data == -1:
        data = len(devices) // (fsdp * tensor)
    if data < 1 or data * fsdp * tensor != len(devices):
        raise ValueError(
            f'{asked} does not make {len(devices)} devices; set mesh.fsdp and mesh.tensor to '
            'numbers that divide them, and mesh.data=-1 for the rest'
        )
    num_slices = len({getattr(device, 'slice_index', 0) or 0 for device in devices})
    if data % num_slices:
        raise ValueError(
            f'mesh.data={data} is not a multiple of {num_slices} slices; only the data axis '
            'crosses slices: choose a smaller mesh.fsdp or mesh.tensor'
        )
    if num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // num_slices, fsdp, tensor),
            (num_slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(
            (data, fsdp, tensor), devices, allow_split_physical_axes=True
        )
    # Auto: einops-style splits of a sharded axis raise under Explicit axes (jax 0.10).
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


# Placing trees: before the program.


def place(tree: Tree, rules: Sequence[ShardingRule], mesh: Mesh) -> Tree:
    """The tree as `jax.ShapeDtypeStruct` leaves that lie as the rules say.

    Args:
      tree: leaves with shape and dtype.
      rules: must cover every leaf.
      mesh: the devices.

    Raises:
      ValueError: a leaf that no rule matches, or that has fewer dimensions than its rule.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        return _placed(leaf, NamedSharding(mesh, _spec(path, leaf.shape, rules, mesh.shape)))

    return jax.tree_util.tree_map_with_path(one, tree)


def place_like(tree: Tree, like: Tree, mesh: Mesh) -> Tree:
    """The state of an optimizer: each leaf lies as the parameter that it belongs to.

    Args:
      tree: holds copies of the structure of `like` at any depth, and other leaves.
      like: placed parameters.
      mesh: the devices; leaves that belong to no parameter are replicated.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(like))

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        ends = (known.get(path[start:]) for start in range(len(path)))
        found = next((x for x in ends if x is not None and x.shape == leaf.shape), None)
        return _placed(leaf, replicated(mesh) if found is None else found.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def place_whole(tree: Tree, mesh: Mesh) -> Tree:
    """The tree as `jax.ShapeDtypeStruct` leaves, each on every device."""
    return jax.tree.map(lambda leaf: _placed(leaf, replicated(mesh)), tree)


def shardings(placed: Tree) -> Tree:
    """Of every leaf, for `jax.jit`."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _spec(
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    rules: Sequence[ShardingRule],
    sizes: Mapping[str, int],
    gathered: bool = False,
) -> PartitionSpec:
    """What the first matching rule means for a leaf; `gathered`: without `fsdp`."""
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
    if rule is None:
        raise ValueError(f'no sharding rule matches {name!r} {shape}; add one beside its model')
    before = len(shape) - len(rule.spec)
    if before < 0:
        raise ValueError(f'{name!r} {shape} has fewer dimensions than its {rule}')
    axes: list[str | None] = [None] * before
    for size, axis in zip(shape[before:], rule.spec):
        split = axis is not None and sizes[axis] > 1 and size % sizes[axis] == 0
        axes.append(axis if split and not (gathered and axis == FSDP) else None)
    while axes and axes[-1] is None:  # so that a whole leaf has the sharding of `replicated`
        axes.pop()
    return PartitionSpec(*axes)


def replicated_bytes(placed: Tree, axis: str) -> tuple[int, int]:
    """Bytes of a placed tree that the axis does not split, and all its bytes."""
    sizes = [
        (leaf.size * leaf.dtype.itemsize, axis in leaf.sharding.spec)
        for leaf in jax.tree.leaves(placed)
    ]
    return sum(size for size, split in sizes if not split), sum(size for size, _ in sizes)


def check_replicated_share(
    placed: Tree,
    mesh: Mesh,
    name: str,
    axes: Sequence[str] = (FSDP,),
    most: float = MOST_REPLICATED,
    small_bytes: int = SMALL_BYTES,
) -> None:
    """Refuses a mesh on which much of a tree would stay whole.

    Args:
      placed: the tree.
      mesh: the devices.
      name: what the tree is, for the message.
      axes: which are to split it, where they are larger than 1.
      most: share of the bytes that may stay whole.
      small_bytes: that may stay whole, whatever their share.

    Raises:
      ValueError: more stays whole; the message names the largest leaves.
    """
    for axis in axes:
        whole, total = replicated_bytes(placed, axis)
        if mesh.shape[axis] == 1 or whole <= max(most * total, small_bytes):
            continue
        leaves = [
            (leaf.size, jax.tree_util.keystr(path, simple=True, separator='/'), leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
            if axis not in leaf.sharding.spec
        ]
        largest = ', '.join(f'{path} {shape}' for _, path, shape in sorted(leaves)[:-4:-1])
        raise ValueError(
            f'mesh.{axis}={mesh.shape[axis]} would leave {100 * whole / total:.0f} % of the {name} '
            f'whole on every device, where {100 * most:g} % may be; the largest: {largest}. '
            f'Choose a mesh.{axis} that divides their dimensions'
        )


# Asking for placements: inside the program.


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with the mesh at hand; put it under `jax.jit`."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return run


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """For `jax.jit` of a program on this mesh.

    Where weights are split over `fsdp`, those of a layer arrive while a TPU computes: libtpu does
    that on v4 only where it is told to, and moves the gathers to where they are hidden by itself.
    """
    if mesh.shape[FSDP] == 1 or mesh.devices.flat[0].platform != 'tpu':
        return None
    return {'xla_enable_async_all_gather': 'true'}


def parts_here() -> int:
    """How many parts a batch is split into; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in BATCH) if sizes else 1


def split_batch(tree: Tree, axis: int = 0) -> Tree:
    """Keeps the clips, or frames, on `axis` of every leaf split over `data` and `fsdp`.

    An axis that is not a multiple of their sizes is left as it is.
    """
    if not jax.sharding.get_abstract_mesh().shape:
        return tree
    parts = parts_here()
    spec = PartitionSpec(*[None] * axis, BATCH)

    def one(x: jax.Array) -> jax.Array:
        return x if x.shape[axis] % parts else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(one, tree)


def everywhere(tree: Tree) -> Tree:
    """Every device gets all of every leaf, as an array that all rows of a batch are compared with.

    Gradients are summed over devices.
    """
    if not jax.sharding.get_abstract_mesh().shape:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def split_params(tree: Tree, rules: Sequence[ShardingRule]) -> Tree:
    """Parameters, or their gradients, as they are stored."""
    return _constrained(tree, rules, gathered=False)


def gather_params(tree: Tree, rules: tuple[ShardingRule, ...]) -> Tree:
    """Parameters as they are used: gathered over `fsdp`, still split over `tensor`.

    Gradients of the result are scattered: each device gets the sum of the part that it stores.
    Without a mesh they are left alone.
    """
    if not jax.sharding.get_abstract_mesh().shape:
        return jax.tree.map(jnp.asarray, tree)
    return _gather(tree, rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(tree: Tree, rules: tuple[ShardingRule, ...]) -> Tree:
    # Both constraints: without the first, the gathered form could spread to where a leaf was cut
    # from, and a whole stack would be gathered instead of one layer.
    return _constrained(split_params(tree, rules), rules, gathered=True)


def _gather_forward(tree: Tree, rules: tuple[ShardingRule, ...]) -> tuple[Tree, None]:
    return _gather(tree, rules), None


def _gather_backward(rules: tuple[ShardingRule, ...], _: None, grads: Tree) -> tuple[Tree]:
    return (split_params(grads, rules),)


_gather.defvjp(_gather_forward, _gather_backward)


def _constrained(tree: Tree, rules: Sequence[ShardingRule], gathered: bool) -> Tree:
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes or not rules:
        return tree

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        spec = _spec(path, x.shape, rules, sizes, gathered)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


# Batches: between hosts and devices.


@dataclasses.dataclass(frozen=True)
class Feed(HostPart):
    """Which part of every batch this process reads.

    Attributes:
      first: whether no process before this one reads the same part. Where `tensor` crosses hosts,
        several read it.
    """

    first: bool = True


def feed(mesh: Mesh) -> Feed:
    """The part of this process, in the order in which the mesh holds them.

    Raises:
      ValueError: the parts of processes overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    for position, device in np.ndenumerate(mesh.devices):
        row = position[0] * mesh.shape[FSDP] + position[1]
        rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != batch_parts(mesh) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f'mesh.fsdp={mesh.shape[FSDP]} and mesh.tensor={mesh.shape[TENSOR]} give hosts parts '
            'of the batch that overlap; choose sizes that divide the devices of a host, or that '
            'these divide'
        )
    own = rows[jax.process_index()]
    first = min(process for process, part in rows.items() if part == own)
    return Feed(parts.index(tuple(sorted(own))), len(parts), first == jax.process_index())


def check_batch_size(batch_size: int, mesh: Mesh, field: str, accumulation: int = 1) -> None:
    """Raises ValueError unless a global batch divides over devices and accumulation steps."""
    if accumulation < 1:
        raise ValueError(f'accumulation={accumulation} must be at least 1')
    parts = batch_parts(mesh) * accumulation
    if batch_size <= 0 or batch_size % parts:
        sizes = f'mesh.data={mesh.shape[DATA]} x mesh.fsdp={mesh.shape[FSDP]}'
        raise ValueError(
            f'{field}={batch_size} must be a positive multiple of {parts} '
            f'({sizes}, on {mesh.size} devices, x {accumulation} accumulation steps)'
        )


def check_repeats(batch_size: int, mesh: Mesh, repeats: int) -> None:
    """Raises ValueError unless all copies of a video are read by one host."""
    parts = feed(mesh).count * repeats
    if batch_size % parts:
        raise ValueError(
            f'batch_size={batch_size} must be a multiple of {parts} (data.repeats='
            f'{repeats} clips of a video, on {parts // repeats} hosts)'
        )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of every array (see `feed`) -> global arrays split over the mesh.

    Clips, `video` (..., W, 3), become rows of pixels, (..., 3 W), which host and device share the
    bytes of: on TPU an array of three channels takes as much time as one of 128.
    """
    sharding = batched(mesh)
    video = batch.get('video')
    if video is not None and video.shape[-1] == 3:
        batch = {**batch, 'video': video.reshape(*video.shape[:-2], -1)}
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def to_host(tree: Tree) -> Tree:
    """Whole numpy arrays on every host, one leaf at a time on the devices."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def local_rows(tree: Tree) -> Tree:
    """This host's rows, as numpy, of arrays that are split over devices on axis 0."""

    def one(array: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(one, tree)


def gather_rows(parts: Sequence[dict[str, Tree]]) -> dict[str, Tree]:
    """Rows of all hosts together, in the order of their `index`; every host must call it.

    Args:
      parts: of this host, at least one; axis 0 of all leaves are rows, `index` (n,) among them.
        Hosts may hold different numbers of rows.
    """
    rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    if jax.process_count() > 1:
        lengths = multihost_utils.process_allgather(np.int32(len(rows['index'])))
        longest = int(lengths.max())

        def gather(own: np.ndarray) -> np.ndarray:
            rest = np.zeros((longest - len(own), *own.shape[1:]), own.dtype)
            hosts = multihost_utils.process_allgather(np.concatenate([own, rest]))
            return np.concatenate([host[:count] for host, count in zip(hosts, lengths)])

        rows = jax.tree.map(gather, rows)
    order = np.argsort(rows['index'], kind='stable')
    return jax.tree.map(lambda leaf: leaf[order], rows)


def gather_values(values: list[Any]) -> list[Any]:
    """JSON values of all hosts, one host's after the other's; every host must call it."""
    if jax.process_count() == 1:
        return values
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [value for row, n in zip(texts, lengths) for value in json.loads(row[:n].tobytes())]
