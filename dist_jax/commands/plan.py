"""Memory and time of a step on a TPU that is not here."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from ml_collections import ConfigDict

from dist_jax.commands.arguments import make_parser, split
from dist_jax.config_arguments import UsageError, read_config

SUMMARY = 'memory and time of a step on a TPU that is not here'
HELP = """\
examples:
  dist_jax plan --topology=v4:2x2x2 --config=dist:b16_8+16f_k400 --config.batch_size=256
  dist_jax plan --topology=v5e:4x4 --search_batch --config=dist:l14_32+64f_k400 \\
      --config.batch_size=128 --json=plan.json --plot=plan.png
  dist_jax plan --topology=v4:2x2x1 --config.batch_size=64 --plot=remat.png --compare \\
      dist:b16_8+16f_k400 'dist:b16_8+16f_k400 config.model.remat=False'
  dist_jax plan --topology=v4:2x2x1 --config=dist:b16_8+16f_k400 \\
      --config.batch_size=16 --gradients frozen through_backbone full
      what keeping the backbone frozen saves

Compiles the steps that `train` and `evaluate` would run, for a TPU, on this machine: no TPU, no
weights, no data, no network. batch_size counts the clips of all chips.

memory   of a chip, by kind, as the compiler places it, and the batches that wait beside the
         program's own. Reliable: what does not fit here does not fit there.
cycles   the compiler's own estimates, bodies of loops times their turns. A kernel of one's own
         counts by the larger of its compiled v4 schedule (other chips: the same share of the peak)
         and of the bytes it moves over the bandwidth of the HBM. A collective takes its bytes over
         the bandwidth of all links of a chip, as a ring; one in two halves is waited for as long
         as that is more than what runs between them ("on some": if it had those of one
         dimension of the torus). Copies that run beside the products count nothing, nor does what
         slices send each other. Nothing here was measured: read it next to the calibration, and
         to compare.
MFU      model FLOPs (products of the model, each once, none recomputed) over time and peak.

Compiled programs are kept in --cache. A program takes minutes on two cores.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('plan', 'Memory and time of a step on a TPU that is not here.', HELP)
    found.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help='as in v4:4x4x8')
    found.add_argument('--num_slices', type=int, default=1, help='slices of it (%(default)s)')
    found.add_argument(
        '--compare',
        nargs='+',
        default=[],
        metavar='CONFIG',
        help="configs side by side: 'FILE:VARIANT config.FIELD=VALUE ... gradients=full'",
    )
    found.add_argument(
        '--gradients',
        nargs='+',
        default=['frozen'],
        metavar='HOW',
        help='frozen, through_backbone or full; several: side by side (%(default)s)',
    )
    found.add_argument('--search_batch', action='store_true', help='largest batch that fits')
    found.add_argument('--no_eval', action='store_true', help='leave the eval step out')
    found.add_argument('--json', default='', metavar='FILE', help='write the figures')
    found.add_argument('--plot', default='', metavar='FILE.png', help='draw them')
    found.add_argument('--cache', metavar='DIR', help="compiled programs; '' for none")
    found.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field (of all compared)',
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    from dist_jax.plan import topology

    asked = topology.parse_topology(arguments.topology, arguments.num_slices)
    wanted = _wanted_plans(arguments.compare, arguments.gradients, config_arguments)
    topology.prepare_environment()
    from dist_jax.plan import cache, command

    folder = cache.default_folder() if arguments.cache is None else arguments.cache
    options = command.Options(
        # Compared are train steps.
        evaluate=not arguments.no_eval and len(wanted) == 1,
        search_batch=arguments.search_batch,
        cache=folder,
    )
    requests = [command.Request(*one) for one in wanted]
    return command.run(requests, asked, options, arguments.json, arguments.plot)


def _wanted_plans(
    compare: Sequence[str], gradients: Sequence[str], config_arguments: list[str]
) -> list[tuple[str, ConfigDict, str]]:
    """(label, config, gradients) of every plan that the arguments ask for."""
    named = [a for a in config_arguments if a.startswith('--config=')]
    common = [a for a in config_arguments if not a.startswith('--config=')]
    if named and compare:
        raise UsageError('pass --config or --compare, not both')
    wanted = []
    for text in compare or [' '.join(a.removeprefix('--config=') for a in named)]:
        file, *settings = shlex.split(text) or ['']
        fields, own = [], []
        for setting in settings:
            name, equals, value = setting.removeprefix('--').partition('=')
            if name == 'gradients':
                own.append(value)
            elif name.startswith('config.') and equals:
                fields.append(f'--{name}={value}')
            else:
                raise UsageError(
                    f'--compare: cannot read {setting!r}; write config.FIELD=VALUE or gradients=HOW'
                )
        base = [f'--config={file}'] if file else []
        for how in own or gradients:
            label = os.path.basename(file).replace('.py:', ' ').removesuffix('.py')
            for field in fields:
                label += f' {field.removeprefix("--config.").rpartition(".")[2]}'
            label += '' if how == 'frozen' else f' {how}'
            wanted.append((label, read_config([*base, *common, *fields]), how))
    return wanted
