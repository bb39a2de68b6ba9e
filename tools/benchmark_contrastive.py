"""Memory, cycles and messages of the loss of text-video retrieval over a global batch.

    python -m tools.benchmark_contrastive
    python -m tools.benchmark_contrastive 4096 --topology v4:1x1x1 --dtype bfloat16 --block_mib 24

Compiles the loss of a batch of embeddings and its gradients of all of them for TPUs that need not
be there, embeddings split over all chips, and prints what the compiler says of one chip. `whole` is
what the products of all words with all frames would take: they are made a block of sentences at a
time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_jax.plan import topology as topologies
from input_pipeline.escape import Console

GIB = 2**30
MEMORY = ('arguments', 'outputs', 'temporaries')
SIZES = (128, 1024, 4096)

_HEAD = ('chips', 'pairs', 'dtype', 'score', 'block', *MEMORY, 'whole', 'M cycles', 'on the links')
_LINE = '{:>5} {:>6} {:8} {:5} {:>6} {:>10} {:>8} {:>11} {:>8} {:>9}  {}'


class Case(NamedTuple):
    """One loss: `pairs` over all chips, and what `similarity` is told."""

    pairs: int
    dtype: str
    interaction: str
    block_mib: int


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pairs', nargs='*', type=int, help='sizes of the batch (128 1024 4096)')
    parser.add_argument('--topology', nargs='+', default=['v4:1x1x1', 'v4:2x2x4'])
    parser.add_argument('--dtype', nargs='+', default=['bfloat16', 'float32'])
    parser.add_argument('--interaction', nargs='+', default=['wti', 'meanP'])
    parser.add_argument('--num_words', type=int, default=32, help='(%(default)s)')
    parser.add_argument('--num_frames', type=int, default=12, help='(%(default)s)')
    parser.add_argument('--width', type=int, default=512, help='of embeddings (%(default)s)')
    parser.add_argument(
        '--block_mib', nargs='+', type=int, default=[0], help="of a block; 0: the library's own"
    )
    parser.add_argument('--json', help='write the rows to this file')
    arguments = parser.parse_args(argv)
    console = Console()
    console.print(
        f'GiB of a chip, MB that a chip puts on the links; {arguments.num_words} words, '
        f'{arguments.num_frames} frames, {arguments.width} channels'
    )
    console.print(_LINE.format(*_HEAD))
    chosen = arguments.dtype, arguments.interaction, arguments.block_mib
    cases = [Case(*one) for one in itertools.product(arguments.pairs or SIZES, *chosen)]
    rows = []
    try:
        for name in arguments.topology:
            measure = _compiler(name, arguments)
            for case in cases:
                rows.append(measure(case))
                console.print(_line(rows[-1]))
    except (topologies.MissingCompilerError, ValueError) as error:
        console.print(str(error))
        return 1
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    return 0


def _line(row: dict[str, Any]) -> str:
    memory = (f'{row[kind] / GIB:.3f}' for kind in (*MEMORY, 'whole'))
    sent = ', '.join(f'{kind} {size / 1e6:.3g}' for kind, size in row['collective_bytes'].items())
    facts = (row[key] for key in ('chips', 'pairs', 'dtype', 'interaction', 'block_mib'))
    return _LINE.format(*facts, *memory, f'{row["cycles"] / 1e6:.2f}', sent or 'nothing')


def _compiler(topology: str, sizes: argparse.Namespace) -> Callable[[Case], dict[str, Any]]:
    """A loss -> its row."""
    chips = topologies.parse_topology(topology)
    topologies.prepare_environment()
    import jax
    import jax.numpy as jnp

    from dist_jax import losses, similarity
    from dist_jax.models.layers import exact_float32
    from dist_jax.plan import compiling, figures, hlo
    from dist_jax.sharding import batched, make_mesh, on_mesh, replicated
    from dist_jax.tasks.retrieve import Retrieve

    mesh = make_mesh(topologies.devices(chips))
    words, frames, width = sizes.num_words, sizes.num_frames, sizes.width
    own_block = similarity.BLOCK_BYTES

    def measure(case: Case) -> dict[str, Any]:
        task = Retrieve(interaction=case.interaction)
        similarity.BLOCK_BYTES = case.block_mib * 2**20 or own_block

        def loss(outputs: Any, targets: Any, mask: jax.Array) -> jax.Array:
            per_row = task.loss(outputs, targets, mask)
            return losses.masked_mean(per_row, mask, mask.sum())

        def split(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((case.pairs, *shape), dtype, sharding=batched(mesh))

        outputs = {
            'words': split(words, width, dtype=case.dtype),
            'frames': split(frames, width, dtype=case.dtype),
            'pooled': split(width, dtype=case.dtype),
            'word_logits': split(words),
            'frame_logits': split(frames),
            'logit_scale': split(),
        }
        targets = {'word_mask': split(words), 'video': split(dtype=jnp.int32)}
        step = jax.jit(
            on_mesh(mesh, exact_float32(jax.value_and_grad(loss))),
            out_shardings=(replicated(mesh), batched(mesh)),
        )
        compiled = compiling.compile_lowered(step.lower(outputs, targets, split()))
        found = {'chips': chips.num_chips, **case._asdict(), **compiled.memory}
        found['block_mib'] = similarity.BLOCK_BYTES // 2**20
        found['whole'] = 4 * case.pairs**2 * words * frames
        program = hlo.read_program(compiled.text)
        return found | {
            'cycles': figures.cycles(program, chips.chip)['estimated_cycles'],
            'collective_bytes': figures.collective_bytes(program),
        }

    return measure


if __name__ == '__main__':
    sys.exit(main())
