"""The device mesh, and how host batches become global arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any

DATA = 'data'


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices on one `data` axis, in process order."""
    devices = jax.devices() if devices is None else devices
    # Auto: einops-style splits of a sharded axis raise under Explicit axes (jax 0.10).
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over the `data` axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch_size(batch_size: int, mesh: Mesh, field: str, accumulation: int = 1) -> None:
    """Raises ValueError unless a global batch divides over devices and accumulation steps."""
    parts = mesh.size * accumulation
    if batch_size <= 0 or batch_size % parts:
        raise ValueError(
            f'{field}={batch_size} must be a positive multiple of {parts} '
            f'({mesh.size} devices x {accumulation} accumulation steps)'
        )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of every array -> global arrays split over the mesh."""
    sharding = batched(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
