"""Compiles kernels for v4 and reads their schedules, in a process of its own.

libtpu reads the flags that make it write schedules when it is loaded, so `measure` starts this
module; it prints a line of JSON for each kernel and shape that it is given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_jax.plan import topology

TOPOLOGY = 'v4:1x1x1'
Wanted = Sequence[tuple[str, dict[str, int]]]


def measure(wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Compiles kernels at shapes, one after the other.

    Yields:
      For each: `kernel`, `shape`, `bundles` of a frame, `unit` that is used most and its share
      `busy`, `spills` (share of the loads that fetch spilled registers), `products` (bundles of a
      frame that the matrix units need), `bytes` of a frame, `versions`.

    Raises:
      RuntimeError: the process failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true',
            'JAX_PLATFORMS': 'cpu',
        }
        command = [sys.executable, '-m', __spec__.name, folder, json.dumps(list(wanted))]
        with (
            tempfile.TemporaryFile('w+') as said,
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
            ) as child,
        ):
            try:
                for line in child.stdout:
                    yield json.loads(line)
            finally:
                child.stdout.close()
                failed = child.wait()
            if failed:
                said.seek(0)
                raise RuntimeError(f'compiling kernels failed: {said.read()[-2000:]}')


def main(argv: Sequence[str]) -> None:
    """What the process does: (folder of the dump, JSON of what is wanted)."""
    topology.prepare_environment()
    import jax
    from jax.sharding import SingleDeviceSharding

    from dist_jax.models.kernel_costs import CORES
    from tools.scheduling import bundles
    from tools.scheduling.cases import FRAMES, KERNELS

    folder, wanted = Path(argv[0]), json.loads(argv[1])
    devices = topology.devices(topology.parse_topology(TOPOLOGY))
    place, versions = SingleDeviceSharding(devices[0]), topology.versions(devices)
    for kernel, shape in wanted:
        function, arguments = KERNELS[kernel].build(FRAMES, **shape)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
        )
        jax.jit(function).lower(*arguments).compile()
        found = bundles.read(folder, kernel)
        row = {'kernel': kernel, 'shape': shape} | _of_a_frame(found, FRAMES // CORES)
        print(json.dumps(row | {'versions': versions}), flush=True)
        for path in folder.iterdir():
            path.unlink()


def _of_a_frame(found: Any, frames: int) -> dict[str, Any]:
    unit = max((u for u in found.busy if ':' not in u), key=lambda u: found.busy[u])
    return {
        'bundles': round(found.cycles / frames, 1),
        'products': round(found.product_cycles / frames, 1),
        'unit': unit,
        'busy': round(found.busy[unit], 3),
        'spills': round(found.busy['VLOAD:FILL'] / max(found.busy['VLOAD'], 1e-9), 3),
        'bytes': round(found.bytes / frames),
    }


if __name__ == '__main__':
    main(sys.argv[1:])
