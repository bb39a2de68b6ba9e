"""Times the compiled train step of a config on this machine, with random weights and clips.

    python -m tools.benchmark_step --config=configs/dist.py:b16_8+16f_k400 --batch_size=2
    python -m tools.benchmark_step --config=configs/dist.py:demo --batch_size=32 --dtypes float32

Prints a row for each compute dtype: compilation, step time (minimum and median), clips per second,
and the memory the compiler plans for temporaries. Nothing is read from disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from dist_jax import config_arguments, optim, step, train
from dist_jax.plan import compiling
from dist_jax.sharding import make_mesh, replicated, to_global
from input_pipeline.escape import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', required=True, metavar='FILE:VARIANT')
    parser.add_argument('--batch_size', type=int, default=2, help='clips per step (%(default)s)')
    parser.add_argument('--steps', type=int, default=5, help='timed steps (%(default)s)')
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--unroll', action='store_true', help='write the layers out (CPU)')
    parser.add_argument('--json', help='write the rows to this file')
    arguments = parser.parse_args(argv)
    table = Table(
        *('dtype', 'compile s', 'step s (min)', 'step s (median)', 'clips/s', 'temporaries GiB'),
        title=f'{arguments.config}, batch {arguments.batch_size}, {jax.devices()[0].device_kind}',
    )
    rows = []
    for dtype in arguments.dtypes:
        config = config_arguments.read_config([f'--config={arguments.config}'])
        config.model.dtype = dtype
        config.model.unroll = arguments.unroll or config.model.unroll
        config.batch_size = arguments.batch_size
        row = {'dtype': dtype} | measure(config, arguments.steps)
        rows.append(row)
        table.add_row(*(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    return 0


def measure(config: ConfigDict, num_steps: int) -> dict[str, Any]:
    """Compiles and times the step of a config at its batch size."""
    mesh, parts = make_mesh(), compiling.assemble(config)
    model, task, backbone = parts.model, parts.task, parts.backbone

    def make_frozen(key: jax.Array) -> Any:
        if backbone is None:
            return {}
        params = backbone.kind.init_params(key, backbone.spec)
        lengths = [(len(names), backbone.spec.context_length) for names in task.labels]
        return model.frozen.prepare(params, tuple(jnp.ones(shape, jnp.int32) for shape in lengths))

    frozen = jax.jit(make_frozen, out_shardings=replicated(mesh))(jax.random.key(0))
    settings = train.optimizer_settings(config, train.make_plan(config, 100_000))
    initialise = train.state_initialiser(config, model, task, parts.train_shape, settings)
    state = jax.jit(initialise, out_shardings=replicated(mesh))(frozen)
    train_step = step.make_train_step(
        model,
        task,
        optim.of_model(model, state.params, settings),
        optim.make_schedule(settings),
        train.step_settings(config),
        mesh,
    )
    clips = config.batch_size
    shapes = step.example_batch(task, (clips, *parts.train_shape))
    host_batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()} | {
        'video': np.random.default_rng(0).integers(0, 256, shapes['video'].shape, dtype=np.uint8),
        'mask': np.ones(clips, np.float32),
    }
    batch = to_global(host_batch, mesh)
    started = time.monotonic()
    compiled = train_step.lower(state, frozen, batch).compile()
    compile_seconds = time.monotonic() - started
    seconds = []
    for number in range(num_steps + 1):
        started = time.monotonic()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        if number:  # the first step warms up
            seconds.append(time.monotonic() - started)
    return {
        'compile_seconds': compile_seconds,
        'step_seconds_min': min(seconds),
        'step_seconds_median': statistics.median(seconds),
        'clips_per_second': clips / min(seconds),
        'temporary_gib': compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


if __name__ == '__main__':
    sys.exit(main())
