"""`dist_jax plan`, once its arguments are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from dist_jax.plan import compiling, figures
from dist_jax.plan.topology import Topology, devices
from dist_jax.sharding import make_mesh

GIB = 2**30


def plan_config(config: ConfigDict, topology: Topology) -> dict[str, Any]:
    """Compiles the train step of a config and returns its figures."""
    mesh = make_mesh(devices(topology))
    one = compiling.train_step(config, mesh)
    compiled = compiling.compile_step(one)
    return {'topology': str(topology), 'chips': topology.num_chips} | figures.step_figures(
        compiled, topology, one.clips
    )


def run(config: ConfigDict, topology: Topology, json_file: str = '') -> int:
    """Prints the plan and writes it; returns the exit code."""
    found = plan_config(config, topology)
    show(found)
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    return 0


def show(found: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    console = Console()
    title = f'{found["topology"]}: train step, {found["clips_per_chip"]:g} clips a chip'
    table = Table('HBM of a chip', 'GiB', title=title)
    for kind, size in found.get('hbm_bytes_per_chip', {}).items():
        table.add_row(kind, f'{size / GIB:.3f}')
    needed = found['hbm_bytes_needed']
    table.add_row('needed', f'{needed / GIB:.3f}' if needed else '?', style='bold')
    table.add_row('allowed', f'{found["hbm_limit_bytes"] / GIB:.3f}')
    table.add_row('fits', 'yes' if found['fits'] else 'NO', style='bold')
    console.print(table)
    if 'estimated_cycles' not in found:
        return
    table = Table('estimate', 'value')
    for name in ('estimated_cycles', 'estimated_seconds', 'clips_per_second_per_chip'):
        table.add_row(name, f'{found[name]:.6g}')
    console.print(table)
    table = Table('module', 'pass', 'M cycles', 'share', title='where the cycles go')
    for row in found['groups'][:20]:
        table.add_row(
            row['name'], row['pass'], f'{row["cycles"] / 1e6:.2f}', f'{100 * row["share"]:.1f} %'
        )
    console.print(table)
