"""Accuracy of a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, model_folder, split, start_jax, wrong_usage
from dist_jax.config_arguments import named_fields, read_config

SUMMARY = 'accuracy on a list, per class; zero-shot on another label set'
HELP = """\
examples:
  dist_jax evaluate --workdir=runs/b16
  dist_jax evaluate --workdir=runs/b16 --step=best
  dist_jax evaluate --workdir=runs/b16 --config.eval.num_crops=3 --config.eval.allow_bad_videos=true
  dist_jax evaluate --workdir=runs/b16 --output=runs/b16/ucf101 \\
      --config.data.name=ucf101 --config.data.root=/data/ucf101 \\
      --config.data.val_list=testlist01.txt --config.data.label_map=classInd.txt \\
      --config.eval.fusion=0.5
      zero-shot on another label set, averaged with the frozen CLIP
  dist_jax evaluate --config=dist:b16_8+16f_k400 --config.init_from=dist_b16 \\
      --config.backbone.checkpoint=clip_b16 --config.data.val_list=val.txt ...
      the authors' weights, after `dist_jax convert`
  dist_jax evaluate --config=zero_shot:b16_8f_k400 --output=runs/zero_shot \\
      --config.backbone.checkpoint=clip_b16 --config.data.val_list=val.txt ...
      CLIP with the class names, nothing trained

Without --config, the config comes from the run.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('evaluate', 'Measure the accuracy of a trained model.', HELP)
    found.add_argument(
        '--workdir', default='', help='folder of the run, or a release of one: hf://owner/name'
    )
    found.add_argument(
        '--step', help="checkpoint to evaluate: a number or 'best'; the newest by default"
    )
    found.add_argument(
        '--output', default='', help='folder of the report; the run by default, of hf:// this one'
    )
    found.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help="the experiment, if not the run's own; --config.FIELD=VALUE sets a field",
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    with wrong_usage():
        if arguments.workdir:
            paths.check_model(arguments.workdir)
        root = paths.saved_root(arguments.workdir) if arguments.workdir else ''
        paths.check_inputs(named_fields(config_arguments), ('val',), root)
    from dist_jax import evaluate, trained
    from dist_jax.reports import console

    workdir, step = model_folder(arguments.workdir, config_arguments), arguments.step
    output = arguments.output or ('.' if workdir != arguments.workdir else '')
    default = trained.saved_config(workdir, step) if workdir else None
    config = read_config(config_arguments, default)
    start_jax()
    console.print_evaluation(*evaluate.run(config, workdir, step, output))
    return 0
