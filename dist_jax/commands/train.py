"""Trains a model, or continues a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax import paths, pod
from dist_jax.commands.arguments import make_parser, split, start_jax, wrong_usage
from dist_jax.config_arguments import read_config
from dist_jax.configs import base

SUMMARY = 'train a model, or continue a run'
HELP = """\
examples:
  dist_jax train --config=dist:demo --workdir=runs/demo
  dist_jax train --config=dist:b16_8+16f_ssv2 --workdir=runs/ssv2 \\
      --config.backbone.checkpoint=clip_b16 --config.data.root=/data/ssv2 \\
      --config.data.train_list=train.json --config.data.val_list=validation.json \\
      --config.data.label_map=labels.json --config.batch_size=64

A run that was stopped, even by SIGKILL, is continued by the same command. Every host of a pod runs
the same command.

  dist_jax train ... --profile=10                          # WORKDIR/profile, for XProf
  dist_jax train ... --config.log.report_to=wandb          # mlflow, trackio; beside TensorBoard
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('train', 'Train a model, or continue a run.', HELP)
    found.add_argument('--workdir', required=True, help='folder of the run')
    found.add_argument(
        '--skip_checks', action='store_true', help='on several hosts: no `doctor` before the start'
    )
    found.add_argument(
        '--profile', type=int, metavar='STEPS', help='trace so many of its first steps, for XProf'
    )
    found.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field',
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    if arguments.profile is not None:
        config_arguments.append(f'--config.log.profile={arguments.profile}')
    config = read_config(config_arguments)
    with wrong_usage():
        paths.check_training_inputs(base.flat(config))
    start_jax()
    from dist_jax import doctor, train
    from dist_jax.reports import console

    if pod.current() is not None and not arguments.skip_checks:
        doctor.check_before_training(config, arguments.workdir)

    summary = train.train(config, arguments.workdir)
    console.print_summary(arguments.workdir, summary)
    return pod.AGAIN if summary.get('interrupted') else 0
