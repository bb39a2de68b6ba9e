"""Memory of a compiled train step, on the devices of this machine.

    python -m tools.studying.memory --json=FILE --config=configs/dist.py:demo ...

What the compiler says; nothing is run and no weights are read. With the compilation cache of a run
of the same config, nothing is compiled either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dist_jax import config_arguments
from dist_jax.json_file import write_json


def main(argv: Sequence[str]) -> int:
    """Writes arguments, outputs, aliased, temporaries and program, in bytes, and their sum."""
    target, *fields = argv
    config = config_arguments.read_config(fields)
    from dist_jax.plan import compiling
    from dist_jax.sharding import make_mesh

    one = compiling.train_step(config, make_mesh(**config.mesh))
    memory = compiling.compile_lowered(one.function.lower(*one.arguments.values())).memory
    held = ('arguments', 'outputs', 'temporaries')
    total = sum(memory[kind] for kind in held) - memory['aliased']
    path = Path(target.removeprefix('--json='))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, memory | {'total': total})
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
