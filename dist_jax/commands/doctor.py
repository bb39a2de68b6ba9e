"""Checks this machine, or all hosts of a pod."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax.commands.arguments import make_parser, split, start_jax
from dist_jax.config_arguments import read_config

SUMMARY = 'check this machine, or all hosts of a pod, before a run'
HELP = """\
examples:
  dist_jax doctor
  dist_jax doctor --config=dist:b16_8+16f_k400 --workdir=gs://bucket/run --devices=16 ...
      on every host, with the arguments of `train`

Versions, devices, code and config of all hosts, a workdir that all can write to, the backbone, and
some videos of the lists. Several hosts do this before they train. Exit code 1: a check failed.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('doctor', 'Check this machine, or all hosts of a pod.', HELP)
    found.add_argument('--workdir', default='', help='folder of the run')
    found.add_argument('--devices', type=int, default=0, help='expected, over all hosts')
    found.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field',
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    config = read_config(config_arguments) if config_arguments else None
    start_jax()
    import jax

    from dist_jax import doctor

    checks = doctor.run(doctor.Request(config, arguments.workdir, arguments.devices))
    if jax.process_index() == 0:
        doctor.print_table(checks)
    return int(any(check.state == doctor.FAILED for check in checks))
